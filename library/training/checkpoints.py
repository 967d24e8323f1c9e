"""The adapters and states that a run saves, and the state that it resumes from."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from library.data.order import BatchOrder
from library.files import whole_file
from library.options.training import OutputOptions
from library.processes import Processes
from library.training.plan import Plan
from library.training.saving import saving_of
from library.training.state import Trained, load_state, read_facts, save_state
from library.training.trained_pictures import Marks, changed_pictures, read_marks, write_marks

Export = Callable[[int, str, bool], tuple[dict[str, Any], dict[str, str]]]
"""(step, name of the file, whether the run ends there) -> (tensors, metadata) of the adapter as the parameters are now."""

# Facts of a state that a resumed run must share, and what a user calls them.
SAMPLES = "the training samples or their classes"
WHAT = {
    "samples": SAMPLES,
    "base_weights": "the weights of the base model",
    "caches": "what the caches were made with",
}


class Memory(Protocol):
    """What a run has to know to go on exactly and is no tensor: as plain JSON types."""

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Checkpoints:
    """Saves adapters and states of a run, when and where `saving` says."""

    output: OutputOptions
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    plan: Plan
    trained: Trained
    processes: Processes
    order: BatchOrder
    export: Export
    memories: Mapping[str, Memory] = field(default_factory=dict)
    """What else the run remembers, by the name it has in state.json."""
    pictures: Marks = field(default_factory=dict)
    newest: Path | None = None
    written: set[str] = field(default_factory=set)
    """Names of the files and states that this run wrote, this time or before, and that it may remove."""
    begun: float = field(default_factory=time.time)
    """When the run began, by which its states are told from those of a run before it; seconds since 1970."""

    def __post_init__(self) -> None:
        self.saving = saving_of(self.output)
        self._pictures = write_marks(self.pictures)

    def due(self, step: int, finished: bool) -> bool:
        """Whether something is to be saved after this many steps."""
        saving = self.saving
        return bool(saving.adapters(step, finished, self.plan) or saving.states(step, finished, False, self.plan))

    def save(self, step: int, *, finished: bool = False, asked: bool = False) -> None:
        """Save what is due once, by the main process: every process holds the same state.

        finished: the run ends with this step. asked: the user asked for a state, whether or not one is due.
        """
        adapters = self.saving.adapters(step, finished, self.plan)
        states = self.saving.states(step, finished, asked, self.plan)
        if self.processes.is_main:
            for name in adapters:
                self._save_adapter(name, step, finished)
            self.written.update(states)
            for name in states:
                self._save_state(self.output.output_dir / name, step, finished)
        self.newest = self.output.output_dir / states[-1] if states else self.newest
        if self.processes.is_main:
            try:
                self.saving.prune(step, finished, self.newest, self.plan, self.written)
            except OSError as error:
                self.processes.say(
                    f"warning: {error.filename} is no longer to be kept and cannot be removed: {error.strerror}"
                )
        self.processes.wait()

    def describe(self, step: int, finished: bool = False) -> dict[str, Any]:
        facts = {
            "step": step,
            "samples_seen": self.order.samples_seen(step),
            "epoch": step / self.plan.steps_per_epoch,
            "last_step": self.plan.last_step,
            "output_name": self.output.output_name,
            "begun": self.begun,
            # Without those about to be removed, whose names somebody else may use later.
            "written": sorted(self.written.difference(self.saving.outdated(step, finished, self.written, self.plan))),
            "finished": finished,
            "world_size": self.plan.world_size,
            **self.facts,
            "options": dict(self.options),
            "versions": versions(),
        }
        return facts | {name: memory.state() for name, memory in self.memories.items()}

    def _save_state(self, folder: Path, step: int, finished: bool) -> None:
        start = time.perf_counter()
        save_state(folder, self.trained, self.describe(step, finished), self._pictures)
        self.processes.say(f"saved {folder} in {time.perf_counter() - start:.1f} s")

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
        self.written.add(path.name)
        self.processes.say(f"saved {path}")

    def changes(self, state: Path) -> list[str]:
        return changes_since(state, self.pictures, {name: self.facts.get(name) for name in WHAT})

    def resume(self, state: Path) -> int:
        """Load a state found by `state_to_resume`; return the step to go on from."""
        then = read_facts(state)
        other = [f"{name} {then['versions'].get(name)} then, {now} now" for name, now in versions().items()
                 if then["versions"].get(name) != now]  # fmt: skip
        if other:
            self.processes.say(f"warning: other versions may compute other bits: {'; '.join(other)}")
        facts = load_state(state, self.trained)
        self.newest, self.begun = state, facts.get("begun", 0.0)
        if state.resolve().parent == self.output.output_dir.resolve():
            self.written = set(facts.get("written", ()))
        for name, memory in self.memories.items():
            if name in facts:  # a state may be older than the option
                memory.load(facts[name])
        return int(facts["step"])


def changes_since(state: Path, pictures: Marks, facts: Mapping[str, Any]) -> list[str]:
    """What a run that goes on from `state` must share with it and does not, in words. facts: those of WHAT that are known."""
    then = read_facts(state)
    changes = [WHAT[name] for name in WHAT if name in then and name in facts and then[name] != facts[name]]
    if named := changed_pictures(read_marks(state), pictures):
        return [f"{SAMPLES} changed: {named}", *(f"{what} changed" for what in changes if what != SAMPLES)]
    return [f"{what} changed" for what in changes]


def versions() -> dict[str, str]:
    """Library versions that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def is_early_end(facts: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a state is where --early_stop ended the run that `plan` describes."""
    return bool(facts.get("finished")) and facts.get("last_step") == plan.last_step
