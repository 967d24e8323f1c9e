"""Seconds and memory of a LoRA step of train_network.py with random weights, as a user starts it, beside published figures.

python benchmarks/train_network.py [--family sd15|sdxl] [--resolution 256] [--batch 1] [--steps 6] [--precision bf16] [...]

Everything after -- goes to train_network.py as it is, e.g. -- --fp8_base.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import save
from full_size import lora_training, make_pictures, random_base

from library.errors import script

RANK = 16
# Published for one H100 at batch 1: seconds a step and GiB (SD1.5 512 px, SDXL 1024 px); targets are for an H200.
PUBLISHED = {("sd15", 512): (0.181, 2.9), ("sdxl", 1024): (0.606, 13.0)}
TARGETS = {("sd15", 512): 0.09, ("sdxl", 1024): 0.30}
# The first step is slow, and with --compile graphs the first that come are not yet replayed.
WARM_UP = 2


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--warm_up", type=int, default=WARM_UP, help="steps before those that are timed")
    parser.add_argument("--name", default=None, help="of the result; default by family, size, batch and device")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        settings, measured = measure(arguments, folder, Path(temporary) / "out")
    key = (settings["family"], arguments.resolution)
    device = "gpu" if measured["peak_gb"] else "cpu"
    targets: dict[str, Any] = {}
    if key in TARGETS and arguments.batch == 1:
        met: Any = measured["step_seconds"] <= TARGETS[key] if device == "gpu" else "not measured: no GPU here"
        targets = {"step_seconds": {"at_most": TARGETS[key], "met": met}}
        measured["published_step_seconds"], measured["published_gib"] = PUBLISHED[key]
    name = arguments.name or f"train_network_{settings['family']}_{arguments.resolution}_b{arguments.batch}_{device}"
    save(name, settings, measured, targets)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which training; of every benchmark that has one."""
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument(
        "--base", default=None, help="a base to train on instead, by name or path; nothing random is made"
    )
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--compile", default="none", choices=("none", "regional", "whole", "graphs"))
    parser.add_argument("--folder", default=None, help="where base, pictures and caches are kept; default: nowhere")
    parser.add_argument("rest", nargs="*", help="more options for train_network.py, behind --")


def more_options(arguments: argparse.Namespace) -> list[str]:
    """For train_network.py, beside those that every training here has."""
    return [*(["--compile", arguments.compile] if arguments.compile != "none" else []), *arguments.rest]


def measure(arguments: argparse.Namespace, folder: Path, output: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Step times from the median of single steps."""
    base, more = arguments.base or str(random_base(folder, arguments.family)), more_options(arguments)
    started = time.perf_counter()
    rows = train(arguments, base, folder, output, arguments.steps + arguments.warm_up, more)
    seconds = time.perf_counter() - started
    steps = rows[arguments.warm_up :]
    measured = {
        "step_seconds": median_seconds(steps),
        "samples_per_second": arguments.batch / median_seconds(steps),
        "data_wait_share": sum(row["time/data_wait_share"] for row in steps) / len(steps),
        "peak_gb": max(row.get("memory/peak_gb", 0.0) for row in steps),
        "loss": steps[-1]["train/loss"],
        "whole_command_seconds": seconds,
    }
    settings = {
        "family": arguments.base or arguments.family,
        "weights": "random",
        "resolution": arguments.resolution,
        "batch": arguments.batch,
        "rank": RANK,
        "steps": arguments.steps,
        "precision": arguments.precision,
        "more": " ".join(more) or "none",
    }
    return settings, measured


def train(
    arguments: argparse.Namespace, base: str, folder: Path, output: Path, steps: int, more: list[str]
) -> list[dict[str, float]]:
    """Run train_network.py as a user does; its metrics, a row for each step."""
    pictures = folder / f"pictures_{arguments.resolution}"
    if not pictures.exists():
        make_pictures(pictures, arguments.resolution)
    words = lora_training(
        base, pictures, output, folder / "cache", batch=arguments.batch, resolution=arguments.resolution, rank=RANK,
        steps=steps, precision=arguments.precision,
    )  # fmt: skip
    common.run_script([*words, *more])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "time/step_ms" in row]


def median_seconds(rows: list[dict[str, float]]) -> float:
    times = sorted(row["time/step_ms"] / 1000 for row in rows)
    return times[len(times) // 2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
