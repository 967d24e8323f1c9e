"""Names of one module in kohya's, PEFT's and diffusers' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from networks.lora import LoraSpec, target_modules
from networks.names import canonical_kohya_name, kohya_name, kohya_table, split_peft_key, weight_paths, with_text_model
from tests.tools.unets import sd15_unet_without_weights, small_unet

# One line per module of SD1.5 that kohya's scripts train: name, shapes, base or conv. Made by running them.
KOHYA_LIST = Path("/work/shared/reference/lora_modules_sd15.txt")


def sd15_text_encoder_without_weights() -> CLIPTextModel:
    with torch.device("meta"):
        return CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )


@pytest.mark.skipif(not KOHYA_LIST.exists(), reason=f"{KOHYA_LIST} is not on this machine")
@pytest.mark.parametrize("conv_rank", [None, 4])
def test_the_targets_of_sd15_are_kohyas(conv_rank: int | None) -> None:
    rows = [line.split("\t") for line in KOHYA_LIST.read_text().splitlines() if line]
    wanted = {name for name, _, _, kind in rows if name.startswith("lora_unet_") and (conv_rank or kind == "base")}
    spec = LoraSpec(scope="all", targets="kohya", conv_rank=conv_rank)
    assert set(kohya_table(target_modules(sd15_unet_without_weights(), spec))) == wanted


@pytest.mark.skipif(not KOHYA_LIST.exists(), reason=f"{KOHYA_LIST} is not on this machine")
def test_the_names_of_the_text_encoder_are_kohyas() -> None:
    expected = {line.split("\t")[0] for line in KOHYA_LIST.read_text().splitlines() if line.startswith("lora_te_")}
    linear = [
        path for path, module in sd15_text_encoder_without_weights().named_modules() if isinstance(module, nn.Linear)
    ]
    assert set(kohya_table(linear, "lora_te")) == expected


def test_kohyas_names_lead_back_to_every_module() -> None:
    paths = [path for path, _ in sd15_unet_without_weights().named_modules() if path]
    table = kohya_table(paths)
    assert len(table) == len(paths)
    assert all(table[kohya_name(path)] == path for path in paths)


def test_documented_names() -> None:
    assert (
        kohya_name("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0")
        == "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    )
    assert kohya_name("text_model.encoder.layers.3.mlp.fc1", "lora_te") == "lora_te_text_model_encoder_layers_3_mlp_fc1"


def test_the_text_encoder_says_text_model_whatever_transformers_calls_it() -> None:
    """transformers >= 5.6 has no text_model in CLIPTextModel."""
    assert kohya_name("encoder.layers.3.mlp.fc1", "lora_te") == "lora_te_text_model_encoder_layers_3_mlp_fc1"
    assert with_text_model("final_layer_norm.weight") == "text_model.final_layer_norm.weight"
    assert with_text_model("text_model.final_layer_norm.weight") == "text_model.final_layer_norm.weight"


def test_te1_and_te_are_the_same_encoder_and_te2_is_another() -> None:
    assert canonical_kohya_name("lora_te1_text_model_x") == "lora_te_text_model_x"
    assert canonical_kohya_name("lora_te2_text_model_x") == "lora_te2_text_model_x"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("mid_block.attentions.0.proj_in.lora_A.default.weight", ("unet", "mid_block.attentions.0.proj_in", "down")),
        ("unet.mid_block.attentions.0.proj_in.lora_B.weight", ("unet", "mid_block.attentions.0.proj_in", "up")),
        ("base_model.model.conv_in.lora_A.weight", ("unet", "conv_in", "down")),
        ("unet.base_model.model.conv_in.lora_B.default.weight", ("unet", "conv_in", "up")),
        (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "down"),
        ),
        ("text_encoder_2.text_model.x.lora.up.weight", ("text_encoder_2", "text_model.x", "up")),
        ("unet.x.to_out.0.lora_linear_layer.down.weight", ("unet", "x.to_out.0", "down")),
        ("unet.conv_in.weight", None),
        ("unet.conv_in.base_layer.weight", None),
        ("align_heads.mid.proj.0.weight", None),
    ],
)
def test_peft_and_diffusers_keys(key: str, expected: tuple[str, str, str] | None) -> None:
    assert split_peft_key(key) == expected


def test_modules_of_a_state_dict_are_modules_of_the_model() -> None:
    unet = small_unet()
    assert set(weight_paths(unet.state_dict())) <= {path for path, _ in unet.named_modules()}
