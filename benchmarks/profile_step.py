"""What a LoRA step of train_network.py computes: torch's operations by their share of the time of one step.

    python benchmarks/profile_step.py [--family sd15|sdxl] [--resolution 256] [--batch 1] [--precision no] [...]

Random weights, by the real loop. Everything after -- goes to train_network.py as it is.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from common import ROOT, save
from full_size import lora_training, make_pictures, random_base

RANK = 16
PROFILED = 3
"""The step that is looked at; before it, kernels are chosen and memory is taken."""
SHOWN = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--base", default=None, help="another base than random weights of the family")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--folder", default=None, help="where the random base is kept")
    parser.add_argument("rest", nargs="*", help="more options for train_network.py, behind --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings, measured = measure(arguments, Path(folder))
    device = "gpu" if settings["on_gpu"] else "cpu"
    save(f"profile_step_{arguments.family}_{arguments.resolution}_b{arguments.batch}_{device}", settings, measured, {})


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Shares of the operations that take the most, and how often each was called."""
    import torch

    base = arguments.base or random_base(Path(arguments.folder or folder), arguments.family)
    make_pictures(folder / "pictures", arguments.resolution)
    options = {
        "batch": arguments.batch,
        "resolution": arguments.resolution,
        "rank": RANK,
        "precision": arguments.precision,
    }
    words = lora_training(base, folder / "pictures", folder / "out", folder / "cache", steps=PROFILED + 1, **options)
    profile = _profiled([*words[1:], *arguments.rest])
    on_gpu = torch.cuda.is_available()
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in profile}
    calls = {event.key: event.count for event in profile}
    total = sum(times.values())
    measured: dict[str, float] = {"profiled_step_seconds": total / 1e6}
    for name in sorted(times, key=times.__getitem__, reverse=True)[:SHOWN]:
        measured[f"{name}: share"] = times[name] / total
        measured[f"{name}: calls"] = calls[name]
    settings = {"family": arguments.base or arguments.family, "weights": "random", **options, "on_gpu": on_gpu}
    return settings | {"more": " ".join(arguments.rest) or "none"}, measured


def _profiled(argv: list[str]) -> Any:
    """What torch's profiler saw of step PROFILED."""
    from torch.profiler import profile

    from library.training import loop

    seen: list[Any] = []
    take_step = loop.take_step

    def looked_at(run: Any, batches: Any, randomness: Any, step: int) -> Any:
        if step != PROFILED:
            return take_step(run, batches, randomness, step)
        with profile() as profiler:
            result = take_step(run, batches, randomness, step)
        seen.extend(profiler.key_averages())
        return result

    with mock.patch.object(loop, "take_step", looked_at):
        code = runpy.run_path(str(ROOT / "train_network.py"))["main"](argv)
    if code:
        sys.exit(code)
    return seen


if __name__ == "__main__":
    main()
