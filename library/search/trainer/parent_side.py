"""The parent's side of a trainer: starts it, gives it trials, and makes an outcome of whatever becomes of it.

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
from library.search.lines import from_line, read_as, to_line
from library.search.messages import Begun, Ending, Job, Outcome, Progress, Slot
from library.search.outcomes import OUTCOME_FILE, read_outcome
from library.search.trainer.child import PARENT_VARIABLE

GRACE_SECONDS = 30.0
SILENT_SECONDS = 1800.0
"""A training says every few seconds that it is alive. One that says nothing for so long hangs."""
TICK_SECONDS = 0.2
_ENDINGS: dict[int, Ending] = {
    EXIT_BAD_INPUT: "refused",
    EXIT_STOPPED: "stopped",
    EXIT_DIVERGED: "diverged",
    EXIT_OUT_OF_MEMORY: "memory",
}
_END = None


class TrainerProcess:
    """A trainer that is started when there is something to do, and anew after it has failed.

    Args:
        env: what its environment has beside this process's, such as CUDA_VISIBLE_DEVICES.
        log: file that takes what it says between trials; during a trial that goes to the trial's own log.
        silent: seconds without a sign of life after which it is ended.
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
        """Train a trial. Dead, silent or stopped: there is an outcome in any case; only what the callbacks raise comes out.

        Args:
            on_slot: asked at each slot whether to go on; not any more when it has said no.
            on_tick: called every TICK_SECONDS or so while there is nothing to hear, for leases and the like.
        """
        started = time.monotonic()
        if self._stop_at is not None:
            return Outcome(job.trial, "stopped", "Stopped before it began.")
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
            self.kill()  # what it was doing has nobody to report to
            raise
        if outcome is None:
            outcome = self._of_dead(job, killed_before, time.monotonic() - started)
        if outcome.ending in ("failed", "memory"):
            self.kill()
        return outcome

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Have the trial end, for good: SIGTERM to all of its processes, SIGKILL when `grace` seconds have passed.

        Returns at once, and may be called from a signal handler or another thread; `run` sees to the rest and returns. Any
        later `run` is stopped before it begins.
        """
        if self._stop_at is None:
            self._stop_at = time.monotonic() + grace
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now, with every process it started."""
        self._signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process = self.process
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            self.process = None

    def close(self, grace: float = 5.0) -> None:
        """Let it end, which an idle one does at once when its input ends."""
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
        # The kernel ends the trainer with the thread that started it, so that is one that lives as long as the trainer.
        threading.Thread(target=self._start_and_read, args=(self._events, begun), name="trainer", daemon=True).start()
        found = begun.get()
        if isinstance(found, OSError):
            raise found
        self.process = found
        if self._stop_at is not None:  # asked for while it was being started
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
        """To the trainer and all it started; its group outlives it where something of it does."""
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
        with suppress(OSError, ValueError):  # it is dead, which the events tell
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
        """Until the trial ends; None where the trainer died of it."""
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
        """Whether nothing more is to be heard; ends what has been silent or in its grace for too long."""
        now = time.monotonic()
        if self._stop_at is not None and now > self._stop_at:
            self.kill()
            return True
        if now - heard > self.silent:
            self.kill()
            return True
        process = self.process
        # Something that it started may keep the pipe open.
        return process is None or (process.poll() is not None and self._events.empty())

    def _of_dead(self, job: Job, killed_before: int, seconds: float) -> Outcome:
        """The outcome of a trial whose trainer did not live to tell it, else what it wrote at the end."""
        process, was_stopped = self.process, self._stop_at is not None
        code = None if process is None else process.poll()
        self.kill()
        written = read_outcome(job.folder, job.trial)
        if written is not None:
            return written
        if was_stopped:
            return Outcome(job.trial, "stopped", "Stopped; the trainer was ended with it.", seconds=seconds)
        if code is None:
            message = f"The trainer said nothing for {self.silent:.0f} s and was ended."
            return Outcome(job.trial, "failed", message, seconds=seconds)
        if code == -signal.SIGKILL and memory_kills() > killed_before:
            message = "The system ended the trainer because memory ran out (host memory, not the GPU's)."
            return Outcome(job.trial, "memory", message, seconds=seconds)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        message = f"The trainer ended {how} in the middle of the trial. {last_words(Path(job.folder))}".strip()
        return Outcome(job.trial, _ENDINGS.get(code, "failed"), message, seconds=seconds)


def last_words(folder: Path) -> str:
    """The end of a trial's log, for a message; empty where there is none."""
    try:
        lines = (folder / "logs" / "trainer.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"The last line of its log: {said[:300]}" if said else ""


def memory_kills() -> int:
    """How many processes the kernel has ended for want of memory: in this process's cgroup, or else on this machine."""
    for path in _memory_counters():
        with suppress(OSError, ValueError):
            if found := re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def _memory_counters() -> list[Path]:
    """Files with an `oom_kill` line, the most particular first (cgroup v2, v1, the whole machine)."""
    root, found = Path("/sys/fs/cgroup"), list[Path]()
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                found.append(root / group.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(root / "memory" / group.lstrip("/") / "memory.oom_control")
    # In a container the group's name may be the host's, while its files lie at the root.
    return [*found, root / "memory.events", root / "memory" / "memory.oom_control", Path("/proc/vmstat")]
