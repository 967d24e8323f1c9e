"""Which adapter files and states a run saves, when, under which names, and which of them it removes later.

train_repa.py                       train_network.py, under kohya's names
step_000500/         at step 500    NAME-000002.safetensors         after epoch 2    NAME-000002-state/
NAME.safetensors     at the end     NAME-step00000500.safetensors   after step 500   NAME-step00000500-state/
                                    NAME.safetensors                at the end       NAME-state/
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from library.files import read_json
from library.options.kohya.training import NetworkOutputOptions
from library.options.training import OutputOptions
from library.training.plan import Plan
from library.training.state import list_states, prune_states, state_name


class Saving(Protocol):
    """What is due after so many steps; `finished` where the run ends with them."""

    def states_there(self) -> list[tuple[int, Path]]:
        """(step, folder) of every whole state of this run, oldest first."""
        ...

    @staticmethod
    def part(component: str) -> str:
        """Stem of the file of a state that holds the adapters of a component."""
        ...

    def adapters(self, step: int, finished: bool, plan: Plan) -> list[str]:
        """Stems of the adapter files to write."""
        ...

    def states(self, step: int, finished: bool, asked: bool, plan: Plan) -> list[str]:
        """Names of the state folders to write. asked: the user asked for a state, whether or not one is due."""
        ...

    def prune(self, step: int, finished: bool, newest: Path | None, plan: Plan) -> None:
        """Remove what the options do not keep, and never the newest state."""
        ...


def saving_of(output: OutputOptions) -> Saving:
    return KohyaSaving(output) if isinstance(output, NetworkOutputOptions) else StepSaving(output)


@dataclass(frozen=True)
class StepSaving:
    """A state every so many steps, and the adapter at the end."""

    output: OutputOptions

    def states_there(self) -> list[tuple[int, Path]]:
        return list_states(self.output.output_dir)

    @staticmethod
    def part(component: str) -> str:
        return "lora"

    def adapters(self, step: int, finished: bool, plan: Plan) -> list[str]:
        return [self.output.output_name] if finished else []

    def states(self, step: int, finished: bool, asked: bool, plan: Plan) -> list[str]:
        every = self.output.save_every_n_steps
        due = finished or asked or (every is not None and step % every == 0)
        return [state_name(step)] if due else []

    def prune(self, step: int, finished: bool, newest: Path | None, plan: Plan) -> None:
        prune_states(self.output.output_dir, self.output.save_last_n_states)


@dataclass(frozen=True)
class KohyaSaving:
    """Adapters by epochs and steps, and states beside them where these are wanted."""

    output: NetworkOutputOptions

    def states_there(self) -> list[tuple[int, Path]]:
        name, found = self.output.output_name, []
        for path in self.output.output_dir.glob(f"{_escaped(name)}*-state"):
            named = re.fullmatch(rf"{re.escape(name)}(-\d{{6}}|-step\d{{8}})?-state", path.name)
            if named and (path / "state.json").is_file():
                found.append((int(read_json(path / "state.json").get("step", 0)), path))
        return sorted(found)

    @staticmethod
    def part(component: str) -> str:
        return f"lora_{component}"

    def adapters(self, step: int, finished: bool, plan: Plan) -> list[str]:
        name, every = self.output.output_name, self.output.save_every_n_steps
        names = []
        if every is not None and step > 0 and step % every == 0:
            names.append(self._step_name(step))
        if finished:
            return [*names, name]
        epoch, rest = divmod(step, plan.steps_per_epoch)
        between = self._epochs_between(plan)
        if between is not None and rest == 0 and epoch > 0 and epoch % between == 0:
            names.insert(0, f"{name}-{epoch:06d}")
        return names

    def states(self, step: int, finished: bool, asked: bool, plan: Plan) -> list[str]:
        names = self.adapters(step, finished, plan) if self.output.save_state else []
        if finished and not names and self.output.save_state_on_train_end:
            names = [self.output.output_name]
        if asked and not names:
            names = [self._step_name(step)]
        return [f"{name}-state" for name in names]

    def prune(self, step: int, finished: bool, newest: Path | None, plan: Plan) -> None:
        if self.adapters(step, finished, plan) in ([], [self.output.output_name]):
            return
        output = self.output
        epochs, steps = output.save_last_n_epochs, output.save_last_n_steps
        keep_epochs, keep_steps = output.save_last_n_epochs_state or epochs, output.save_last_n_steps_state or steps
        for path in output.output_dir.glob(f"{_escaped(output.output_name)}-*"):
            found = re.fullmatch(
                rf"{re.escape(output.output_name)}-(step)?(\d+)(-ema)?(-state|\.safetensors)", path.name
            )
            if found is None or path == newest:
                continue
            is_state, number = found[4] == "-state", int(found[2])
            if found[1]:
                keep = keep_steps if is_state else steps
                old = keep is not None and number < step - keep
            else:
                keep = keep_epochs if is_state else epochs
                between = self._epochs_between(plan) or 1
                # As in kohya, the last epoch saves under the run's name and removes nothing.
                old = keep is not None and not finished and number <= step // plan.steps_per_epoch - keep * between
            if old and is_state:
                shutil.rmtree(path)
            elif old:
                path.unlink()

    def _step_name(self, step: int) -> str:
        return f"{self.output.output_name}-step{step:08d}"

    def _epochs_between(self, plan: Plan) -> int | None:
        """Epochs between saves, by save_every_n_epochs or so that there are save_n_epoch_ratio of them."""
        if self.output.save_n_epoch_ratio is None:
            return self.output.save_every_n_epochs
        epochs = -(-plan.last_step // plan.steps_per_epoch)
        return max(1, epochs // self.output.save_n_epoch_ratio)


def _escaped(name: str) -> str:
    """For glob: a name may have brackets."""
    return re.sub(r"([*?[])", r"[\1]", name)
