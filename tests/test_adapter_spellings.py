"""Adapter files in the names of every program that writes them mean the same modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from networks.adapter_file import read_adapter
from networks.families import FAMILIES, SD15, TEXT_ENCODER, TEXT_ENCODER_2, UNET, Family
from networks.names import Target, parse_module_name, with_text_model
from networks.network import add_network
from networks.original_names import unet_to_original
from tests.tools.adapters import kohya_module, model_without_weights, one_module, write_tensors
from tests.tools.networks import assert_same_outputs, few, small_models, trained_network
from tests.tools.unets import small_unet

CONV_IN = Target(UNET, "conv_in")
Spelling = Callable[[Family, Target], str]


def comfyui(family: Family, target: Target) -> str:
    if target.component == UNET:
        return f"diffusion_model.{unet_to_original(family, target.path)}"
    return f"text_encoders.clip_{'g' if target.component == TEXT_ENCODER_2 else 'l'}.transformer.{target.path}"


def onetrainer(family: Family, target: Target) -> str:
    """Its OMI form; the other one is kohya's."""
    if target.component == UNET:
        return f"unet.{unet_to_original(family, target.path)}"
    return f"clip_{'g' if target.component == TEXT_ENCODER_2 else 'l'}.{target.path}"


def onetrainers_backup(family: Family, target: Target) -> str:
    prefix = {UNET: "lora_unet", TEXT_ENCODER: "lora_te1", TEXT_ENCODER_2: "lora_te2"}[target.component]
    return f"{prefix}.{target.path}"


def kohya_of_diffusers_converter(family: Family, target: Target) -> str:
    """PEFT's prefix stays in its names."""
    prefix = {UNET: "lora_unet", TEXT_ENCODER: "lora_te1", TEXT_ENCODER_2: "lora_te2"}[target.component]
    return f"{prefix}_base_model_model_{target.path.replace('.', '_')}"


def peft_within(family: Family, target: Target) -> str:
    return f"base_model.model.{target.component}.{target.path}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spelling", [comfyui, onetrainer, onetrainers_backup, kohya_of_diffusers_converter, peft_within]
)
def test_every_module_with_a_weight_is_found_by_its_name(family: str, spelling: Spelling) -> None:
    for component in (UNET, *FAMILIES[family].text_encoders):
        for path, module in model_without_weights(family, component).named_modules():
            if getattr(module, "weight", None) is not None:
                target = Target(component, path if component == UNET else with_text_model(path))
                assert parse_module_name(spelling(FAMILIES[family], target)) == target


def test_simpletuners_names_say_no_component() -> None:
    for path, module in model_without_weights("sdxl", UNET).named_modules():
        if getattr(module, "weight", None) is not None:
            assert parse_module_name(f"lycoris_{path.replace('.', '_')}") == Target(UNET, path)
    name = "lycoris_text_model_encoder_layers_0_mlp_fc1"
    assert parse_module_name(name) == Target(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1")
    assert parse_module_name("lycoris_transformer_blocks_0_attn_to_q") is None


def test_old_names_of_diffusers_mean_what_its_own_converters_make_of_them(tmp_path: Path) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2"
    text = "text_encoder.text_model.encoder.layers.1.self_attn"
    unet = {f"unet.{attention}.processor.{name}_lora.{part}.weight" for name in ("to_q", "to_k", "to_v", "to_out")
            for part in ("down", "up")}  # fmt: skip
    texts = {f"{text}.{name}_lora.{part}.weight" for name in ("to_q", "to_k", "to_v", "to_out")
             for part in ("down", "up")}  # fmt: skip
    texts |= {f"{text.replace('self_attn', 'mlp')}.fc1.lora_linear_layer.{part}.weight" for part in ("down", "up")}
    tensors = {key: torch.randn((2, 4) if ".down." in key else (8, 2)) for key in sorted(unet | texts)}
    old = read_adapter(write_tensors(tmp_path, tensors)).lora_modules("this test")
    new = convert_unet_state_dict_to_peft({key: tensors[key] for key in unet})
    new |= convert_state_dict_to_peft({key: tensors[key] for key in texts})
    new = {key.replace(".processor.", "."): value for key, value in new.items()}
    expected = read_adapter(write_tensors(tmp_path, new)).lora_modules("this test")
    assert old.keys() == expected.keys() and len(old) == 9
    for target, module in expected.items():
        assert torch.equal(old[target].down, module.down) and torch.equal(old[target].up, module.up)


@pytest.mark.parametrize("name", ["default", "default_0", "my-lora", "Mio v2", "a+b"])
def test_pefts_name_of_the_adapter_may_be_any(name: str, tmp_path: Path) -> None:
    unet = small_unet()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    inject_adapter_in_model(config, unet, adapter_name=name)
    state = {key: value for key, value in unet.state_dict().items() if ".lora_" in key}
    assert any(f".lora_A.{name}.weight" in key for key in state)
    adapter = read_adapter(write_tensors(tmp_path, state))
    layers = {path: module for path, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert {target.path for target in adapter.modules} == layers.keys()
    for target, module in adapter.modules.items():
        layer: nn.Module = layers[target.path]
        expected = layer.get_delta_weight(name)  # type: ignore[operator]
        torch.testing.assert_close(module.delta(layer.base_layer.weight), expected, rtol=0, atol=1e-6)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    "keys",
    [
        ("lora_unet_conv_in.lora_down.WEIGHT", "lora_unet_conv_in.lora_up.WEIGHT", "lora_unet_conv_in.ALPHA"),
        ("lora_unet_conv_in.LORA_DOWN.weight", "lora_unet_conv_in.LORA_UP.weight", "lora_unet_conv_in.Alpha"),
        ("unet.conv_in.lora_a.weight", "unet.conv_in.lora_b.weight", "unet.conv_in.alpha"),
        ("unet.conv_in.lora_A.WEIGHT", "unet.conv_in.lora_B.WEIGHT", "unet.conv_in.alpha"),
        ("conv_in.LORA.DOWN.weight", "conv_in.LORA.UP.weight", "conv_in.alpha"),
    ],
)
def test_endings_may_be_in_capitals(keys: tuple[str, ...], tmp_path: Path) -> None:
    tensors = dict(zip(keys, (torch.ones(2, 4), torch.ones(8, 2), torch.tensor(3.0)), strict=True))
    adapter = read_adapter(write_tensors(tmp_path, tensors).rename(tmp_path / "A.SAFETENSORS"))
    assert {target: module.alpha for target, module in adapter.modules.items()} == {CONV_IN: 3.0}


def test_an_alpha_beside_pefts_names_is_the_modules(tmp_path: Path) -> None:
    adapter = read_adapter(write_tensors(tmp_path, {**one_module(), "unet.conv_in.alpha": torch.tensor(5.0)}))
    assert adapter.modules[CONV_IN].alpha == 5.0 and adapter.notes == ()


@pytest.mark.parametrize(
    ("others", "note"),
    [
        (
            ["bundle_emb.cat.clip_l", "bundle_emb.cat.clip_g"],
            "left out: 2 tensors of the textual inversion embedding cat, which is not read",
        ),
        (
            ["bundle_emb.my cat.string_to_param.*"],
            "left out: 1 tensor of the textual inversion embedding my cat, which is not read",
        ),
        (["bundle_emb.x.emb_params"], "left out: 1 tensor of the textual inversion embedding x, which is not read"),
        (
            ["lora_unet_conv_out.alpha", "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"],
            "left out: 2 tensors of modules that it has no other weights of",
        ),
        (["align_heads.mid.proj.0.weight"], "left out: 1 tensor of AlignHeads, which only training needs"),
        (
            ["text_encoders.clip_l.transformer.text_projection.lora_up.weight"],
            "left out: 1 tensor of the first text encoder's text_projection, which Stable Diffusion does not use",
        ),
    ],
)
def test_what_is_no_part_of_the_adapter_is_left_out_and_that_is_said(
    others: list[str], note: str, tmp_path: Path
) -> None:
    rest: dict[str, Tensor] = dict.fromkeys(others, torch.ones(1))
    adapter = read_adapter(write_tensors(tmp_path, {**kohya_module(), **rest}))
    assert list(adapter.modules) == [CONV_IN]
    assert adapter.notes == (note,) and set(adapter.left_out) == set(others)


@pytest.mark.parametrize(
    "spelling", [comfyui, onetrainer, onetrainers_backup, kohya_of_diffusers_converter, peft_within]
)
def test_training_goes_on_from_a_file_in_any_programs_names(spelling: Spelling, tmp_path: Path) -> None:
    models, trained = trained_network(few())
    tensors = {
        f"{spelling(SD15, target)}.{suffix}": value
        for target, module in trained.adapter().modules.items()
        for suffix, value in {**module.tensors(), "alpha": torch.tensor(module.alpha)}.items()
    }
    fresh = small_models()
    network = add_network(fresh, few(), seed=1)
    network.load(read_adapter(write_tensors(tmp_path, tensors)))
    assert_same_outputs(fresh, models)
