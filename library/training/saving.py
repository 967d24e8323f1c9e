"""Which adapter files and states a run saves, when, under which names, and which of them it removes later.

train_repa.py                       train_network.py, under kohya's names
step_000500/         at step 500    NAME-000002.safetensors         after epoch 2    NAME-000002-state/
NAME.safetensors     at the end     NAME-step00000500.safetensors   after step 500   NAME-step00000500-state/
                                    NAME.safetensors                at the end       NAME-state/
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from library.files import read_json
from library.options.kohya.training import NetworkOutputOptions
from library.options.training import OutputOptions
from library.training.plan import Plan

# Counts as they stand in names: six digits, eight of steps, and more only where a count needs more.
_SIX, _EIGHT = "([0-9]{6}|[1-9][0-9]{6,})", "([0-9]{8}|[1-9][0-9]{8,})"


class Saving(Protocol):
    """What is due after so many steps; `finished` where the run ends with them."""

    def states_there(self) -> list[Path]:
        """The whole states that lie under names of this run, oldest run first, and of each the oldest step first."""
        ...

    def adapters_there(self) -> list[Path]:
        """The adapter files that lie under names that this run may write."""
        ...

    def longest_name(self, averaged: bool) -> str:
        """Of all names that the run may give to a file or state. averaged: whether weights are averaged."""
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

    def outdated(self, step: int, finished: bool, names: Collection[str], plan: Plan) -> list[str]:
        """Those of the names that the options do not keep; no other name than this run writes is among them."""
        ...

    def prune(
        self, step: int, finished: bool, newest: Path | None, plan: Plan, written: set[str] | None = None
    ) -> None:
        """Remove what the options do not keep, and never the newest state. written: all that the run may remove, kept up to date;
        None is whatever lies there under its names. Raises OSError."""
        ...


def sample_name(name: str, place: str, number: int, seed: int) -> str:
    """Of a picture drawn while training: NAME_e000002_00_20260102030405_42.png after an epoch, NAME_000500_... else."""
    return f"{name}_{place}_{number:02d}_{datetime.now():%Y%m%d%H%M%S}_{seed}.png"


def saving_of(output: OutputOptions) -> Saving:
    return KohyaSaving(output) if isinstance(output, NetworkOutputOptions) else StepSaving(output)


class _Pruning:
    output: OutputOptions

    def outdated(self, step: int, finished: bool, names: Collection[str], plan: Plan) -> list[str]:
        raise NotImplementedError

    def prune(
        self, step: int, finished: bool, newest: Path | None, plan: Plan, written: set[str] | None = None
    ) -> None:
        folder = self.output.output_dir
        names = {path.name for path in folder.iterdir()} if written is None else written
        for name in self.outdated(step, finished, names, plan):
            path = folder / name
            if path == newest:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            names.discard(name)


@dataclass(frozen=True)
class StepSaving(_Pruning):
    """A state every so many steps, and the adapter at the end."""

    output: OutputOptions

    def states_there(self) -> list[Path]:
        return _by_run([path for _, path in list_states(self.output.output_dir)])

    def adapters_there(self) -> list[Path]:
        name, folder = self.output.output_name, self.output.output_dir
        return [path for ema in ("", "-ema") if (path := folder / f"{name}{ema}.safetensors").exists()]

    def longest_name(self, averaged: bool) -> str:
        return max(state_name(0), f"{self.output.output_name}{'-ema' * averaged}.safetensors", key=_bytes)

    @staticmethod
    def part(component: str) -> str:
        return "lora"

    def adapters(self, step: int, finished: bool, plan: Plan) -> list[str]:
        return [self.output.output_name] if finished else []

    def states(self, step: int, finished: bool, asked: bool, plan: Plan) -> list[str]:
        every = self.output.save_every_n_steps
        due = finished or asked or (every is not None and step % every == 0)
        return [state_name(step)] if due else []

    def outdated(self, step: int, finished: bool, names: Collection[str], plan: Plan) -> list[str]:
        keep = self.output.save_last_n_states
        states = sorted((name for name in names if _STATE.fullmatch(name)), key=lambda name: (len(name), name))
        return [] if keep is None else states[:-keep]


@dataclass(frozen=True)
class KohyaSaving(_Pruning):
    """Adapters by epochs and steps, and states beside them where these are wanted."""

    output: NetworkOutputOptions

    def states_there(self) -> list[Path]:
        name, states = self.output.output_name, []
        for path in self.output.output_dir.glob(f"{_escaped(name)}*-state"):
            # The end of a run named NAME-000001 looks like an epoch of NAME.
            if self._own(path.name) and _is_state(path) and _facts(path).get("output_name", name) == name:
                states.append(path)
        return _by_run(states)

    def adapters_there(self) -> list[Path]:
        output = self.output
        may = {
            "": True,
            "epoch": output.save_every_n_epochs or output.save_n_epoch_ratio,
            "step": output.save_every_n_steps,
        }
        found = sorted(output.output_dir.glob(f"{_escaped(output.output_name)}*.safetensors"))
        return [path for path in found if (own := self._own(path.name)) is not None and may[own.counts]]

    def longest_name(self, averaged: bool) -> str:
        output, ending = self.output, f"{'-ema' * averaged}.safetensors"
        names = [f"{output.output_name}{ending}", f"{self._step_name(0)}-state"]  # a state where it is interrupted
        if output.save_every_n_epochs or output.save_n_epoch_ratio:
            names.append(f"{output.output_name}-{0:06d}{ending}")
        if output.save_every_n_steps:
            names.append(f"{self._step_name(0)}{ending}")
        return max(names, key=_bytes)

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

    def outdated(self, step: int, finished: bool, names: Collection[str], plan: Plan) -> list[str]:
        if self.adapters(step, finished, plan) in ([], [self.output.output_name]):
            return []
        output = self.output
        epochs, steps = output.save_last_n_epochs, output.save_last_n_steps
        keep_epochs, keep_steps = output.save_last_n_epochs_state or epochs, output.save_last_n_steps_state or steps
        epoch, between = step // plan.steps_per_epoch, self._epochs_between(plan) or 1
        outdated = []
        for name in sorted(names):
            own = self._own(name)
            if own is None or own.counts == "":
                continue
            if own.counts == "step":
                keep = keep_steps if own.is_state else steps
                old = keep is not None and own.number < step - keep
            else:
                keep = keep_epochs if own.is_state else epochs
                # As in kohya, the last epoch saves under the run's name and removes nothing.
                old = keep is not None and not finished and own.number <= epoch - keep * between
            if old:
                outdated.append(name)
        return outdated

    def _own(self, file: str) -> _Own | None:
        """What the name of a file or state says, if it is one that this run may write."""
        pattern = f"{re.escape(self.output.output_name)}(?:-{_SIX}|-step{_EIGHT})?(-state|(?:-ema)?\\.safetensors)"
        found = re.fullmatch(pattern, file)
        if found is None:
            return None
        counts = "epoch" if found[1] else "step" if found[2] else ""
        return _Own(counts, int(found[1] or found[2] or 0), found[3] == "-state")

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


@dataclass(frozen=True)
class _Own:
    """counts: what the number is of, "epoch" or "step"; "" at the end of a run."""

    counts: str
    number: int
    is_state: bool


_STATE = re.compile(f"step_{_SIX}")


def state_name(step: int) -> str:
    return f"step_{step:06d}"


def list_states(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole state of train_repa.py, oldest first."""
    states = [path for path in folder.glob("step_*") if _STATE.fullmatch(path.name) and _is_state(path)]
    return sorted((int(path.name[5:]), path) for path in states)


def _is_state(path: Path) -> bool:
    return (path / "state.json").is_file()


def _facts(state: Path) -> dict[str, Any]:
    return read_json(state / "state.json")


def _by_run(states: list[Path]) -> list[Path]:
    """A run that was begun anew in the folder of another is the later one, at whatever step."""

    def age(state: Path) -> tuple[float, int]:
        facts = _facts(state)
        return facts.get("begun", 0.0), facts.get("step", 0)

    return sorted(states, key=age)


def _bytes(name: str) -> int:
    return len(os.fsencode(name))
