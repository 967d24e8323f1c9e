"""Which adapter files and states a LoRA training leaves, under kohya's names.

NAME-000002.safetensors         after epoch 2         NAME-000002-state/
NAME-step00000500.safetensors   after step 500        NAME-step00000500-state/
NAME.safetensors                at the end            NAME-state/
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from library.data.bucket_order import BucketOrder
from library.files import read_json, whole_file
from library.options.kohya_training import NetworkOutputOptions
from library.training.checkpoints import HARMLESS, Checkpoints
from library.training.plan import Plan
from library.training.state import read_facts, save_state

Export = Callable[[int, str, bool], tuple[dict[str, Any], dict[str, str]]]
"""(step, name of the file, whether the run ends there) -> (tensors, metadata) of the adapter as the parameters are now."""

# Options of this script that a resumed run may change without becoming another run.
HARMLESS_HERE = HARMLESS | frozenset(
    """
    config_file output_config ignore_unknown_keys cache_latents cache_latents_to_disk vae_batch_size
    cache_text_encoder_outputs_to_disk persistent_data_loader_workers disable_mmap_load_safetensors
    save_every_n_epochs save_n_epoch_ratio save_last_n_epochs save_last_n_steps save_last_n_epochs_state
    save_last_n_steps_state save_state save_state_on_train_end save_model_as save_precision validate_every_n_epochs
    max_validation_steps early_stop sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first
    sample_sampler log_with log_prefix log_tracker_name log_config no_metadata training_comment metadata_title
    metadata_author metadata_description metadata_license metadata_tags metadata_usage_hint metadata_thumbnail
    metadata_merged_from metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding
    initial_step initial_epoch skip_until_initial_step
    """.split()  # noqa: SIM905
)


@dataclass
class Patience:
    """Whether so many validations in a row brought no better loss: --early_stop."""

    limit: int
    say: Callable[[str], None]
    best: float | None = None
    waited: int = 0

    def __call__(self, results: Mapping[str, float]) -> bool:
        loss = results["val/loss"]
        if self.best is None or loss < self.best:
            self.best, self.waited = loss, 0
            return False
        self.waited += 1
        if self.waited < self.limit:
            return False
        self.say(f"early stop: {self.waited} validations without a better loss than {self.best:.4f}")
        return True


@dataclass
class NetworkCheckpoints(Checkpoints):
    output: NetworkOutputOptions
    order: BucketOrder = field(kw_only=True)
    export: Export = field(kw_only=True)
    patience: Patience | None = field(default=None, kw_only=True)

    @property
    def epochs_between(self) -> int | None:
        """Epochs between saves, by save_every_n_epochs or so that there are save_n_epoch_ratio of them."""
        if self.output.save_n_epoch_ratio is None:
            return self.output.save_every_n_epochs
        epochs = -(-self.plan.last_step // self.plan.steps_per_epoch)
        return max(1, epochs // self.output.save_n_epoch_ratio)

    def due(self, step: int, finished: bool) -> bool:
        return finished or bool(self._names(step, finished=False))

    def save(self, step: int, *, finished: bool = False, asked: bool = False) -> None:
        if self.processes.is_main:
            names = self._names(step, finished)
            for name in names:
                self._save_adapter(name, step, finished)
            wants_state = self.output.save_state or (finished and self.output.save_state_on_train_end)
            states = names if wants_state else []
            if asked and not states:
                states = [self._step_name(step)]
            for name in states:
                self._save_state(name, step, finished)
            if names and not finished:
                self._prune(step)
        self.processes.wait()

    def describe(self, step: int) -> dict[str, Any]:
        facts = {
            **super().describe(step),
            "samples_seen": samples_seen(self.order, step),
            "output_name": self.output.output_name,
            "last_step": self.plan.last_step,
        }
        if self.patience is not None:
            facts["patience"] = {"best": self.patience.best, "waited": self.patience.waited}
        return facts

    def resume(self, state: Path | None) -> int:
        step = super().resume(state)
        if state is not None and self.patience is not None:
            then = read_facts(state).get("patience", {})
            self.patience.best, self.patience.waited = then.get("best"), then.get("waited", 0)
        return step

    def _names(self, step: int, finished: bool) -> list[str]:
        """Of what is due after this many steps."""
        name, every = self.output.output_name, self.output.save_every_n_steps
        if finished:
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

    def _save_adapter(self, name: str, step: int, finished: bool) -> None:
        """As trained, or the optimizer's own average; and where weights are averaged, that beside it."""
        path = self.output.output_dir / f"{name}.safetensors"
        with self.trained.optimizer_average():
            self._write(path, step, finished)
        if self.trained.average is not None:
            with self.trained.judged():
                self._write(path.with_name(f"{name}-ema.safetensors"), step, finished)

    def _write(self, path: Path, step: int, finished: bool) -> None:
        tensors, metadata = self.export(step, path.stem, finished)
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        self.processes.say(f"saved {path}")

    def _save_state(self, name: str, step: int, finished: bool) -> None:
        start = time.perf_counter()
        folder = self.output.output_dir / f"{name}-state"
        save_state(folder, self.trained, {**self.describe(step), "finished": finished})
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


def is_early_end(facts: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a state is where --early_stop ended the run that `plan` describes."""
    return bool(facts.get("finished")) and facts.get("last_step") == plan.last_step


def samples_seen(order: BucketOrder, step: int) -> int:
    """Pictures shown in the first `step` steps, by all processes."""
    epoch = order.epoch_of(step)
    begun = range(epoch * order.steps_per_epoch, step)
    return epoch * order.samples_per_epoch + sum(order.step(one).samples for one in begun)


def validation_due(step: int, every_n_steps: int | None, every_n_epochs: int | None, steps_per_epoch: int) -> bool:
    """Whether to validate after so many steps: by steps, by epochs, by both; by neither, after each epoch."""
    if every_n_steps is not None and step % every_n_steps == 0:
        return True
    if every_n_epochs is None and every_n_steps is not None:
        return False
    return step % ((every_n_epochs or 1) * steps_per_epoch) == 0


def _escaped(name: str) -> str:
    """For glob: a name may have brackets."""
    return re.sub(r"([*?[])", r"[\1]", name)
