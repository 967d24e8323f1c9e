"""What a step of each way to align costs beside lambda 0: seconds measured, launches, FLOP and memory counted at full size.

    python benchmarks/alignment_recipes.py [--rounds 3] [--steps 20]

CPU seconds are of the tiny model, whose heads are a larger part of a step than SD1.5's; ways take turns, round by round. Counts are
of SD1.5 at 512 px, batch 32, on the meta device (see count_step.py): what a GPU would be given to do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from common import save
from repa_step import measure

from library.errors import script
from library.options.repa import parse_repa_options
from library.training.loop import take_step
from library.training.meta_step import StepSize, meta_step
from networks.families import SD15

WAYS = {
    "lambda 0": "--align_coeff 0",
    "default": "--align_coeff 0.5",
    "trd": "--align_recipe trd",
    "irepa": "--align_recipe irepa",
    "V by noise": "--align_timesteps v",
    "film": "--align_film",
    "three taps": "--taps enc_last mid dec_first",
    "no teacher": "--manifold_target latents --token_weight 0 --manifold_mode token",
    "gradient cosine, every step": "--align_gradient_every 1",
}
TEACHER_WIDTH, BATCH = 1024, 32
QUICK = argparse.Namespace(batch=8, samples=64, compile="none", lora_scope="down_mid", no_deterministic=False)


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args(argv)
    rounds = [{way: seconds(words, arguments.steps) for way, words in WAYS.items()} for _ in range(arguments.rounds)]
    counts = {way: counted(words) for way, words in WAYS.items()}
    measured = {}
    for way in WAYS:
        measured[f"{way}: cpu_time_of_lambda_0"] = statistics.median(one[way] / one["lambda 0"] for one in rounds)
        for name, value in counts[way].items():
            measured[f"{way}: {name}_of_lambda_0"] = value / counts["lambda 0"][name]
    settings = {
        "seconds": "tiny-sd15, 128 px, batch 8, float32", "rounds": arguments.rounds, "steps": arguments.steps,
        "counted": f"SD1.5, 512 px, batch {BATCH}, bfloat16, teacher {TEACHER_WIDTH} wide", "lora_scope": QUICK.lora_scope,
        "ways": ", ".join(f"{way} ({words})" for way, words in WAYS.items()),
    }  # fmt: skip
    save("alignment_recipes", settings, measured, {})


def seconds(words: str, steps: int) -> float:
    """CPU seconds of a step of the tiny model, by the clock of this process alone: the median of the second half."""
    taken: list[float] = []

    def timed(*given: Any) -> Any:
        begun = time.process_time()
        result = take_step(*given)
        taken.append(time.process_time() - begun)
        return result

    QUICK.steps = steps
    with tempfile.TemporaryDirectory() as folder, ExitStack() as context:
        context.enter_context(mock.patch("library.training.loop.take_step", timed))
        measure(QUICK, Path(folder), context, full_size=False, more=words)
    return statistics.median(taken[steps // 2 :])


def counted(words: str) -> dict[str, float]:
    """Of a step at full size: kernels, FLOP, and the peak of memory."""
    given = "--train_data x --output_dir x --pretrained_model_name_or_path published --align_schedule constant"
    argv = f"{given} --lora_scope {QUICK.lora_scope} --train_batch_size {BATCH} {words}".split()
    options = parse_repa_options(argv, prog="", description=None)
    widths = {"teacher": TEACHER_WIDTH} if options.alignment.needs_teacher else {}
    with ExitStack() as context:
        count = meta_step(options, None, SD15, StepSize(512, 512, BATCH, teacher_widths=widths), context).count()
    return {"kernels": count.operations, "flop": count.flop, "memory": count.peak}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
