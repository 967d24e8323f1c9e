"""Which GPU each worker of a study uses; no two share one."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from library.errors import UserError
from library.words import plural

_held: list[IO[bytes]] = []


def visible_gpus() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them, without loading torch: its own items, else the UUIDs that nvidia-smi lists."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [item.strip() for item in given.split(",") if item.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


def gpus_of(workers: int, device: str | None) -> list[str]:
    """The GPU of each worker; none where trials do not choose among GPUs. Raises UserError for more workers than GPUs."""
    if device is not None and not device.startswith("cuda"):
        return []
    if device is not None and ":" in device:
        if workers > 1:
            raise UserError(
                f"--device {device} is one GPU, but --workers {workers} needs {workers}. Give --device cuda."
            )
        return []
    gpus = visible_gpus()
    if workers > 1 and gpus and workers > len(gpus):
        raise UserError(
            f"--workers {workers} needs as many GPUs, but {plural(len(gpus), 'is', 'are')} visible. Lower --workers."
        )
    return gpus[:workers]


def assign(workers: int, device: str | None, say: Callable[[str], None] = print) -> list[dict[str, str]]:
    """What is added to the environment of each worker's trainer.

    Warns of a GPU that another study on this machine uses, because a trial that runs out of memory there gets a penalty. Raises
    UserError as `gpus_of`.
    """
    chosen = gpus_of(workers, device)
    if not chosen:
        return [{} for _ in range(workers)]
    for gpu in chosen:
        if not _lock(gpu):
            say(f"warning: another study on this machine uses GPU {gpu}. Trials may run out of memory.")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in chosen]


def _lock(gpu: str) -> bool:
    """Take the GPU's lock for as long as this process lives; False where another process has it."""
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
        return True  # another user's lock file: the warning is not worth an error
    _held.append(file)
    return True
