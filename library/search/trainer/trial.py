"""One trial: a training of the project's own engine that is judged at each tenth and keeps the adapter of the best tenth.

trial_0007/params.json                      options of the trial, under the script's names
           config.toml                      the same with what the trial adds: the script's --config_file
           lora_trial_7.safetensors         adapter of the best slot
           realtime_evaluations/slot_03.json
           logs/                            metrics.jsonl, options.toml, TensorBoard, trainer.log
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from library.errors import Stopped
from library.files import write_json, write_text
from library.search.messages import SLOTS, Job, Slot
from library.search.terms import DECIDED_BY_TRIALS
from library.search.trainer.judge_by_loss import Judge, Measured
from library.search.trial_files import EVALUATIONS, LOGS, PARAMS_FILE, adapter_file, adapter_name
from library.training.checkpoints import Checkpoints
from library.training.loop import Run, train
from library.training.loop_interfaces import Batches

CONFIG_FILE = "config.toml"

SEEDED = frozenset({"seed", "output_dir", "output_name", "logging_dir"})
"""Options that every trial sets itself, without a word about it."""


class Parent(Protocol):
    """The process that a trial reports to."""

    def slot(self, slot: Slot, *, last: bool) -> bool:
        """Report a value; whether to go on. The last slot is not answered."""
        ...

    def alive(self, step: int, images_per_second: float) -> None:
        """Called after each step; reports now and then. Raises Stopped where the trial was told to stop."""
        ...


@dataclass
class Training:
    """A run that is ready to begin.

    export: tensors and metadata of the adapter as the parameters are, on the CPU. options: all of them, flat.
    """

    run: Run
    judge: Judge
    export: Callable[[int], tuple[dict[str, Tensor], dict[str, str]]]
    options: Mapping[str, Any]


class NoStates(Checkpoints):
    """Saves nothing: a trial keeps the adapter of its best slot, and is trained again where it was interrupted."""

    def due(self, step: int, finished: bool) -> bool:
        return False

    def save(self, step: int, *, finished: bool = False, asked: bool = False) -> None:
        pass


@dataclass
class Best:
    """The best slot so far, and the adapter it was measured with."""

    slot: int
    measured: Measured
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass
class Trial:
    """Judges a run at its slots; goes into the loop as `Run.look`."""

    job: Job
    training: Training
    parent: Parent
    best: Best | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)
    _step: int = field(default=0, init=False)
    _speed: float = field(default=0.0, init=False)

    @property
    def folder(self) -> Path:
        return Path(self.job.folder)

    @property
    def last_step(self) -> int:
        return self.training.run.plan.last_step

    def train(self) -> None:
        """Train to the end. Raises Stopped, Diverged and any other error; `best` is then the best slot so far."""
        from library.training.output import open_log

        run, opened = self.training.run, list[Batches]()
        batches = run.batches

        def watched(step: int) -> Batches:
            opened.append(batches(step))
            return opened[-1]

        kept = run.checkpoints
        run.checkpoints = NoStates(**{field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)})
        run.batches, run.look, run.validates, run.enough = watched, self, False, None
        logs = self.folder / LOGS
        run.log = open_log(logs, logs / "tensorboard", self.training.options, 0, {})
        average = run.trained.average
        if average is not None and (note := horizon_note(average.decay, self.last_step)):
            run.processes.say(note)
        try:
            train(run, 0)
        finally:
            run.log.close()
            for one in opened:
                one.close()

    def due(self, step: int, finished: bool) -> bool:
        return True  # the parent hears of every step

    def __call__(self, step: int, finished: bool) -> None:
        self.parent.alive(step, self._measured_speed(step))
        if step == 0:
            self._begin_slot(step)
            return
        reached = slots_after(step, self.last_step)
        if due := [slot for slot in reached if slot in self.training.judge.slots]:
            self._measure(due[-1], step, finished)
        if reached:
            self._begin_slot(step)

    def _measure(self, slot: int, step: int, finished: bool) -> None:
        speed, run = self._measured_speed(step), self.training.run
        with run.trained.judged():
            measured = self.training.judge(slot)
            if self.best is None or measured.rank < self.best.measured.rank:
                tensors, metadata = self.training.export(step)
                # Copies, whatever an export gives: on the CPU it may be the very weights that go on learning.
                copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
                self.best = Best(slot, measured, copies, metadata)
        found = Slot(self.job.trial, slot, step, measured.value, measured.components, speed)
        write_json(
            self.folder / EVALUATIONS / f"slot_{slot:02d}.json", {**dataclasses.asdict(found), **measured.details}
        )
        if run.log is not None:
            parts = {f"objective/{name}": value for name, value in measured.components.items()}
            run.log.add(step, {"objective/value": measured.value, **parts})
        run.processes.say(f"slot {slot}: {measured.value:.5f}")
        if not self.parent.slot(found, last=finished) and not finished:
            raise Stopped(f"Stopped at step {step} of {self.last_step}, slot {slot}, by the study.")

    def save_best(self) -> Path | None:
        """Write the best slot's adapter; None where no slot was reached."""
        if self.best is None:
            return None
        from library.files import whole_file

        path = adapter_file(self.folder, self.job.trial)
        with whole_file(path) as temporary:
            save_file(self.best.tensors, temporary, metadata=self.best.metadata)
        return path

    def _begin_slot(self, step: int) -> None:
        self._since, self._step = time.perf_counter(), step

    def _measured_speed(self, step: int) -> float:
        """Pictures per second in this slot, without what measuring took."""
        if step > self._step:
            seconds = max(time.perf_counter() - self._since, 1e-9)
            self._speed = (step - self._step) * self.training.run.plan.samples_per_step / seconds
        return self._speed


def slots_after(step: int, last_step: int) -> range:
    """The slots, counted from 1, that end with optimizer step `step`: one, none, or several in a short training."""
    return range((step - 1) * SLOTS // last_step + 1, step * SLOTS // last_step + 1) if step > 0 else range(0)


def horizon_note(decay: float, steps: int) -> str | None:
    """A warning where an average of the weights hardly moves in so few steps; trials are judged by the average."""
    if decay <= 0 or steps >= 2 / (1 - decay):
        return None
    share = 1 - math.exp(steps * math.log(decay))
    return (
        f"warning: ema_decay {decay:g} averages over {1 / (1 - decay):.0f} steps, and the trial has {steps}: the average, by "
        f"which it is judged, goes {share:.0%} of the way. Lower ema_decay, or set it to 0."
    )


def write_files(job: Job, say: Callable[[str], None]) -> Path:
    """Write the --config_file of the trial and return its path; write params.json where the parent has not.

    Options that a trial decides itself are left out, with a message.
    """
    import toml

    folder = Path(job.folder)
    # Of an attempt that was interrupted.
    shutil.rmtree(folder / EVALUATIONS, ignore_errors=True)
    adapter_file(folder, job.trial).unlink(missing_ok=True)
    params = {name: value for name, value in job.options.items() if name not in SEEDED}
    if not (folder / PARAMS_FILE).exists():
        write_json(folder / PARAMS_FILE, params)
    useless = [name for name, value in params.items() if name in DECIDED_BY_TRIALS and value not in (None, False, "")]
    if useless:
        say(f"{', '.join(useless)}: ignored, because a trial keeps the adapter of its best slot and nothing else.")
    given = {name: value for name, value in job.options.items() if name not in DECIDED_BY_TRIALS and value is not None}
    own = {
        "seed": job.seed,
        "output_dir": str(folder),
        "output_name": adapter_name(job.trial),
        "logging_dir": str(folder / LOGS / "tensorboard"),
    }
    write_text(folder / CONFIG_FILE, toml.dumps({**given, **own}))
    return folder / CONFIG_FILE
