"""Prompt, denoiser and sampler together draw what diffusers' pipelines draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from library.diffusion.scheduler_config import parametrisation_of
from library.inference.denoiser import GuidedDenoiser
from library.inference.prompt_encoding import EncodedPart, PromptEncoder, same_length
from library.inference.prompt_syntax import parse_negative, parse_prompt
from library.inference.samplers import euler, no_noise
from library.inference.sigmas import noise_levels
from library.models.load import load_text_encoders
from networks.families import SD15, SDXL, Family

STEPS = 4


class Drawn:
    """A tiny base, its pipeline on Euler with Karras' levels, and the same by our own parts."""

    def __init__(self, family: Family, folder: Path, prediction_type: str = "epsilon") -> None:
        kind = StableDiffusionXLPipeline if family == SDXL else StableDiffusionPipeline
        self.family, self.pipeline = family, kind.from_pretrained(folder, use_safetensors=True)
        self.pipeline.set_progress_bar_config(disable=True)
        config = {**self.pipeline.scheduler.config, "prediction_type": prediction_type}
        self.pipeline.scheduler = EulerDiscreteScheduler.from_config(
            config, use_karras_sigmas=True, timestep_spacing="linspace"
        )
        self.parametrisation = parametrisation_of(config)
        self.encoder = PromptEncoder(family, load_text_encoders(str(folder)))
        self.noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def theirs(self, prompt: str, negative: str, cfg_scale: float) -> torch.Tensor:
        return self.pipeline(
            [prompt] * 2,
            negative_prompt=[negative] * 2,
            num_inference_steps=STEPS,
            guidance_scale=cfg_scale,
            height=128,
            width=128,
            latents=self.noise,
            output_type="latent",
        ).images

    def ours(self, prompt: str, negative: str, cfg_scale: float, noise: torch.Tensor | None = None) -> torch.Tensor:
        denoiser = self.denoiser(prompt, negative, cfg_scale)
        sigmas = noise_levels("Karras", STEPS, self.parametrisation.levels, self.family)
        begin = (self.noise if noise is None else noise) * float(sigmas[0])
        return euler(denoiser, begin, sigmas, no_noise)

    def denoiser(self, prompt: str, negative: str, cfg_scale: float, **more: Any) -> GuidedDenoiser:
        encoded = self.encoder.encode(parse_prompt(prompt, STEPS))
        (plain,) = self.encoder.encode(parse_negative(negative, STEPS))
        sizes = [128, 128, 0, 0, 128, 128] if self.family == SDXL else None
        return GuidedDenoiser(
            self.pipeline.unet,
            self.parametrisation,
            encoded,
            plain,
            cfg_scale=cfg_scale,
            size_ids=sizes,
            **more,
        )


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> Drawn:
    return Drawn(SD15, tiny_sd15)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Drawn:
    return Drawn(SDXL, tiny_sdxl)


@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
def test_sd15_is_the_pipelines(sd15: Drawn, cfg_scale: float) -> None:
    asked = ("a red circle", "blue", cfg_scale)
    torch.testing.assert_close(sd15.ours(*asked), sd15.theirs(*asked), rtol=1e-3, atol=1e-3)


def test_velocity_is_the_pipelines(tiny_sd15: Path) -> None:
    drawn, asked = Drawn(SD15, tiny_sd15, "v_prediction"), ("a red circle", "blue", 3.0)
    torch.testing.assert_close(drawn.ours(*asked), drawn.theirs(*asked), rtol=1e-3, atol=1e-3)


def test_sdxl_is_the_pipelines(sdxl: Drawn) -> None:
    asked = ("a red circle", "blue", 5.0)
    torch.testing.assert_close(sdxl.ours(*asked), sdxl.theirs(*asked), rtol=1e-3, atol=1e-3)


def test_a_picture_does_not_depend_on_its_batch(sd15: Drawn) -> None:
    together = sd15.ours("a red circle", "blue", 5.0)
    alone = sd15.ours("a red circle", "blue", 5.0, sd15.noise[1:])
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)


def test_equal_parts_of_half_the_weight_are_one(sd15: Drawn) -> None:
    whole = sd15.ours("a red circle", "blue", 5.0)
    torch.testing.assert_close(
        sd15.ours("a red circle :0.5 AND a red circle :0.5", "blue", 5.0), whole, rtol=1e-3, atol=1e-3
    )


def test_a_weight_counts_without_guidance_too(sd15: Drawn) -> None:
    """A1111's formula at cfg_scale 1: negative + weight * (prompt - negative)."""
    plain, weighted = (sd15.denoiser(text, "blue", 1.0) for text in ("a red circle", "a red circle :1.5"))
    assert (plain.guided, weighted.guided) == (False, True)
    expected = sd15.denoiser("a red circle", "blue", 1.5)
    torch.testing.assert_close(weighted(sd15.noise, 1.0), expected(sd15.noise, 1.0), rtol=1e-4, atol=1e-4)


LONG, LONGER = "a red circle BREAK blue", "a green star BREAK red BREAK blue"


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "green"), ("a red circle", LONGER), (LONG, LONGER)])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_prompts_of_unequal_length_are_drawn_as_in_passes_of_their_own(
    family: str, prompt: str, negative: str, request: pytest.FixtureRequest
) -> None:
    """The reference asks the U-Net once for each prompt, and guides by hand: A1111's way, slow and without any common length."""
    drawn = request.getfixturevalue(family)
    alone = [drawn.denoiser(text, "", 1.0) for text in (prompt, negative)]
    assert len({one.positive[0].length for one in alone}) == 2
    sigmas = [14.6, 1.3, 0.2]
    guided = drawn.denoiser(prompt, negative, 5.0)
    for sigma in sigmas:
        wanted, unwanted = (one(drawn.noise, sigma) for one in alone)
        expected = unwanted + 5 * (wanted - unwanted)
        torch.testing.assert_close(guided(drawn.noise, sigma), expected, rtol=1e-3, atol=1e-3 * sigma)


def test_attention_does_not_notice_keys_that_are_all_repeated_alike() -> None:
    """softmax by hand in float64, over 2 and 3 chunks and over the least common multiple of both."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(1, n, 8, generator=draw, dtype=torch.float64) for n in (2 * 77, 3 * 77)]
    query = torch.randn(1, 5, 8, generator=draw, dtype=torch.float64)
    repeated = same_length(states)
    assert [one.shape[1] for one in repeated] == [6 * 77] * 2
    for short, long in zip(states, repeated, strict=True):
        found, expected = (torch.softmax(query @ keys.mT, dim=-1) @ keys for keys in (long, short))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(one is other for one, other in zip(same_length(states[:1] * 2), states[:1] * 2, strict=True))


@pytest.mark.bits
def test_prompts_change_at_their_steps(sd15: Drawn) -> None:
    switched = sd15.denoiser("[red:blue:2]", "", 5.0)
    fixed = {name: sd15.denoiser(name, "", 5.0) for name in ("red", "blue")}
    for step, name in enumerate(["red", "red", "blue", "blue"], 1):
        assert switched.step == step
        assert torch.equal(switched(sd15.noise, 1.0), fixed[name](sd15.noise, 1.0))


def test_steps_of_two_calls_count_once(sd15: Drawn) -> None:
    denoiser = sd15.denoiser("[red:blue:2]", "", 5.0, calls_per_step=2)
    seen = []
    for _ in range(4):
        seen.append(denoiser.step)
        denoiser(sd15.noise, 1.0)
    assert seen == [1, 1, 2, 2]


def test_the_parts_of_the_prompt_are_told_with_their_weights() -> None:
    part = EncodedPart(0.5, (2, 4), ("early", "late"))  # type: ignore[arg-type]
    assert [part.at_step(step) for step in (1, 2, 3, 9)] == ["early", "early", "late", "late"]
