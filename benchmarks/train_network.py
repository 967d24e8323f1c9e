"""Seconds and memory of a LoRA step of train_network.py at full size with random weights, beside published figures.

python benchmarks/train_network.py [--family sd15|sdxl] [--resolution 256] [--batch 1] [--steps 6] [--precision bf16] [...]

Everything after -- goes to train_network.py as it is, e.g. -- --compile regional.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import save
from full_size import make_pictures, random_checkpoint

RANK = 16
# Published for one H100 at batch 1: seconds a step and GiB (SD1.5 512 px, SDXL 1024 px); targets are for an H200.
PUBLISHED = {("sd15", 512): (0.181, 2.9), ("sdxl", 1024): (0.606, 13.0)}
TARGETS = {("sd15", 512): 0.09, ("sdxl", 1024): 0.30}
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--folder", default=None, help="where the checkpoint goes; 2 GB, SDXL 7 GB")
    parser.add_argument("--name", default=None, help="of the result; default by family, size, batch and device")
    parser.add_argument("rest", nargs="*", help="more options for train_network.py, behind --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        base = random_checkpoint(Path(folder) / "base.safetensors", arguments.family)
        settings, measured = measure(arguments, str(base), Path(folder))
    key = (arguments.family, arguments.resolution)
    device = "gpu" if measured["peak_gb"] else "cpu"
    targets: dict[str, Any] = {}
    if key in TARGETS and arguments.batch == 1:
        met: Any = measured["step_seconds"] <= TARGETS[key] if device == "gpu" else "not measured: no GPU here"
        targets = {"step_seconds": {"at_most": TARGETS[key], "met": met}}
        measured["published_step_seconds"], measured["published_gib"] = PUBLISHED[key]
    name = arguments.name or f"train_network_{arguments.family}_{arguments.resolution}_b{arguments.batch}_{device}"
    save(name, settings, measured, targets)


def measure(arguments: argparse.Namespace, base: str, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Run train_network.py as a user does and read its metrics; step times from the median of single steps."""
    pictures = folder / "pictures"
    make_pictures(pictures, arguments.resolution)
    command = [
        sys.executable,
        "train_network.py",
        "--pretrained_model_name_or_path",
        base,
        "--train_data_dir",
        str(pictures),
    ]
    command += ["--resolution", str(arguments.resolution), "--train_batch_size", str(arguments.batch)]
    command += ["--max_train_steps", str(arguments.steps + WARM_UP), "--log_every_n_steps", "1"]
    command += ["--network_dim", str(RANK), "--network_alpha", str(RANK), "--network_train_unet_only"]
    command += ["--cache_text_encoder_outputs", "--mixed_precision", arguments.precision]
    command += [
        "--output_dir",
        str(folder / "out"),
        "--cache_dir",
        str(folder / "cache"),
        "--max_data_loader_n_workers",
        "2",
    ]
    command += arguments.rest
    root = Path(__file__).resolve().parents[1]
    started = time.perf_counter()
    subprocess.run(command, cwd=root, check=True)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step_ms" in row][WARM_UP:]
    times = sorted(row["time/step_ms"] / 1000 for row in steps)
    measured = {
        "step_seconds": times[len(times) // 2],
        "samples_per_second": arguments.batch / times[len(times) // 2],
        "data_wait_share": sum(row["time/data_wait_share"] for row in steps) / len(steps),
        "peak_gb": max(row.get("memory/peak_gb", 0.0) for row in steps),
        "whole_command_seconds": seconds,
    }
    settings = {
        "family": arguments.family,
        "weights": "random",
        "resolution": arguments.resolution,
        "batch": arguments.batch,
        "rank": RANK,
        "steps": arguments.steps,
        "precision": arguments.precision,
        "more": " ".join(arguments.rest) or "none",
    }
    return settings, measured


if __name__ == "__main__":
    main()
