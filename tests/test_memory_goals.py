"""What full-size trainings need on a GPU, by the forecast: nothing is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.options.network import parse_network_options
from library.quiet import quiet_libraries
from library.training.forecast import _print_model
from networks.families import FAMILIES

quiet_libraries()

BASES = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}


@pytest.mark.parametrize(
    ("family", "side", "rank", "words", "most"),
    [
        ("sdxl", 1024, 32, "--base_quantization nf4", 6.0),
        ("sd15", 512, 16, "--base_quantization nf4", 3.0),
    ],
)
def test_a_lora_at_batch_1_fits(
    family: str, side: int, rank: int, words: str, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "--network_train_unet_only --cache_text_encoder_outputs --mixed_precision bf16 --gradient_checkpointing"
    given = ["--pretrained_model_name_or_path", BASES[family], "--train_data_dir", str(tmp_path)]
    options = parse_network_options(
        [*given, *f"{common} --network_dim {rank} {words}".split()], prog="", description=None
    )
    picture = SimpleNamespace(fitted=SimpleNamespace(bucket=(side, side)), dataset=SimpleNamespace(batch_size=1))
    data: Any = SimpleNamespace(training=[picture], classes=None)
    _print_model(options, None, FAMILIES[family], data)
    said = capsys.readouterr().out
    found = re.search(r"device memory +about ([\d.]+) (\w+):", said)
    assert found is not None, said
    assert found[2] == "GiB" and float(found[1]) <= most, said
