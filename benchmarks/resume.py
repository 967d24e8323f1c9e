"""Whether a LoRA training that is resumed halfway ends with the bits of the uninterrupted one, and what determinism costs.

    python benchmarks/resume.py [--family sd15|sdxl] [--resolution 512] [--steps 8] [--folder /tmp/kept]

Three trainings by train_network.py: one to the end with a state halfway, one that goes on from that state, and one with
--no_deterministic, for its seconds of a step.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import save
from full_size import random_base

from library.errors import script


@script
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training = benchmark_of_training()
    training.add_options(parser)
    parser.set_defaults(resolution=512, steps=8)
    parser.add_argument("--name", default="resume")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        settings, measured = measure(arguments, training, Path(arguments.folder or temporary), Path(temporary))
    exact = measured["tensors_that_differ"] == 0
    save(arguments.name, settings, measured, {"tensors_that_differ": {"at_most": 0, "met": exact}})
    return 0 if exact else 1


def benchmark_of_training() -> Any:
    """benchmarks/train_network.py, which is called like the script that it measures."""
    path = Path(__file__).with_name("train_network.py")
    spec = importlib.util.spec_from_file_location("benchmark_of_training", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(
    arguments: argparse.Namespace, training: Any, folder: Path, outputs: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    from safetensors.torch import load_file

    base = arguments.base or str(random_base(folder, arguments.family))
    half = arguments.steps // 2
    more = ["--save_state", "--save_every_n_steps", str(half), "--output_name", "lora"]
    more += training.more_options(arguments)

    def train(name: str, *others: str) -> list[dict[str, float]]:
        return training.train(arguments, base, folder, outputs / name, arguments.steps, [*more, *others])

    whole = train("whole")
    (outputs / "resumed").mkdir()
    state = f"lora-step{half:08d}-state"
    shutil.copytree(outputs / "whole" / state, outputs / "resumed" / state)
    resumed = train("resumed")
    free = train("free", "--no_deterministic")
    of_whole, of_resumed = (load_file(outputs / name / "lora.safetensors") for name in ("whole", "resumed"))
    differ = [key for key, value in of_whole.items() if not value.equal(of_resumed[key])]
    deterministic, fast = (training.median_seconds(rows[half:]) for rows in (whole, free))
    measured = {
        "tensors": len(of_whole),
        "tensors_that_differ": len(differ),
        "steps_after_resuming": len(resumed),
        "deterministic_step_seconds": deterministic,
        "free_step_seconds": fast,
        "price_of_determinism": deterministic / fast,
    }
    settings = {
        "family": arguments.base or arguments.family, "weights": "random", "resolution": arguments.resolution,
        "batch": arguments.batch, "steps": arguments.steps, "more": " ".join(training.more_options(arguments)) or "none",
        "precision": arguments.precision,
    }  # fmt: skip
    return settings, measured


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
