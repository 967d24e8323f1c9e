"""Written adapter files: kohya's format to the letter, read back as they were, and at work in diffusers and PEFT."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from networks import AdapterError
from networks.adapter_export import Form, adapter_metadata, adapter_tensors, form_metadata, with_uniform_alphas
from networks.adapter_file import read_adapter
from networks.adapters import Adapter
from networks.families import SDXL, TEXT_ENCODER, TEXT_ENCODER_2, UNET
from networks.kinds.lora import LoraModule
from networks.names import Target
from networks.network import Network
from tests.tools.adapters import (
    SPEC,
    assert_same_adapter,
    cp_module,
    kohya_targets,
    model_without_weights,
    random_module,
    train_lora,
    whole_adapter,
    with_many_alphas,
    write_adapter,
    write_tensors,
)
from tests.tools.unets import small_unet

DATE = "2026-01-02T03:04:05"
CONV = Target(UNET, "mid_block.resnets.0.conv1")
PROJ_IN = Target(UNET, "mid_block.attentions.0.proj_in")
SDXL_FILE = {"ss_base_model_version": "sdxl_base_v1-0"}


@pytest.fixture(scope="module")
def network() -> Network:
    return train_lora(small_unet())


def small_adapter(**options: Any) -> Adapter:
    return whole_adapter({UNET: small_unet()}, **options)


# ------------------------------------------------------------------------------------------------ what training writes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_save_precision_holds_for_every_weight(dtype: torch.dtype) -> None:
    tensors = adapter_tensors(small_adapter(), "kohya", dtype)
    assert {value.dtype for key, value in tensors.items() if not key.endswith(".alpha")} == {dtype}
    assert {value.dtype for key, value in tensors.items() if key.endswith(".alpha")} == {torch.float32}


@pytest.mark.bits
def test_what_training_writes_is_read_back(network: Network, tmp_path: Path) -> None:
    tensors = network.tensors()
    metadata = adapter_metadata(SPEC, tensors, output_name="a", date=DATE, resolution=(512, 512))
    adapter = read_adapter(write_tensors(tmp_path, tensors, metadata))
    assert adapter.metadata == metadata
    assert_same_adapter(adapter, network.adapter())


def test_metadata_says_what_readers_look_for() -> None:
    metadata = adapter_metadata(
        SPEC,
        {},
        output_name="cat",
        date=DATE,
        resolution=(512, 768),
        base_model="models/tiny-sd15",
        extra={"ss_steps": "20", "modelspec.title": "Cat"},
    )
    assert {key: metadata[key] for key in sorted(metadata) if not key.startswith("sshs_")} == {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.date": DATE,
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x768",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "Cat",
        "repa_base_model": "models/tiny-sd15",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "2.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1.0"}',
        "ss_network_dim": "4",
        "ss_network_dropout": "None",
        "ss_network_module": "networks.lora",
        "ss_output_name": "cat",
        "ss_sd_model_name": "tiny-sd15",
        "ss_steps": "20",
        "ss_v2": "False",
    }


def test_metadata_of_sdxl_and_of_velocity_models() -> None:
    facts: dict[str, Any] = {"output_name": "a", "date": DATE, "resolution": (1024, 1024)}
    sdxl = adapter_metadata(SPEC, {}, family=SDXL, **facts)
    assert sdxl["ss_base_model_version"] == "sdxl_base_v1-0"
    assert sdxl["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert sdxl["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    velocity = adapter_metadata(SPEC, {}, prediction_type="v_prediction", **facts)
    assert (velocity["ss_base_model_version"], velocity["modelspec.prediction_type"]) == ("sd_v1_v", "v")


def test_hashes_are_kohyas(network: Network) -> None:
    """train_util.precalculate_safetensors_hashes, done over: the file with ss_ metadata only, without its header."""
    tensors = {**network.tensors(), "padding": torch.arange(400_000, dtype=torch.float32)}  # beyond 1 MiB
    metadata = adapter_metadata(SPEC, tensors, output_name="a", date="d", resolution=(512, 512))
    file = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = file[8 + int.from_bytes(file[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]


def test_the_name_of_the_home_folder_is_not_published() -> None:
    base = Path.home() / "models" / "mine.safetensors"
    metadata = adapter_metadata(SPEC, {}, output_name="a", date="d", resolution=(8, 8), base_model=str(base))
    assert Path(metadata["repa_base_model"]) == Path("~/models/mine.safetensors")


# ------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_what_is_written_is_read_back_with_every_alpha_that_the_form_has_a_place_for(
    form: Form, tmp_path: Path
) -> None:
    adapter = small_adapter() if form == "kohya" else with_many_alphas(small_adapter())
    assert_same_adapter(read_adapter(write_adapter(adapter, form, tmp_path)), adapter)


@cache
def sdxl_layers() -> dict[Target, nn.Module]:
    found: dict[Target, nn.Module] = {}
    for component in (UNET, TEXT_ENCODER, TEXT_ENCODER_2):
        found |= kohya_targets(component, model_without_weights("sdxl", component), conv=True)
    return found


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_all_modules_of_the_real_sdxl_are_read_back(form: Form, tmp_path: Path) -> None:
    modules = {
        target: LoraModule(
            torch.rand(1, 2, *layer.weight.shape[2:]), torch.rand(3, 1, *(1,) * (layer.weight.ndim - 2)), 1.0
        )
        for target, layer in sdxl_layers().items()
    }
    adapter = Adapter(modules, SDXL_FILE)
    path = write_adapter(adapter, form, tmp_path)
    assert_same_adapter(read_adapter(path), adapter)
    assert read_adapter(path).family is SDXL
    if form == "kohya":
        names = adapter_tensors(adapter, form)
        assert "lora_unet_input_blocks_3_0_op.lora_down.weight" in names
        assert not any(word in name for name in names for word in ("down_blocks", "up_blocks", "mid_block"))


def test_keys_of_each_form() -> None:
    text = Target(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1")
    adapter = Adapter({PROJ_IN: random_module(4, 4), text: random_module(4, 4)})
    assert list(adapter_tensors(adapter, "kohya")) == [
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
        "lora_unet_mid_block_attentions_0_proj_in.alpha",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    ]
    assert list(adapter_tensors(adapter, "diffusers")) == [
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "unet.mid_block.attentions.0.proj_in.lora_B.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
    ]
    assert list(adapter_tensors(Adapter({PROJ_IN: random_module(4, 4)}), "peft")) == [
        "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight",
        "base_model.model.mid_block.attentions.0.proj_in.lora_B.weight",
    ]
    with pytest.raises(
        AdapterError, match="PEFT's format holds an adapter of one model, .* of the text_encoder as well"
    ):
        adapter_tensors(adapter, "peft")


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_a_cp_decomposed_convolution_is_written_as_an_ordinary_one(form: Form, tmp_path: Path) -> None:
    module = cp_module(5, 4)
    read = read_adapter(write_adapter(Adapter({CONV: module}), form, tmp_path)).modules[CONV]
    assert read.mid is None and read.down.shape == (3, 4, 3, 3)
    torch.testing.assert_close(read.product(), module.product())


def test_dora_is_not_written() -> None:
    module = replace(random_module(4, 4), magnitude=torch.ones(4, 1))
    adapter = Adapter({PROJ_IN: module, CONV: random_module(4, 4, 3, 3)})
    expected = "1 of 2 modules are DoRA .first: mid_block.attentions.0.proj_in., .* Merge it into a base model instead."
    for form in ("kohya", "diffusers", "peft"):
        with pytest.raises(AdapterError, match=expected):
            adapter_tensors(adapter, form)


def test_a_module_that_sdxl_does_not_have_is_named() -> None:
    adapter = Adapter({Target(UNET, "down_blocks.3.resnets.0.conv9"): random_module(4, 4)}, SDXL_FILE)
    with pytest.raises(AdapterError, match="down_blocks.3.resnets.0.conv9 is no module of SDXL, so kohya has no name"):
        adapter_tensors(adapter, "kohya")


def test_metadata_of_a_converted_file() -> None:
    source = {
        "ss_base_model_version": "sd_1.5",
        "ss_network_dim": "128",
        "ss_steps": "20",
        "repa_base_model": "models/tiny-sd15",
        "lora_spec": "{}",
        "sshs_model_hash": "0",
        "format": "pt",
    }
    proj_out = PROJ_IN._replace(path="mid_block.attentions.0.proj_out")
    modules = {target: random_module(4, 4) for target in (PROJ_IN, proj_out)}
    adapter = Adapter({**modules, CONV: random_module(4, 4, 3, 3, rank=2, alpha=1.0)}, source)
    tensors = adapter_tensors(adapter, "kohya")
    metadata = form_metadata(adapter, "kohya", tensors, output_name="b", date=DATE)
    assert {key: metadata[key] for key in sorted(metadata) if not key.startswith("sshs_")} == {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.date": DATE,
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x512",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "b",
        "repa_base_model": "models/tiny-sd15",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "2.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1.0"}',
        "ss_network_dim": "3",
        "ss_network_module": "networks.lora",
        "ss_output_name": "b",
        "ss_steps": "20",
        "ss_v2": "False",
    }
    assert len(metadata["sshs_model_hash"]) == 64
    others = form_metadata(adapter, "diffusers", adapter_tensors(adapter, "diffusers"), output_name="b", date=DATE)
    assert others["format"] == "pt" and "sshs_model_hash" not in others and "lora_spec" not in others


def test_ranks_that_differ_are_dynamic() -> None:
    other = Target(UNET, "mid_block.attentions.0.proj_out")
    adapter = Adapter({PROJ_IN: random_module(4, 4, rank=2), other: random_module(4, 4, rank=3)})
    metadata = form_metadata(adapter, "kohya", {}, output_name="a", date=DATE)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "2.0")


# ------------------------------------------------------------------------------------------------ alphas


def alphas_of(adapter: Adapter) -> dict[tuple[str, bool], set[float]]:
    found: dict[tuple[str, bool], set[float]] = {}
    for target, module in adapter.modules.items():
        found.setdefault((target.component, module.kernel == 1), set()).add(module.alpha)
    return found


def test_an_adapter_of_uniform_alphas_is_left_alone() -> None:
    adapter = small_adapter()
    assert with_uniform_alphas(adapter) is adapter


def test_alphas_become_one_per_kind_of_layer_and_nothing_else_changes() -> None:
    adapter = with_many_alphas(small_adapter())
    uniform = with_uniform_alphas(adapter)
    assert {kind: len(alphas) for kind, alphas in alphas_of(adapter).items()} == {(UNET, True): 3, (UNET, False): 3}
    assert {kind: len(alphas) for kind, alphas in alphas_of(uniform).items()} == {(UNET, True): 1, (UNET, False): 1}
    for target, module in adapter.modules.items():
        assert uniform.modules[target].rank == module.rank
        torch.testing.assert_close(uniform.modules[target].product(), module.product(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "alphas", [(0.0, 3.0, 3.0), (3.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 5.0, 0.0), (-1.0, 2.0, 2.0)]
)
def test_an_alpha_of_zero_stays_a_module_of_zero(alphas: tuple[float, ...]) -> None:
    targets = (PROJ_IN, CONV, CONV._replace(path="mid_block.resnets.1.conv1"))
    shapes = ((4, 4), (4, 4, 3, 3), (4, 4, 3, 3))
    modules = {t: random_module(*shape, alpha=alpha) for t, shape, alpha in zip(targets, shapes, alphas, strict=True)}
    uniform = with_uniform_alphas(Adapter(modules))
    for target, module in modules.items():
        torch.testing.assert_close(uniform.modules[target].product(), module.product())


def test_a_file_in_half_precision_is_near_enough(tmp_path: Path) -> None:
    adapter = small_adapter()
    tensors = adapter_tensors(adapter, "kohya", torch.float16)
    save_file(tensors, tmp_path / "half.safetensors")
    read = read_adapter(tmp_path / "half.safetensors")
    for target, module in adapter.modules.items():
        torch.testing.assert_close(read.modules[target].product(), module.product(), rtol=0, atol=2e-3)
