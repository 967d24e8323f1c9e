"""What one optimizer step asks of a GPU, counted on the meta device in seconds: no GPU, no weights, no pictures.

    python benchmarks/count_step.py [--name count_step]

Launches are the operations that eager mode calls, views left out. What torch.compile joins and what CUDA graphs replay are not seen
here: with --compile regional the products stay and most of the rest goes, with graphs the host launches once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from common import RESULTS, save

from library.options.network import parse_network_options
from library.options.repa import parse_repa_options
from library.options.run import RunOptions
from library.training.meta_step import StepSize, meta_step
from library.training.step_count import StepCount
from networks.families import FAMILIES

# Against the adapters before they were one operation each: see results/count_step_before.json.
TARGET = 0.6
UNET_ONLY = "--network_dim 16 --network_train_unet_only --cache_text_encoder_outputs --mixed_precision"
# Name -> (family, words for train_network.py, side in pixels, batch).
LORA = {
    "sd15 b1 bf16": ("sd15", f"{UNET_ONLY} bf16", 512, 1),
    "sd15 b4 bf16": ("sd15", f"{UNET_ONLY} bf16", 512, 4),
    "sd15 b1 float32": ("sd15", f"{UNET_ONLY} no", 512, 1),
    "sd15 b1 bf16 checkpointing": ("sd15", f"{UNET_ONLY} bf16 --gradient_checkpointing", 512, 1),
    "sd15 b1 bf16 text encoder": ("sd15", "--network_dim 16 --mixed_precision bf16", 512, 1),
    "sdxl b1 bf16": ("sdxl", f"{UNET_ONLY} bf16", 1024, 1),
    "sdxl b4 bf16": ("sdxl", f"{UNET_ONLY} bf16", 1024, 4),
    "sdxl b1 float32": ("sdxl", f"{UNET_ONLY} no", 1024, 1),
    "sdxl b1 bf16 checkpointing": ("sdxl", f"{UNET_ONLY} bf16 --gradient_checkpointing", 1024, 1),
}
# Of train_repa.py, at 512 px.
REPA = {
    "sd15 repa b128 bf16": ("sd15", "--lora_scope mid", 128),
    "sd15 repa all b128 bf16": ("sd15", "--lora_scope all", 128),
}
MOST = 16  # of the kinds of operations, in the result
WANTED = ("sd15 b1 bf16", "sdxl b1 bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="count_step", help="of the result")
    arguments = parser.parse_args()
    measured: dict[str, Any] = {}
    launches = {}
    for name, (family, words, side, batch) in LORA.items():
        counted = count(
            parse_network_options(_argv("--train_data_dir", words), prog="", description=None), family, side, batch
        )
        measured |= figures(name, counted)
        launches[name] = dict(counted.launches.most_common(MOST))
    for name, (family, words, batch) in REPA.items():
        options = parse_repa_options(_argv("--train_data", words), prog="", description=None)
        counted = count(options, family, 512, batch, teacher_widths={"teacher": 1024})
        measured |= figures(name, counted)
        launches[name] = dict(counted.launches.most_common(MOST))
    before = RESULTS / "count_step_before.json"
    targets = {}
    if before.is_file() and arguments.name == "count_step":
        earlier = json.loads(before.read_text(encoding="utf-8"))["measured"]
        for name in WANTED:
            bound = int(TARGET * earlier[f"{name}: operations"])
            targets[f"{name}: operations"] = {"at_most": bound, "met": measured[f"{name}: operations"] <= bound}
    settings = {"counted on": "the meta device", "compile": "none", "optimizer": "AdamW, fused", "rank": 16}
    save(arguments.name, settings, measured | {"launches by operation": launches}, targets)


def _argv(data: str, words: str) -> list[str]:
    folder = tempfile.gettempdir()
    return [data, folder, "--output_dir", folder, "--pretrained_model_name_or_path", "published", *words.split()]


def count(
    options: RunOptions, family: str, side: int, batch: int, teacher_widths: Mapping[str, int] | None = None
) -> StepCount:
    with ExitStack() as context:
        size = StepSize(side, side, batch, teacher_widths=teacher_widths or {})
        return meta_step(options, None, FAMILIES[family], size, context).count()


def figures(name: str, counted: StepCount) -> dict[str, float]:
    return {
        f"{name}: operations": counted.operations,
        f"{name}: TFLOP": counted.flop / 1e12,
        f"{name}: GB moved beside products": counted.moved / 1e9,
        f"{name}: peak GiB": counted.peak / 2**30,
    }


if __name__ == "__main__":
    main()
