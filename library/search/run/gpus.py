"""Which GPU each worker of a study has to itself."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from library.errors import UserError

_held: list[IO[bytes]] = []


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each, without loading torch: its own items, else nvidia-smi's UUIDs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [one.strip() for one in given.split(",") if one.strip() and one.strip() != "-1"]
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return said.stdout.split() if said.returncode == 0 else []


def assign(workers: int, device: str | None, say: Callable[[str], None] = print) -> list[dict[str, str]]:
    """Environment of each worker's trainer.

    Raises UserError where more workers than GPUs are asked for. A GPU that another study here is at work on is warned of: a
    trial that runs out of memory on a shared GPU is blamed for what its neighbour took.
    """
    if device is not None and not device.startswith("cuda"):
        return [{} for _ in range(workers)]
    gpus = visible_gpus()
    if device is not None and ":" in device:
        if workers > 1:
            raise UserError(f"--device {device} is one GPU, and --workers asks for {workers}. Give --device cuda.")
        return [{}]
    if workers > 1 and gpus and workers > len(gpus):
        raise UserError(f"--workers {workers} needs as many GPUs, and {len(gpus)} can be seen. Lower --workers.")
    if not gpus:
        return [{} for _ in range(workers)]
    chosen = gpus[:workers]
    for gpu in chosen:
        if not _lock(gpu):
            say(f"warning: another study on this machine is at work on GPU {gpu}. Trials may run out of memory.")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in chosen]


def _lock(gpu: str) -> bool:
    """Hold the GPU's lock as long as this process lives; whether nobody else has it."""
    try:
        import fcntl
    except ImportError:
        return True
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    try:
        file = open(Path(tempfile.gettempdir()) / f"search-gpu-{name}.lock", "a+b")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # another user's file; not worth stopping for
    _held.append(file)
    return True
