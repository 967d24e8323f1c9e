"""Weighted prompts become what A1111 would hand to the U-Net."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from library.errors import UserError
from library.inference.prompt_encoding import (
    Chunk,
    PromptEncoder,
    cut_into_chunks,
    empty_conditioning,
    padded_ids,
)
from library.inference.prompt_syntax import Span, parse_prompt, weighted_spans
from library.models.clip_tokenizer import CLIP_VOCABULARY_SIZE, tokenizer_for
from library.models.load import TextPart, load_text_encoders
from networks.families import SD15, SDXL

VECTORS = json.loads((Path(__file__).parent / "data" / "prompt_vectors.json").read_text(encoding="utf-8"))
PROMPTS = ["a red circle", "", "blue square on a green background"]
LONG = ", ".join(f"red circle {i}" for i in range(40))


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> PromptEncoder:
    return PromptEncoder(SD15, load_text_encoders(str(tiny_sd15)))


@pytest.fixture(scope="module")
def shifted(tiny_sd15: Path) -> PromptEncoder:
    """Its states have a mean, as those of trained encoders do."""
    parts = load_text_encoders(str(tiny_sd15))
    with torch.no_grad():
        parts[0].model.text_model.final_layer_norm.bias.normal_(-0.1, 0.2, generator=torch.Generator().manual_seed(0))
    return PromptEncoder(SD15, parts)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> PromptEncoder:
    return PromptEncoder(SDXL, load_text_encoders(str(tiny_sdxl)))


@pytest.fixture(scope="module")
def clip() -> TextPart:
    """The real vocabulary; no model is needed to cut."""
    nothing: Any = None
    return TextPart("text_encoder", tokenizer_for(CLIP_VOCABULARY_SIZE, "CLIP"), nothing)


def one(encoder: PromptEncoder, text: str, **more: Any) -> torch.Tensor:
    return encoder.encode_texts([weighted_spans(text)], **more).states[0]


@pytest.mark.bits
@torch.no_grad()
def test_plain_prompts_of_sd15_are_the_pipelines(sd15: PromptEncoder, tiny_sd15: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15)
    for skip in (1, 2):
        encoder = PromptEncoder(SD15, sd15.parts, clip_skip=skip)
        expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=None if skip == 1 else skip - 1)
        found = encoder.encode_texts([weighted_spans(text) for text in PROMPTS])
        assert torch.equal(found.states, expected) and found.pooled is None


@pytest.mark.bits
@torch.no_grad()
def test_plain_prompts_of_sdxl_are_the_pipelines(sdxl: PromptEncoder, tiny_sdxl: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    found = sdxl.encode_texts([weighted_spans(text) for text in PROMPTS])
    assert torch.equal(found.states, states)
    assert found.pooled is not None and torch.equal(found.pooled, pooled)


@pytest.mark.parametrize("case", VECTORS["a1111"], ids=range(len(VECTORS["a1111"])))
def test_chunks_hold_the_tokens_and_weights_they_hold_in_a1111(clip: TextPart, case: dict[str, Any]) -> None:
    for part, expected in zip(parse_prompt(case["prompt"], VECTORS["steps"]).parts, case["parts"], strict=True):
        for scheduled, text in zip(part.schedule, expected["schedule"], strict=True):
            chunks = cut_into_chunks(scheduled.spans, clip)
            assert [len(chunk.tokens) for chunk in chunks] == [chunk["tokens"] for chunk in text["chunks"]]
            for chunk, facts in zip(chunks, text["chunks"], strict=True):
                weights = [1.0, *chunk.weights, *[1.0] * 12][:12]
                assert weights == pytest.approx(facts["first_multipliers"], abs=1e-6)


def spans(*texts: str) -> list[Span]:
    return [Span(text, -1.0 if text == "BREAK" else 1.0) for text in texts]


def counts(chunks: list[Chunk]) -> list[int]:
    return [len(chunk.tokens) for chunk in chunks]


def test_only_a_comma_near_the_end_moves_words(clip: TextPart) -> None:
    words = "cat " * 20
    assert counts(cut_into_chunks(spans("cat " * 54 + "," + words + "cat"), clip)) == [75, 1]
    assert counts(cut_into_chunks(spans("cat " * 55 + "," + words), clip)) == [56, 20]
    assert counts(cut_into_chunks(spans("cat " * 54 + "," + words + "cat"), clip, backtrack=0)) == [75, 1]
    assert counts(cut_into_chunks(spans("cat " * 75 + ", cat"), clip)) == [75, 2]


def test_words_that_move_keep_their_weights(clip: TextPart) -> None:
    chunks = cut_into_chunks([Span("cat " * 70 + ",", 1.0), Span("cat " * 6, 1.5)], clip)
    assert counts(chunks) == [71, 6] and chunks[1].weights == [1.5] * 6


def test_breaks_close_chunks(clip: TextPart) -> None:
    assert counts(cut_into_chunks(weighted_spans("cat BREAK dog BREAK"), clip)) == [1, 1]
    assert counts(cut_into_chunks(weighted_spans("BREAK BREAK cat"), clip)) == [0, 0, 1]
    assert counts(cut_into_chunks(weighted_spans(""), clip)) == [0]


def test_each_encoder_has_its_padding(sdxl: PromptEncoder) -> None:
    first, second = sdxl.parts
    end = first.tokenizer.eos_token_id
    assert padded_ids(Chunk([5], [1.0]), first) == [first.tokenizer.bos_token_id, 5, end, *[end] * 74]
    assert padded_ids(Chunk([5], [1.0]), second)[2:] == [end, *[0] * 74]


@torch.no_grad()
@pytest.mark.parametrize("emphasis", ["original", "no norm"])
def test_weights_multiply_states_and_the_mean_is_restored(shifted: PromptEncoder, emphasis: Any) -> None:
    encoder = PromptEncoder(SD15, shifted.parts, emphasis=emphasis)
    tokenizer, model = shifted.parts[0].tokenizer, shifted.parts[0].model
    plain = one(shifted, "a red circle")
    weights = [1.0] * 77
    for index, token in enumerate(tokenizer("a red circle").input_ids):
        if token == tokenizer("red").input_ids[1]:
            weights[index] = 1.5
    slow = torch.stack([plain[i] * weights[i] for i in range(77)])
    if emphasis == "original":
        slow = slow * (sum(plain.flatten().tolist()) / sum(slow.flatten().tolist()))
    torch.testing.assert_close(one(encoder, "a (red:1.5) circle"), slow, rtol=1e-4, atol=1e-5)
    assert weights.count(1.5) == 1 and plain.shape == (77, model.config.hidden_size)


@pytest.mark.bits
def test_states_without_a_mean_are_not_scaled_by_noise(sd15: PromptEncoder) -> None:
    """The tiny encoder's final norm is untrained: its means are rounding errors."""
    bare = PromptEncoder(SD15, sd15.parts, emphasis="no norm")
    assert torch.equal(one(sd15, "a (red:1.5) circle"), one(bare, "a (red:1.5) circle"))


def test_the_mean_is_taken_over_the_texts_of_a_schedule(shifted: PromptEncoder) -> None:
    """Each as often as it stands in the schedule: A1111 encodes all of them in one batch."""
    (part,) = shifted.encode(parse_prompt("[(red:1.5)|blue|blue]", 6))
    texts = ["(red:1.5)", "blue", "blue"] * 2
    expected = shifted.encode_texts([weighted_spans(text) for text in texts]).states
    assert part.untils == (1, 2, 3, 4, 5, 6)
    for step, states in enumerate(expected, 1):
        torch.testing.assert_close(part.at_step(step).states[0], states, rtol=1e-5, atol=1e-6)
    assert part.at_step(2).states is part.at_step(3).states


def test_long_prompts_are_joined_with_their_markers(sd15: PromptEncoder) -> None:
    chunks = cut_into_chunks(weighted_spans(LONG), sd15.parts[0])
    found = one(sd15, LONG)
    assert len(chunks) > 1 and found.shape[0] == 77 * len(chunks)
    torch.testing.assert_close(one(sd15, "a red circle BREAK blue")[77:], one(sd15, "blue"))


def test_the_pooled_state_is_the_first_chunks(sdxl: PromptEncoder) -> None:
    whole = sdxl.encode_texts([weighted_spans("a (red:1.4) circle BREAK blue")]).pooled
    first = sdxl.encode_texts([weighted_spans("a red circle")]).pooled
    assert whole is not None and first is not None
    torch.testing.assert_close(whole, first)


def test_each_encoder_of_sdxl_keeps_its_own_mean(sdxl: PromptEncoder) -> None:
    width = sdxl.parts[0].model.config.hidden_size
    plain, weighted = one(sdxl, "a red circle"), one(sdxl, "a (red:1.5) circle")
    for side in (slice(None, width), slice(width, None)):
        torch.testing.assert_close(plain[:, side].mean(), weighted[:, side].mean(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(plain[:, side], weighted[:, side])


def test_the_shorter_texts_of_a_schedule_get_empty_chunks(sd15: PromptEncoder) -> None:
    (part,) = sd15.encode(parse_prompt(f"[blue:{LONG}:1]", 2))
    (short,) = sd15.encode(parse_prompt("blue", 2))
    filling = sd15.encode_texts([weighted_spans("")]).states
    assert part.length > short.length
    torch.testing.assert_close(part.at_step(1).states, short.filled(part.length, filling).at_step(1).states)
    assert short.filled(77, filling) is short


@pytest.mark.bits
def test_parts_of_an_and_are_encoded_apart(sd15: PromptEncoder) -> None:
    parts = sd15.encode(parse_prompt("a red circle AND blue :0.5", 20))
    assert [part.weight for part in parts] == [1.0, 0.5]
    assert torch.equal(parts[0].at_step(1).states[0], one(sd15, "a red circle"))


def test_no_prompt_of_sdxl_is_zeros(sdxl: PromptEncoder) -> None:
    found = empty_conditioning(sdxl.encode_texts([weighted_spans("")]))
    assert found.pooled is not None and not found.states.any() and not found.pooled.any()


def test_layers_that_are_not_there_are_refused(sd15: PromptEncoder) -> None:
    with pytest.raises(UserError, match="clip_skip must lie between 1 and 12"):
        PromptEncoder(SD15, sd15.parts, clip_skip=13)
