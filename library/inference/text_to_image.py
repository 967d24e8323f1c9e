"""Pictures from prompts, by the base's own U-Net with adapters folded in.

The sampler is DPM++ 2M (arXiv 2211.01095) on Karras' noise levels (arXiv 2206.00364, equation 5), which A1111 calls
"DPM++ 2M Karras": deterministic, and good from 20 steps on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from library.errors import RunFailed, UserError
from library.merging.merge import fold_into_modules
from library.models.conditioning import Conditioning
from library.models.family import family_of
from library.models.load import TextPart, load_scheduler_config, load_text_encoders, load_unet, load_vae
from library.models.locate import BaseLocation
from library.options.parser import nearest
from networks.adapters import Adapter
from networks.original_names import SDXL, UNET, Family

SAMPLER = "DPM++ 2M Karras"

# Those of kohya's --sample_sampler, as diffusers has them; spacings are the ones they were published with.
_LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace"}
_LEADING: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1}
_DDIM: dict[str, Any] = {**_LEADING, "set_alpha_to_one": False, "clip_sample": False}
KOHYA_SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, _DDIM),
    "pndm": (PNDMScheduler, {**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": True}),
    "lms": (LMSDiscreteScheduler, _LINSPACE),
    "euler": (EulerDiscreteScheduler, _LINSPACE),
    "euler_a": (EulerAncestralDiscreteScheduler, _LINSPACE),
    "heun": (HeunDiscreteScheduler, _LINSPACE),
    "dpm_2": (KDPM2DiscreteScheduler, _LINSPACE),
    "dpm_2_a": (KDPM2AncestralDiscreteScheduler, _LINSPACE),
    "dpmsolver": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": (DPMSolverSinglestepScheduler, {}),
}
KOHYA_SAMPLERS |= {f"k_{name}": KOHYA_SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}

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
) -> DiffusionPipeline:
    """The base as a pipeline on `device`, with each (adapter, weight) folded in; rounded to `dtype` once.

    Raises UserError where base or adapter cannot be loaded or do not fit together.
    """
    folded_in = torch.float32 if adapters else dtype
    family = family_of(base)
    parts = load_text_encoders(base, dtype=folded_in)
    models = {
        UNET: load_unet(base, families=(family,), dtype=folded_in),
        **{part.component: part.model for part in parts},
    }
    for adapter, weight in adapters:
        fold_into_modules(models, family, adapter, weight)
    parts = [part._replace(model=part.model.to(dtype)) for part in parts]
    vae = load_vae(base, families=(family,), dtype=dtype)
    scheduler = make_sampler(load_scheduler_config(base))
    return assemble_pipeline(family, models[UNET].to(dtype), parts, vae, scheduler).to(device)


def assemble_pipeline(
    family: Family, unet: nn.Module, parts: Sequence[TextPart], vae: nn.Module, scheduler: SchedulerMixin
) -> DiffusionPipeline:
    """A pipeline of loaded models, quiet and without a safety checker."""
    models: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": scheduler}
    for part in parts:
        models[part.component] = part.model
        models[part.component.replace("text_encoder", "tokenizer")] = part.tokenizer
    if family == SDXL:
        pipeline = StableDiffusionXLPipeline(**models, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **models, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sampler(scheduler_config: dict[str, object], name: str | None = None) -> SchedulerMixin:
    """A sampler over the noise schedule that the base was trained with: DPM++ 2M Karras, or one by kohya's name.

    Raises UserError for an unknown name.
    """
    trained_with: dict[str, Any] = {key: scheduler_config[key] for key in _TRAINED_WITH if key in scheduler_config}
    if name is not None:
        if name not in KOHYA_SAMPLERS:
            raise UserError(
                f"{name} is no sampler{nearest(name, KOHYA_SAMPLERS)}. Known are {', '.join(KOHYA_SAMPLERS)}."
            )
        kind, more = KOHYA_SAMPLERS[name]
        known = inspect.signature(kind.__init__).parameters
        return kind(**{key: value for key, value in {**trained_with, **more}.items() if key in known})
    # steps_offset has no effect on Karras' levels; the pipeline objects to any other value.
    return DPMSolverMultistepScheduler(
        **trained_with, algorithm_type="dpmsolver++", use_karras_sigmas=True, steps_offset=1
    )


def native_size(pipeline: DiffusionPipeline) -> int:
    """Side in pixels that the base was trained at."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Noise [1, channels, height, width] (latent pixels) of one picture, float32.

    Drawn on the CPU from the picture's own seed, so that the picture is the same in every batch and on every device.
    """
    return torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    drawing: Drawing,
    seeds: Sequence[int],
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
) -> list[Image.Image]:
    """One picture per seed, drawn together. encode: what the U-Net is told of prompts; default: the pipeline's own way.

    Raises RunFailed where the model's numbers overflow.
    """
    unet, factor = pipeline.unet, pipeline.vae_scale_factor
    shape = (unet.config.in_channels, drawing.height // factor, drawing.width // factor)
    pictures: Tensor = pipeline(
        **_told(drawing, len(seeds), encode, unet.dtype),
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


def _told(
    drawing: Drawing, count: int, encode: Callable[[Sequence[str]], Conditioning] | None, dtype: torch.dtype
) -> dict[str, Any]:
    prompts = {"prompt": [drawing.prompt] * count, "negative_prompt": [drawing.negative_prompt] * count}
    if encode is None:
        return prompts
    told: dict[str, Any] = {}
    for name, texts in prompts.items():
        found = encode(texts)
        told[f"{name}_embeds"] = found.states.to(dtype)
        if found.pooled is not None:
            told[f"{name.removesuffix('prompt')}pooled_prompt_embeds"] = found.pooled.to(dtype)
    return told


def words_cut_off(tokenizer: CLIPTokenizer, prompt: str) -> str | None:
    """The end of a prompt that the text encoder does not get to see; None when it sees everything."""
    limit = tokenizer.model_max_length - 2  # start and end of text
    tokens = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return tokenizer.decode(tokens[limit:]) if len(tokens) > limit else None
