"""Every tensor of the published models has one place in the original single file, where diffusers' own converters find it."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE
from networks.original_names import Form, Place, diffusers_keys, original_place, unet_from_original, unet_to_original
from tests.tools.adapters import model_without_weights

# Tensors in an original file, by component: of the published files.
COUNTS = {
    ("sd15", UNET): 686,
    ("sd15", VAE): 248,
    ("sd15", TEXT_ENCODER): 196,
    ("sdxl", UNET): 1680,
    ("sdxl", VAE): 248,
    ("sdxl", TEXT_ENCODER): 196,
    ("sdxl", TEXT_ENCODER_2): 389,
}
PARTS = sorted(COUNTS)


def places(family: str, component: str) -> dict[str, Place]:
    keys = model_without_weights(family, component).state_dict()
    return {key: original_place(FAMILIES[family], component, key) for key in keys}


@pytest.mark.parametrize(("family", "component"), PARTS)
def test_every_tensor_has_a_place_of_its_own_and_leads_back(family: str, component: str) -> None:
    found = places(family, component)
    assert len({place.key for place in found.values()}) == COUNTS[family, component]
    assert len({(place.key, place.part) for place in found.values()}) == len(found)
    for key, place in found.items():
        back = diffusers_keys(FAMILIES[family], place.key)
        assert back[place.part] == (component, key)
        assert len(back) == (3 if place.form is Form.STACKED else 1)


def test_the_numbers_of_tensors_are_those_of_the_published_files() -> None:
    assert sum(count for (family, _), count in COUNTS.items() if family == "sd15") == 1130
    assert sum(count for (family, _), count in COUNTS.items() if family == "sdxl") == 2513


def indices(found: dict[str, Place], ndim: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """(an original file whose every tensor is one number of its own, the number of each diffusers key)"""
    numbers = {key: number for number, key in enumerate(found)}
    file = {
        place.key: torch.full((1,) * (4 if place.form is Form.CONVOLUTION else ndim), float(numbers[key]))
        for key, place in found.items()
    }
    return file, numbers


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_own_converter_finds_the_unet(family: str) -> None:
    file, numbers = indices(places(family, UNET))
    config = {**model_without_weights(family, UNET).config, "class_embed_type": None}
    converted = convert_ldm_unet_checkpoint(file, config=config)
    assert {key: int(value) for key, value in converted.items()} == numbers


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_own_converter_finds_the_vae(family: str) -> None:
    file, numbers = indices(places(family, VAE))
    assert sum(value.ndim == 4 for value in file.values()) == 8, "the attention of encoder and decoder"
    converted = convert_ldm_vae_checkpoint(file, config=dict(model_without_weights(family, VAE).config))
    assert {key: int(value) for key, value in converted.items()} == numbers


def test_diffusers_own_converter_finds_the_second_text_encoder() -> None:
    found = places("sdxl", TEXT_ENCODER_2)
    numbers = {key: number for number, key in enumerate(found)}
    file: dict[str, torch.Tensor] = {}
    for key, place in found.items():
        if place.form is Form.STACKED:
            shape = (3, 1) if place.key.endswith("weight") else (3,)
            file.setdefault(place.key, torch.zeros(shape))[place.part] = numbers[key]
        else:
            file[place.key] = torch.full((1, 1), float(numbers[key]))
    model = model_without_weights("sdxl", TEXT_ENCODER_2)
    converted = convert_open_clip_checkpoint(model, file, prefix=SDXL.original[TEXT_ENCODER_2])
    assert {key: int(value) for key, value in converted.items()} == numbers
    assert [key for key, place in found.items() if place.form is Form.TRANSPOSED] == ["text_projection.weight"]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_unet_modules_lead_there_and_back(family: str) -> None:
    paths = {key.rpartition(".")[0] for key in model_without_weights(family, UNET).state_dict()}
    for path in paths:
        assert unet_from_original(FAMILIES[family], unet_to_original(FAMILIES[family], path)) == path


@pytest.mark.parametrize(
    ("family", "component", "key", "place"),
    [
        (
            SD15,
            UNET,
            "up_blocks.0.upsamplers.0.conv.weight",
            Place("model.diffusion_model.output_blocks.2.1.conv.weight"),
        ),
        (
            SDXL,
            UNET,
            "up_blocks.0.upsamplers.0.conv.weight",
            Place("model.diffusion_model.output_blocks.2.2.conv.weight"),
        ),
        (SDXL, UNET, "add_embedding.linear_2.bias", Place("model.diffusion_model.label_emb.0.2.bias")),
        (
            SD15,
            VAE,
            "decoder.up_blocks.0.resnets.2.conv1.bias",
            Place("first_stage_model.decoder.up.3.block.2.conv1.bias"),
        ),
        (
            SD15,
            VAE,
            "encoder.mid_block.attentions.0.to_q.weight",
            Place("first_stage_model.encoder.mid.attn_1.q.weight", Form.CONVOLUTION),
        ),
        (
            SD15,
            TEXT_ENCODER,
            "encoder.layers.0.mlp.fc1.weight",  # as transformers >= 5.6 says
            Place("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"),
        ),
        (
            SDXL,
            TEXT_ENCODER_2,
            "text_model.encoder.layers.7.self_attn.v_proj.bias",
            Place("conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_bias", Form.STACKED, 2),
        ),
    ],
)
def test_documented_places(family: object, component: str, key: str, place: Place) -> None:
    assert original_place(family, component, key) == place


@pytest.mark.parametrize("key", ["down_blocks.0.conv9.weight", "down_blocks.0.resnets.0.weight", "x"])
def test_a_name_of_another_model_has_no_place(key: str) -> None:
    with pytest.raises(KeyError):
        original_place(SD15, UNET, key)


@pytest.mark.parametrize(
    "key",
    [
        "model_ema.decay",
        "alphas_cumprod",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "model.diffusion_model.double_blocks.0.img_attn.proj.weight",
        "first_stage_model.loss.logvar",
    ],
)
def test_what_is_no_weight_of_the_model_leads_nowhere(key: str) -> None:
    assert diffusers_keys(SD15, key) == []
