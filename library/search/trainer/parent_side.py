"""The parent's side of a trainer: starts the process, gives it trials, and has an outcome for each, however it ends.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from library.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_OUT_OF_MEMORY, EXIT_STOPPED
from library.options.toml_file import PROJECT_ROOT
from library.search.messages import (
    OUTCOME_FILE,
    Begun,
    Ending,
    Job,
    Outcome,
    Progress,
    Slot,
    from_line,
    read_as,
    read_outcome,
    to_line,
)
from library.search.trainer.child import PARENT_VARIABLE
from library.search.trial_files import LOGS, TRAINER_LOG

GRACE_SECONDS = 30.0
SILENT_SECONDS = 1800.0
"""A trainer sends every few seconds that it is alive. One that is silent for so long hangs."""
TICK_SECONDS = 0.2
_ENDINGS: dict[int, Ending] = {
    EXIT_BAD_INPUT: "refused",
    EXIT_STOPPED: "stopped",
    EXIT_DIVERGED: "diverged",
    EXIT_OUT_OF_MEMORY: "memory",
}
_END = None


class TrainerProcess:
    """A trainer: its process is started with the first trial, and again after it has failed.

    Args:
        env: added to this process's environment, such as CUDA_VISIBLE_DEVICES.
        log: file for its output between trials; during a trial the output goes to the trial's own log.
        silent: seconds without a message after which it is killed.
    """

    def __init__(self, env: Mapping[str, str], log: Path | str, *, silent: float = SILENT_SECONDS) -> None:
        self.env, self.log, self.silent = dict(env), Path(log), silent
        self.process: subprocess.Popen[bytes] | None = None
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stop_at: float | None = None

    def run(
        self,
        job: Job,
        on_slot: Callable[[Slot], bool],
        *,
        on_begun: Callable[[Begun], None] = lambda begun: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Train a trial and return its outcome, also where the process dies, hangs or is stopped.

        Args:
            on_slot: called at each slot; returns whether to go on. Not called again after it returned False.
            on_tick: called about every TICK_SECONDS while no message comes.

        Raises only what the callbacks raise.
        """
        started = time.monotonic()
        if self._stop_at is not None:
            return Outcome(job.trial, "stopped", "Stopped before it started.")
        killed_before = memory_kills()
        with suppress(OSError):
            (Path(job.folder) / OUTCOME_FILE).unlink()  # of an earlier attempt
        try:
            self._ensure()
            self._send(to_line("job", job))
            outcome = self._follow(job, on_slot, on_begun, on_progress, on_tick)
        except OSError as error:
            outcome = Outcome(job.trial, "failed", f"The trainer could not be started: {error.strerror or error}.")
        except BaseException:
            self.kill()  # nobody waits for its trial any more
            raise
        if outcome is None:
            outcome = self._of_dead(job, killed_before, time.monotonic() - started)
        if outcome.ending in ("failed", "memory"):
            self.kill()
        return outcome

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Stop the trainer for good: SIGTERM to all of its processes, SIGKILL after `grace` seconds.

        Returns at once, and may be called from a signal handler or another thread; a `run` in progress does the rest and
        returns. Any later `run` returns without training.
        """
        if self._stop_at is None:
            self._stop_at = time.monotonic() + grace
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process now, with every process that it started."""
        self._signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process = self.process
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            self.process = None

    def close(self, grace: float = 5.0) -> None:
        """End the process: an idle one ends at once when its input ends."""
        process = self.process
        if process is not None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        self.kill()

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ the process

    def _ensure(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.kill()
        self._events = queue.Queue()
        begun: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()
        # The kernel kills the trainer when the thread that started it ends, so that thread must live as long as the trainer.
        threading.Thread(target=self._start_and_read, args=(self._events, begun), name="trainer", daemon=True).start()
        found = begun.get()
        if isinstance(found, OSError):
            raise found
        self.process = found
        if self._stop_at is not None:  # `stop` was called while it was being started
            self._signal(signal.SIGTERM)

    def _start_and_read(
        self,
        events: queue.Queue[dict[str, Any] | None],
        begun: queue.Queue[subprocess.Popen[bytes] | OSError],
    ) -> None:
        try:
            process = self._start()
        except OSError as error:
            begun.put(error)
            return
        begun.put(process)
        assert process.stdout is not None
        with suppress(OSError, ValueError):
            for line in process.stdout:
                if (message := from_line(line)) is not None:
                    events.put(message)
        process.wait()
        events.put(_END)

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            **self.env,
            "PYTHONPATH": os.pathsep.join(paths),
            PARENT_VARIABLE: str(os.getpid()),
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "library.search.trainer.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _signal(self, number: int) -> None:
        """Send a signal to the trainer and all that it started, whether or not the trainer itself still lives."""
        process = self.process
        if process is None:
            return
        with suppress(OSError):
            if os.name == "posix":
                os.killpg(process.pid, number)
            else:
                process.terminate()

    def _send(self, line: bytes) -> None:
        process = self.process
        assert process is not None and process.stdin is not None
        stdin: IO[bytes] = process.stdin
        with suppress(OSError, ValueError):  # it is dead, which `_follow` notices
            stdin.write(line)
            stdin.flush()

    # -------------------------------------------------------------------------------------------------- the trial

    def _follow(
        self,
        job: Job,
        on_slot: Callable[[Slot], bool],
        on_begun: Callable[[Begun], None],
        on_progress: Callable[[Progress], None],
        on_tick: Callable[[], None],
    ) -> Outcome | None:
        """Handle messages until the trial ends; None where the trainer died before."""
        goes_on, heard = True, time.monotonic()
        while True:
            try:
                message = self._events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                if self._is_over(heard):
                    return None
                on_tick()
                continue
            if message is _END:
                return None
            heard = time.monotonic()
            kind = message["kind"]
            if message.get("trial") != job.trial:
                continue
            if kind == "slot":
                slot = read_as(Slot, message)
                goes_on = goes_on and bool(on_slot(slot)) and self._stop_at is None
                self._send(to_line("go" if goes_on else "stop", trial=job.trial))
            elif kind == "begun":
                on_begun(read_as(Begun, message))
            elif kind == "alive":
                on_progress(read_as(Progress, message))
                on_tick()
            elif kind == "ended":
                return read_as(Outcome, message)

    def _is_over(self, heard: float) -> bool:
        """Whether no more messages can come. Kills a trainer that has been silent, or stopping, for too long."""
        now = time.monotonic()
        if self._stop_at is not None and now > self._stop_at:
            self.kill()
            return True
        if now - heard > self.silent:
            self.kill()
            return True
        process = self.process
        # The end of the pipe is not enough: a process that the trainer started may keep it open.
        return process is None or (process.poll() is not None and self._events.empty())

    def _of_dead(self, job: Job, killed_before: int, seconds: float) -> Outcome:
        """The outcome of a trial whose trainer died: the one that it wrote, else one made from how it died."""
        process, was_stopped = self.process, self._stop_at is not None
        code = None if process is None else process.poll()
        self.kill()
        written = read_outcome(job.folder, job.trial)
        if written is not None:
            return written
        if was_stopped:
            return Outcome(job.trial, "stopped", "Stopped, and the trainer with it.", seconds=seconds)
        if code is None:
            message = f"The trainer sent no message for {self.silent:.0f} s and was killed."
            return Outcome(job.trial, "failed", message, seconds=seconds)
        if code == -signal.SIGKILL and memory_kills() > killed_before:
            message = "The system killed the trainer because memory ran out (host memory, not the GPU's)."
            return Outcome(job.trial, "memory", message, seconds=seconds)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        message = f"The trainer ended {how} during the trial. {last_log_line(Path(job.folder))}".strip()
        return Outcome(job.trial, _ENDINGS.get(code, "failed"), message, seconds=seconds)


def last_log_line(folder: Path) -> str:
    """The last line of a trial's log, as a sentence; empty where there is none."""
    try:
        lines = (folder / LOGS / TRAINER_LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"The last line of its log: {said[:300]}" if said else ""


def memory_kills() -> int:
    """How many processes the kernel has killed for lack of memory: in this process's cgroup, or else on this machine."""
    for path in _memory_counters():
        with suppress(OSError, ValueError):
            if found := re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def _memory_counters() -> list[Path]:
    """Files with an `oom_kill` line, the most specific first (cgroup v2, v1, the whole machine)."""
    root, found = Path("/sys/fs/cgroup"), list[Path]()
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                found.append(root / group.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(root / "memory" / group.lstrip("/") / "memory.oom_control")
    # In a container the group may have the host's name for it, while its files are at the root.
    return [*found, root / "memory.events", root / "memory" / "memory.oom_control", Path("/proc/vmstat")]
