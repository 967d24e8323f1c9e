"""Which adapter files and states a LoRA training leaves, under kohya's names.

NAME-000002.safetensors         after epoch 2         NAME-000002-state/
NAME-step00000500.safetensors   after step 500        NAME-step00000500-state/
NAME.safetensors                at the end            NAME-state/
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from library.data.bucket_order import BucketOrder
from library.files import read_json, whole_file
from library.options.kohya_training import NetworkOutputOptions
from library.training.checkpoints import Checkpoints
from library.training.state import save_state

Export = Callable[[int, str], tuple[dict[str, Any], dict[str, str]]]
"""(step, name of the file) -> (tensors, metadata) of the adapter as the parameters are now."""


@dataclass
class NetworkCheckpoints(Checkpoints):
    output: NetworkOutputOptions
    order: BucketOrder = field(kw_only=True)
    export: Export = field(kw_only=True)
    saved: list[Path] = field(default_factory=list, kw_only=True)
    """Adapter files of this run, oldest first."""

    @property
    def epochs_between(self) -> int | None:
        """Epochs between saves, by save_every_n_epochs or so that there are save_n_epoch_ratio of them."""
        if self.output.save_n_epoch_ratio is None:
            return self.output.save_every_n_epochs
        epochs = -(-self.plan.last_step // self.plan.steps_per_epoch)
        return max(1, epochs // self.output.save_n_epoch_ratio)

    def due(self, step: int, finished: bool) -> bool:
        return finished or bool(self._names(step, finished=False))

    def save(self, step: int, *, asked: bool = False) -> None:
        finished = step >= self.plan.last_step
        if self.processes.is_main:
            names = self._names(step, finished)
            for name in names:
                self._save_adapter(name, step)
            wants_state = self.output.save_state or (finished and self.output.save_state_on_train_end)
            for name in names if wants_state else ():
                self._save_state(name, step)
            if asked:
                self._save_state(self._step_name(step), step)
            self._prune(step)
        self.processes.wait()

    def describe(self, step: int) -> dict[str, Any]:
        return {
            **super().describe(step),
            "samples_seen": samples_seen(self.order, step),
            "output_name": self.output.output_name,
        }

    def _names(self, step: int, finished: bool) -> list[str]:
        """Of what is due after this many steps."""
        name, every = self.output.output_name, self.output.save_every_n_steps
        if finished or step >= self.plan.last_step:
            return [name]
        names = []
        epoch, rest = divmod(step, self.plan.steps_per_epoch)
        if self.epochs_between is not None and rest == 0 and epoch > 0 and epoch % self.epochs_between == 0:
            names.append(f"{name}-{epoch:06d}")
        if every is not None and step > 0 and step % every == 0:
            names.append(self._step_name(step))
        return names

    def _step_name(self, step: int) -> str:
        return f"{self.output.output_name}-step{step:08d}"

    def _save_adapter(self, name: str, step: int) -> None:
        """As trained, or the optimizer's own average; and where weights are averaged, that beside it."""
        path = self.output.output_dir / f"{name}.safetensors"
        with self.trained.optimizer_average():
            self._write(path, step)
        if self.trained.average is not None:
            with self.trained.judged():
                self._write(path.with_name(f"{name}-ema.safetensors"), step)
        self.saved.append(path)

    def _write(self, path: Path, step: int) -> None:
        tensors, metadata = self.export(step, path.stem)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        self.processes.say(f"saved {path}")

    def _save_state(self, name: str, step: int) -> None:
        start = time.perf_counter()
        folder = self.output.output_dir / f"{name}-state"
        save_state(folder, self.trained, self.describe(step))
        self.newest = folder
        self.processes.say(f"saved {folder} in {time.perf_counter() - start:.1f} s")

    def _prune(self, step: int) -> None:
        """Remove what save_last_n_* lets go, and never the newest state."""
        output, per_epoch = self.output, self.plan.steps_per_epoch
        epochs, steps = output.save_last_n_epochs, output.save_last_n_steps
        keep_epochs, keep_steps = output.save_last_n_epochs_state or epochs, output.save_last_n_steps_state or steps
        for path in output.output_dir.glob(f"{_escaped(output.output_name)}-*"):
            found = re.fullmatch(
                rf"{re.escape(output.output_name)}-(step)?(\d+)(-ema)?(-state|\.safetensors)", path.name
            )
            if found is None or path == self.newest:
                continue
            is_state, number = found[4] == "-state", int(found[2])
            if found[1]:
                keep = keep_steps if is_state else steps
                old = keep is not None and number < step - keep
            else:
                keep = keep_epochs if is_state else epochs
                between = self.epochs_between or 1
                old = keep is not None and number <= step // per_epoch - keep * between
            if old and is_state:
                shutil.rmtree(path)
            elif old:
                path.unlink()


def network_states(folder: Path, name: str) -> list[tuple[int, Path]]:
    """(step, folder) of every whole state of the run called `name`, oldest first."""
    found = []
    for path in folder.glob(f"{_escaped(name)}*-state"):
        if (
            re.fullmatch(rf"{re.escape(name)}(-\d{{6}}|-step\d{{8}})?-state", path.name)
            and (path / "state.json").is_file()
        ):
            found.append((int(read_json(path / "state.json").get("step", 0)), path))
    return sorted(found)


def samples_seen(order: BucketOrder, step: int) -> int:
    """Pictures shown in the first `step` steps, by all processes."""
    epoch = order.epoch_of(step)
    begun = range(epoch * order.steps_per_epoch, step)
    return epoch * order.samples_per_epoch + sum(order.step(one).samples for one in begun)


def in_epochs(
    output: NetworkOutputOptions, validate_every_n_epochs: int | None, steps_per_epoch: int
) -> NetworkOutputOptions:
    """The output options with validations counted in steps, which is how the loop counts."""
    if output.validate_every_n_steps is not None:
        return output
    return replace(output, validate_every_n_steps=(validate_every_n_epochs or 1) * steps_per_epoch)


def _escaped(name: str) -> str:
    """For glob: a name may have brackets."""
    return re.sub(r"([*?[])", r"[\1]", name)
