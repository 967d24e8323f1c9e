"""What every benchmark does alike: run a script as a user does, say where it ran, keep the result as JSON, print it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = Path(__file__).resolve().parent / "results"


def run_script(words: list[str]) -> None:
    """Run a script of the project as a process of its own. Ends this one with its exit code where that is not 0."""
    ended = subprocess.run([sys.executable, *words], cwd=ROOT)
    if ended.returncode:
        sys.exit(ended.returncode)


def environment() -> dict[str, Any]:
    """Device, versions and date of a measurement."""
    from library.device import choose_device, device_name
    from library.training.checkpoints import versions

    return {
        "device": device_name(choose_device(None)),
        "machine": platform.machine(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save(name: str, settings: dict[str, Any], measured: dict[str, Any], targets: dict[str, Any]) -> Path:
    """Write results/{name}.json and print it. targets: name of a figure -> (bound, met or not or why unknown)."""
    from library.files import write_json

    result = {"settings": settings, "measured": measured, "targets": targets, **environment()}
    path = RESULTS / f"{name}.json"
    write_json(path, result)
    print(json.dumps(result, indent=2))
    print(f"written to {path}")
    return path
