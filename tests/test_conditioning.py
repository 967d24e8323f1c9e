"""Prompts become what the U-Net was trained to take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from library.errors import UserError
from library.models.conditioning import TextConditioner
from library.models.load import load_text_encoders
from networks.families import SD15, SDXL

PROMPTS = ["a red circle", "", "blue square on a green background"]
LONG = ", ".join(f"red circle {i}" for i in range(40))


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> TextConditioner:
    return TextConditioner(SD15, load_text_encoders(str(tiny_sd15)))


@pytest.mark.bits
@torch.no_grad()
def test_short_prompts_of_sd15_are_the_pipelines(sd15: TextConditioner, tiny_sd15: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    for skip in (1, 2):
        conditioner = TextConditioner(SD15, sd15.parts, clip_skip=skip)
        expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=None if skip == 1 else skip - 1)
        assert torch.equal(conditioner(PROMPTS).states, expected)
        assert conditioner(PROMPTS).pooled is None


@pytest.mark.bits
@torch.no_grad()
def test_short_prompts_of_sdxl_are_the_pipelines(tiny_sdxl: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    conditioner = TextConditioner(SDXL, load_text_encoders(str(tiny_sdxl)), clip_skip=2)
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    found = conditioner(PROMPTS)
    assert torch.equal(found.states, states)
    assert found.pooled is not None and torch.equal(found.pooled, pooled)


@torch.no_grad()
def test_a_long_prompt_is_encoded_chunk_by_chunk(sd15: TextConditioner) -> None:
    conditioner = TextConditioner(SD15, sd15.parts, chunks=3)
    tokenizer, model = sd15.parts[0].tokenizer, sd15.parts[0].model
    tokens = tokenizer(LONG, add_special_tokens=False).input_ids
    assert len(tokens) > 75
    pieces = []
    for start in (0, 75, 150):
        part = tokens[start : start + 75]
        ids = [tokenizer.bos_token_id, *part, *[tokenizer.eos_token_id] * (76 - len(part))]
        pieces.append(model(torch.tensor([ids])).last_hidden_state[0])
    expected = torch.cat([pieces[0][:1], *[piece[1:76] for piece in pieces], pieces[2][76:]])
    found = conditioner([LONG]).states[0]
    assert found.shape == (227, model.config.hidden_size)
    assert torch.allclose(found, expected, atol=1e-5)


def test_prompts_that_are_cut_are_named(sd15: TextConditioner) -> None:
    words = "red " * 80
    assert sd15.overlong([*PROMPTS, words]) == [3]
    assert TextConditioner(SD15, sd15.parts, chunks=2).overlong([words]) == []


def test_gradients_reach_the_encoder(tiny_sd15: Path) -> None:
    parts = load_text_encoders(str(tiny_sd15))
    weight = parts[0].model.text_model.encoder.layers[0].mlp.fc1.weight
    weight.requires_grad_(True)
    TextConditioner(SD15, parts, clip_skip=2)(["a red circle"]).states.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_layers_that_are_not_there_are_refused(sd15: TextConditioner) -> None:
    with pytest.raises(UserError, match="clip_skip must lie between 1 and 12"):
        TextConditioner(SD15, sd15.parts, clip_skip=13)
