"""Pictures from prompts, by the base's own U-Net with adapters folded in.

The sampler is DPM++ 2M (arXiv 2211.01095) on Karras' noise levels (arXiv 2206.00364, equation 5), which A1111 calls
"DPM++ 2M Karras": deterministic, and good from 20 steps on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from library.errors import RunFailed
from library.merging.merge import fold_into_modules
from library.models.load import load_scheduler_config, load_text_encoder, load_unet, load_vae
from library.models.locate import BaseLocation
from networks.adapter_file import Adapter

SAMPLER = "DPM++ 2M Karras"

# What of a base's scheduler describes its training; the rest is about sampling.
_TRAINED_WITH = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Drawing:
    """What to draw, and how."""

    prompt: str
    negative_prompt: str
    steps: int
    cfg_scale: float
    """1 and below: no guidance, and the negative prompt does nothing."""
    width: int
    height: int


def load_pipeline(
    base: BaseLocation, adapters: Sequence[tuple[Adapter, float]], *, dtype: torch.dtype, device: torch.device | str
) -> StableDiffusionPipeline:
    """The base as a pipeline on `device`, with each (adapter, weight) folded in; rounded to `dtype` once.

    Raises UserError where base or adapter cannot be loaded or do not fit together.
    """
    folded_in = torch.float32 if adapters else dtype
    unet = load_unet(base, dtype=folded_in)
    tokenizer, text_encoder = load_text_encoder(base, dtype=folded_in)
    for adapter, weight in adapters:
        fold_into_modules(unet, text_encoder, adapter, weight)
    pipeline = StableDiffusionPipeline(
        vae=load_vae(base, dtype=dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=tokenizer,
        unet=unet.to(dtype),
        scheduler=make_sampler(load_scheduler_config(base)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sampler(scheduler_config: dict[str, object]) -> DPMSolverMultistepScheduler:
    """DPM++ 2M Karras over the noise schedule that the base was trained with."""
    trained_with = {key: scheduler_config[key] for key in _TRAINED_WITH if key in scheduler_config}
    # steps_offset has no effect on Karras' levels; the pipeline objects to any other value.
    return DPMSolverMultistepScheduler(
        **trained_with, algorithm_type="dpmsolver++", use_karras_sigmas=True, steps_offset=1
    )


def native_size(pipeline: StableDiffusionPipeline) -> int:
    """Side in pixels that the base was trained at."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Noise [1, channels, height, width] (latent pixels) of one picture, float32.

    Drawn on the CPU from the picture's own seed, so that the picture is the same in every batch and on every device.
    """
    return torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, drawing: Drawing, seeds: Sequence[int]) -> list[Image.Image]:
    """One picture per seed, drawn together. Raises RunFailed where the model's numbers overflow."""
    unet, factor = pipeline.unet, pipeline.vae_scale_factor
    shape = (unet.config.in_channels, drawing.height // factor, drawing.width // factor)
    pictures: Tensor = pipeline(
        prompt=[drawing.prompt] * len(seeds),
        negative_prompt=[drawing.negative_prompt] * len(seeds),
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.cfg_scale,
        height=drawing.height,
        width=drawing.width,
        latents=torch.cat([initial_noise(seed, *shape) for seed in seeds]).to(unet.dtype),
        output_type="pt",
    ).images  # [B, 3, height, width] in [0, 1]
    if not torch.isfinite(pictures).all():
        raise RunFailed(
            f"The picture has values that are not finite: {unet.dtype} is too narrow. Use --dtype bf16 or float."
        )
    pixels = (pictures.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(one.numpy()) for one in pixels]


def words_cut_off(tokenizer: CLIPTokenizer, prompt: str) -> str | None:
    """The end of a prompt that the text encoder does not get to see; None when it sees everything."""
    limit = tokenizer.model_max_length - 2  # start and end of text
    tokens = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return tokenizer.decode(tokens[limit:]) if len(tokens) > limit else None
