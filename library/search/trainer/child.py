"""The process that trains the trials of a study, one after the other, and keeps the base and the caches between them.

    python -m library.search.trainer.child        started by `library.search.trainer.parent_side`, not by people

It reads jobs from stdin and writes events to the descriptor that was stdout; what libraries print goes to the log of the trial.
It ends at once when its parent dies, and after a trial that may have left it in a bad state.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from library.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    Diverged,
    RunFailed,
    Stopped,
    UserError,
)
from library.quiet import quiet_libraries
from library.search.messages import (
    Begun,
    Ending,
    Job,
    Outcome,
    Progress,
    Slot,
    from_line,
    read_as,
    to_line,
    write_outcome,
)
from library.search.trial_files import LOGS, TRAINER_LOG

PARENT_VARIABLE = "SEARCH_PARENT"
"""Environment variable with the process id of the parent."""
BEAT_SECONDS = 2.0
_KEEPS_WARM: tuple[Ending, ...] = ("done", "stopped", "diverged", "refused")
_EXIT_CODES: dict[Ending, int] = {"memory": EXIT_OUT_OF_MEMORY, "failed": EXIT_FAILED, "stopped": EXIT_STOPPED}
# Messages of errors that are out of memory although their class does not say so: the CPU's allocator, CUDA's libraries.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory", "STATUS_ALLOC_FAILED")
_SIGNALLED = "by SIGTERM."  # the end of the training loop's message
_PR_SET_PDEATHSIG = 1


class Wire:
    """The connection to the parent. Its own thread reads, so that it notices the parent's end during a training too."""

    def __init__(self, jobs: BinaryIO, events: int) -> None:
        self._events = events
        self._writing = threading.Lock()
        self.jobs: queue.Queue[Job] = queue.Queue()
        self._answers: queue.Queue[tuple[int, bool]] = queue.Queue()
        self._trial = self._stopped = -1
        self.place: Literal["idle", "preparing", "training", "finishing"] = "idle"
        self.signalled = False
        self._told = 0.0
        threading.Thread(target=self._read, args=(jobs,), name="wire", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def send(self, kind: str, message: Any = None) -> None:
        line = to_line(kind, message)
        try:
            with self._writing:
                while line:
                    line = line[os.write(self._events, line) :]
        except OSError:  # the parent is gone
            end_with_group()

    def begin(self, trial: int) -> None:
        """A trial is being prepared: until `begun`, a thread sends that this process is alive."""
        self._trial, self.place = trial, "preparing"

    def begun(self, steps: int) -> None:
        self.place = "training"
        self.send("begun", Begun(self._trial, steps))

    def finishing(self) -> None:
        """The training has ended, and its results are being written."""
        self.place = "finishing"

    def ended(self, outcome: Outcome) -> None:
        self.place = "idle"
        self.send("ended", outcome)

    def on_sigterm(self, number: int, frame: Any) -> None:
        """SIGTERM outside of a training, which handles it itself: end, but only after results are written."""
        self.signalled = True
        if self.place == "idle":
            os._exit(EXIT_STOPPED)
        if self.place == "preparing":
            raise Stopped("Stopped by SIGTERM before it started.")

    def slot(self, slot: Slot, *, last: bool) -> bool:
        """See `library.search.trainer.trial.Parent`."""
        self.send("slot", slot)
        while not last:
            trial, goes_on = self._answers.get()
            if trial == slot.trial:
                return goes_on
        return True

    def alive(self, step: int, images_per_second: float) -> None:
        """See `library.search.trainer.trial.Parent`."""
        if self._stopped == self._trial or self.signalled:
            raise Stopped(f"Stopped at step {step} by the study.")
        if time.monotonic() - self._told >= BEAT_SECONDS:
            self._told = time.monotonic()
            self.send("alive", Progress(self._trial, step, images_per_second))

    def _read(self, jobs: BinaryIO) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in jobs:
                self._take(from_line(line) or {})
        end_with_group()

    def _take(self, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "job":
            # Answers to an earlier attempt at the same trial are not for this one.
            self._stopped, self._answers = -1, queue.Queue()
            self.jobs.put(read_as(Job, message))
        elif kind == "go":
            self._answers.put((message["trial"], True))
        elif kind == "stop":
            self._stopped = message["trial"]
            self._answers.put((message["trial"], False))

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            # Another child of a dead parent may still hold stdin open.
            if not parent_lives():
                end_with_group()
            if self.place == "preparing":
                self.send("alive", Progress(self._trial, 0))


def main() -> int:
    os.environ.setdefault(PARENT_VARIABLE, str(os.getppid()))
    die_with_parent()
    wire = Wire(*private_descriptors())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, wire.on_sigterm)
    faulthandler.enable()
    quiet_libraries()
    # Imports torch, diffusers and the rest, which takes seconds, before the first job needs them.
    import library.search.trainer.build  # noqa: F401
    from library.search.trainer.kept_models import KeptModels

    gc.collect()
    gc.freeze()  # imported objects stay, so the collector need not visit them after every trial
    warm = KeptModels()
    wire.send("ready")
    while True:
        job = wire.jobs.get()
        with logged(Path(job.folder)):
            outcome = work(job, warm, wire)
            fit = outcome.ending in _KEEPS_WARM and left_in_order(warm)
        signalled = wire.signalled or outcome.message.endswith(_SIGNALLED)
        wire.ended(outcome)
        if not fit or signalled:
            # Not sys.exit: after a failure, destructors may hang.
            sys.stderr.flush()
            os._exit(_EXIT_CODES.get(outcome.ending, EXIT_OK))


def private_descriptors() -> tuple[BinaryIO, int]:
    """Stdin and stdout under other descriptors, which no library uses; in their places are an empty file and stderr.

    Not sys.stdin: a process forked while a thread reads from it would wait for that thread for ever.
    """
    jobs = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    events = os.dup(sys.stdout.fileno())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return jobs, events


def work(job: Job, warm: Any, wire: Wire) -> Outcome:
    """Train a trial. Any error becomes its outcome, which is also written into its folder."""
    import torch

    from library.search.trainer.build import script_training
    from library.search.trainer.trial import Trial, write_files

    started = time.perf_counter()
    torch.use_deterministic_algorithms(False)  # a run with --deterministic turns them on, and no run turns them off
    trial: Trial | None = None
    ending: Ending = "done"
    message, file = "", None
    wire.begin(job.trial)
    try:
        with ExitStack() as context:
            training = script_training(job, write_files(job, print), warm, context)
            trial = Trial(job, training, wire)
            wire.begun(trial.last_step)
            trial.train()
    except BaseException as error:
        ending, message = ending_of(error)
        if ending in ("failed", "memory"):
            traceback.print_exc()
        else:
            print(message)
    wire.finishing()
    if trial is not None:
        try:
            file = trial.save_best()
        except UserError as error:
            ending, message = "failed", str(error)
    best = trial.best if trial is not None else None
    outcome = Outcome(
        job.trial,
        ending,
        message,
        None if best is None else best.measured.value,
        None if best is None else best.slot,
        {} if best is None else best.measured.components,
        None if file is None else str(file.resolve()),
        time.perf_counter() - started,
    )
    with contextlib.suppress(UserError):  # the parent gets the outcome even where the disk is full
        write_outcome(job.folder, outcome)
    return outcome


def ending_of(error: BaseException) -> tuple[Ending, str]:
    """How an exception ends a trial, and a sentence about it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Stopped | KeyboardInterrupt):
        # The loop's advice is about resuming, which a trial cannot.
        return "stopped", text.partition(" Run the same command")[0]
    if isinstance(error, Diverged):
        return "diverged", text
    if isinstance(error, RunFailed):
        return "failed", text
    if isinstance(error, UserError):
        return "refused", text
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory", f"Out of memory: {first}"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
        return "memory", f"Out of memory: {first}"
    return "failed", f"{type(error).__name__}: {first}"


def left_in_order(warm: Any) -> bool:
    """Free what the trial used; whether the weights that the next trial shares with it are unchanged."""
    warm.tidy()
    if warm.intact():
        return True
    print("warning: this trial changed frozen weights; the next one loads them again, in a new process.")
    return False


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Within the context, everything that is printed goes to the trial's log."""
    kept = [(stream, os.dup(stream.fileno())) for stream in (sys.stdout, sys.stderr)]
    try:
        try:
            (folder / LOGS).mkdir(parents=True, exist_ok=True)
            log = os.open(folder / LOGS / TRAINER_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            print(f"warning: no log in {folder}: {error.strerror}", file=sys.stderr)
        else:
            for stream, _ in kept:
                os.dup2(log, stream.fileno())
            os.close(log)
        yield
    finally:
        for stream, copy in kept:
            stream.flush()
            os.dup2(copy, stream.fileno())
            os.close(copy)


def die_with_parent() -> None:
    """Ask the kernel, on Linux, to end this process with its parent, even while a call hangs."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not parent_lives():  # it died before the kernel was asked
        end_with_group()


def parent_lives() -> bool:
    """Whether the parent lives. On Windows that is not known from its number, and the end of stdin has to do."""
    return os.name != "posix" or str(os.getppid()) == os.environ[PARENT_VARIABLE]


def end_with_group() -> None:
    """End this process now, with every process that it started."""
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(EXIT_STOPPED)


if __name__ == "__main__":
    if len(sys.argv) > 1 or sys.stdin is None or sys.stdin.isatty():
        print(__doc__, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(main())
