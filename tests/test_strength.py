"""How strongly an adapter acts: ratios, U-Net and text encoders apart, and block by block in the forms that UIs take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from library.errors import UserError
from library.merging.merge import place
from library.merging.strength import BASE, BLOCKS, MID, Strength, block_of, parse_blocks
from library.models.sd15_configs import SD15_UNET
from library.models.sdxl_configs import SDXL_UNET
from networks.adapter_file import read_adapter
from networks.families import SD15, SDXL
from networks.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, Target
from tests.tools.adapters import TEXT_LAYER, text_lora
from tests.tools.ldm_layout import unet_name
from tests.tools.merging import FILES, opened, run_merge, save

TO_Q = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("component", "path", "block"),
    [
        (UNET, "conv_in", "IN00"),
        (UNET, f"down_blocks.0.attentions.0.{TO_Q}", "IN01"),
        (UNET, "down_blocks.0.downsamplers.0.conv", "IN03"),
        (UNET, f"down_blocks.1.attentions.1.{TO_Q}", "IN05"),
        (UNET, "down_blocks.3.resnets.1.conv2", "IN11"),
        (UNET, f"mid_block.attentions.0.{TO_Q}", MID),
        (UNET, "mid_block.resnets.1.conv1", MID),
        (UNET, "up_blocks.0.resnets.0.conv1", "OUT00"),
        (UNET, "up_blocks.0.upsamplers.0.conv", "OUT02"),
        (UNET, f"up_blocks.1.attentions.0.{TO_Q}", "OUT03"),
        (UNET, f"up_blocks.3.attentions.2.{TO_Q}", "OUT11"),
        (UNET, "time_embedding.linear_1", BASE),
        (UNET, "add_embedding.linear_1", BASE),
        (UNET, "conv_out", BASE),
        (TEXT_ENCODER, TEXT_LAYER, BASE),
        (TEXT_ENCODER_2, TEXT_LAYER, BASE),
    ],
)
def test_a_block_is_the_original_codes(component: str, path: str, block: str) -> None:
    assert block_of(Target(component, path)) == block


@pytest.mark.parametrize("config", [SD15_UNET, SDXL_UNET], ids=["sd15", "sdxl"])
def test_every_module_of_both_families_has_the_block_of_its_original_name(config: dict[str, object]) -> None:
    sections = {"input_blocks": "IN", "middle_block": MID, "output_blocks": "OUT"}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    for key in unet.state_dict():
        section, index, *_ = unet_name(key, sdxl=config is SDXL_UNET).split(".")
        expected = sections.get(section, BASE) + (f"{int(index):02d}" if section.endswith("put_blocks") else "")
        assert block_of(Target(UNET, key.rpartition(".")[0])) == expected, key


def test_factors_multiply() -> None:
    strength = Strength(0.5, unet=0.8, text_encoder=0.2, blocks={"IN01": 0.5, BASE: 3.0})
    inner, middle = (Target(UNET, f"{block}.attentions.0.{TO_Q}") for block in ("down_blocks.0", "mid_block"))
    assert strength.of(inner) == pytest.approx(0.5 * 0.8 * 0.5)
    assert strength.of(middle) == pytest.approx(0.5 * 0.8)
    assert strength.of(Target(TEXT_ENCODER_2, TEXT_LAYER)) == pytest.approx(0.5 * 0.2 * 3.0)
    assert strength.describe() == "0.5, U-Net x 0.8, text encoders x 0.2, IN01 x 0.5, BASE x 3"
    assert Strength().describe() == "1" and Strength().of(middle) == 1.0


SHORT_SD15 = [BASE, "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", MID, *(f"OUT{i:02d}" for i in range(3, 12))]
SHORT_SDXL = [BASE, "IN04", "IN05", "IN07", "IN08", MID, *(f"OUT{i:02d}" for i in range(6))]
LONG_SDXL = [BASE, *(f"IN{i:02d}" for i in range(9)), MID, *(f"OUT{i:02d}" for i in range(9))]


@pytest.mark.parametrize("brackets", [True, False])
@pytest.mark.parametrize(
    ("length", "blocks"), [(12, SHORT_SDXL), (17, SHORT_SD15), (20, LONG_SDXL), (26, list(BLOCKS))]
)
def test_a_list_names_the_blocks_of_its_length(length: int, blocks: list[str], brackets: bool) -> None:
    """As the LoRA Block Weight extension and kohya's --lbws have them."""
    values = [round(0.1 * i - 0.5, 1) for i in range(length)]
    text = json.dumps(values)
    assert parse_blocks(text if brackets else text.strip("[]")) == dict(zip(blocks, values, strict=True))


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("", {}),
        ("MID=0", {MID: 0.0}),
        (" in04 = 0.5 , MID=-1,", {"IN04": 0.5, MID: -1.0}),
        ("OUT1*=0.5", {"OUT10": 0.5, "OUT11": 0.5}),
        ("IN*=0.5,MID=0", {**{f"IN{i:02d}": 0.5 for i in range(12)}, MID: 0.0}),
        ("*=0,BASE=1", {**dict.fromkeys(BLOCKS, 0.0), BASE: 1.0}),
    ],
)
def test_blocks_are_named_one_by_one_or_by_a_pattern_and_the_last_word_holds(
    text: str, factors: dict[str, float]
) -> None:
    assert parse_blocks(text) == factors


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "IN4=1",
            "block_ratios: 'IN4=1' is not of the form BLOCK=FACTOR with a block of BASE, IN00 to IN11, MID, OUT00",
        ),
        ("MID", "block_ratios: 'MID' is not of the form BLOCK=FACTOR"),
        ("MID=a", "block_ratios: 'a' is not a number."),
        ("MID=nan", "block_ratios: 'nan' is not a finite number."),
        ("[1, 2", "block_ratios: [1, 2 is not a list of numbers: "),
        ("1,MID,2", "block_ratios: 1,MID,2 is not a list of numbers: "),
        (
            "[1, 0.5]",
            "block_ratios: a list of 2 numbers was given. 17 or 26 fit SD1.5, 12 or 20 fit SDXL (BASE first).",
        ),
        (str([[1]] * 12), "block_ratios: [1] is not a number."),
    ],
)
def test_what_is_no_factor_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_blocks(text)


def test_blocks_are_those_of_the_adapters_family() -> None:
    assert parse_blocks("IN*=0,OUT*=1", SDXL) == {
        **{f"IN{i:02d}": 0.0 for i in range(9)},
        **{f"OUT{i:02d}": 1.0 for i in range(9)},
    }
    assert len(parse_blocks("IN*=0", SD15)) == 12
    with pytest.raises(UserError, match="with a block of BASE, IN00 to IN08, MID, OUT00 to OUT08"):
        parse_blocks("IN11=0", SDXL)


@pytest.fixture(scope="module")
def with_text(adapter_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the U-Net and of the text encoder."""
    path = tmp_path_factory.mktemp("adapter") / "both.safetensors"
    return save(load_file(adapter_file) | text_lora(), path)


@pytest.mark.parametrize(
    ("words", "untouched", "touched"),
    [
        (["--unet_ratio", 0], UNET, TEXT_ENCODER),
        (["--text_encoder_ratio", 0], TEXT_ENCODER, UNET),
        (["--block_ratios", "BASE=0"], TEXT_ENCODER, UNET),
        (["--block_ratios", "*=0,BASE=1"], UNET, TEXT_ENCODER),
    ],
)
def test_unet_and_text_encoder_are_merged_apart(
    words: list[object], untouched: str, touched: str, with_text: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    options = ["--models", with_text, "--pretrained_model_name_or_path", tiny_sd15, "--output_dir", tmp_path / "m"]
    assert run_merge(*options, *words) == 0
    assert (tmp_path / "m" / FILES[untouched]).read_bytes() == (tiny_sd15 / FILES[untouched]).read_bytes()
    assert (tmp_path / "m" / FILES[touched]).read_bytes() != (tiny_sd15 / FILES[touched]).read_bytes()


def test_a_block_at_zero_keeps_its_weights_and_no_other_block_does(adapter_file: Path, tiny_sd15: Path) -> None:
    base, adapter = opened(tiny_sd15), read_adapter(adapter_file)
    folds = place([(adapter, Strength(blocks=parse_blocks("IN*=0,OUT03=0.5")))], base.shapes, base.family)
    ratios = {key.removesuffix(".weight"): parts[0][1] for key, parts in folds[UNET].items()}
    assert ratios.keys() == {t.path for t in adapter.modules if not block_of(t).startswith("IN")}
    assert {path for path, ratio in ratios.items() if ratio != 1} == {
        target.path for target in adapter.modules if block_of(target) == "OUT03"
    }
