"""Runs a training, of whichever program, and measures it from outside: its steps are read off its output."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO

import psutil

SAMPLE_SECONDS = 0.25


class TrainingFailed(Exception):
    """The command ended otherwise than by its last step; the message holds the end of its output."""


@dataclass(frozen=True)
class Figures:
    """Of one run of a command and all processes that it starts. GB are 10^9 bytes.

    first_step_*: from the command to the end of its first step. PSS counts memory that processes share once and the mapped part
    of files; anonymous memory is what cannot be dropped.
    """

    first_step_seconds: float
    first_step_cpu_seconds: float
    step_seconds: float
    """Median of all steps but the first."""
    step_cpu_seconds: float
    peak_pss_gb: float
    peak_anonymous_gb: float
    whole_seconds: float


def watch(
    command: Sequence[str],
    steps: int,
    *,
    cores: Sequence[int],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Figures:
    """Run a command that counts its steps as "1/STEPS", "2/STEPS", ... in its output, on these cores, in `folder`.

    Raises TrainingFailed where it fails or never counts to the end.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    root = psutil.Process(process.pid)
    reader = _StepReader(process.stdout, steps, lambda: _cpu_seconds(root))  # type: ignore[arg-type]  # a pipe
    reader.start()
    pss = anonymous = 0
    try:
        while process.poll() is None:
            now = _memory(root)
            pss, anonymous = max(pss, now[0]), max(anonymous, now[1])
            time.sleep(SAMPLE_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
    reader.join()
    whole = time.perf_counter() - started
    if process.returncode or len(reader.ends) < steps:
        raise TrainingFailed(
            f"{command[0]} ... ended with exit code {process.returncode} after {len(reader.ends)} of {steps} steps:\n"
            + reader.text[-2000:]
        )
    walls = [wall - started for wall, _ in reader.ends]
    cpus = [cpu for _, cpu in reader.ends]
    return Figures(
        walls[0],
        cpus[0],
        median(later - earlier for earlier, later in pairwise(walls)),
        median(later - earlier for earlier, later in pairwise(cpus)),
        pss / 1e9,
        anonymous / 1e9,
        whole,
    )


class _StepReader(threading.Thread):
    """Reads a command's output, and notes wall time and CPU seconds when it counts a further step."""

    def __init__(self, stream: IO[bytes], steps: int, cpu_seconds: object) -> None:
        super().__init__(daemon=True)
        self._stream, self._cpu_seconds = stream, cpu_seconds
        self._pattern = re.compile(rf"(?<![\d.])(\d+)/{steps}(?!\d)")
        self.ends: list[tuple[float, float]] = []
        self.text = ""

    def run(self) -> None:
        rest = ""
        while part := self._stream.read1(4096):  # type: ignore[attr-defined]  # of a buffered pipe
            text = rest + part.decode("utf-8", "replace")
            self.text = (self.text + text)[-8000:]
            for found in self._pattern.finditer(text):
                if int(found[1]) == len(self.ends) + 1:
                    self.ends.append((time.perf_counter(), self._cpu_seconds()))  # type: ignore[operator]
            rest = text[-16:]


def _tree(root: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [root, *root.children(recursive=True)]
    return []


def _cpu_seconds(root: psutil.Process) -> float:
    """Of all processes, those that have ended included."""
    total = 0.0
    for process in _tree(root):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _memory(root: psutil.Process) -> tuple[int, int]:
    """PSS and anonymous memory of all processes, bytes."""
    pss = anonymous = 0
    for process in _tree(root):
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith("Pss:"):
                    pss += 1024 * int(line.split()[1])
                elif line.startswith("Anonymous:"):
                    anonymous += 1024 * int(line.split()[1])
    return pss, anonymous
