"""What the file of a picture says of how it was made (`library.inference.infotext`), from the request it was made by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library import project_version
from library.inference.find_adapters import title_of
from library.inference.infotext import Infotext
from library.inference.prompt_networks import LoraWeights, StepWeights, cut_out_networks
from library.inference.request import Request

# Before the version. A number alone would be taken for A1111's own, which then draws as that old version of it did.
PROJECT = "repa-scripts"


def picture_info(
    request: Request,
    seed: int,
    model: str,
    *,
    model_hash: str | None = None,
    lora_hashes: Mapping[str, str] | None = None,
    refiner: str | None = None,
    vae: str | None = None,
) -> Infotext:
    """What A1111 and others need to draw it again, as far as its text has words for it: not a picture to begin with, nor the
    prompts' dialect, and the noise between the steps of ancestral samplers is another there.

    Adapters that no tag names stand as tags behind the prompt, as A1111 takes them. vae: the name of another autoencoder.
    """
    hires, other = request.hires, {}
    sampler, schedule = request.sampler_and_schedule
    named = {tag.positional[0] for tag in cut_out_networks(request.prompt)[1] if tag.positional}
    tags = "".join(f" {tag_of(use.weights)}" for use in request.loras if use.weights.name not in named)
    if refiner is not None:
        other["Refiner switch by sampling steps"] = "True"
    if request.emphasis != "original":
        other["Emphasis"] = "No norm"
    strength = request.denoising_strength if request.init_image is not None else None
    return Infotext(
        prompt=f"{request.prompt}{tags}".strip(),
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        sampler=sampler,
        schedule=schedule,
        cfg_scale=request.cfg_scale,
        seed=seed,
        size=(request.width, request.height),
        model_hash=model_hash,
        model=model,
        vae=vae,
        denoising_strength=hires.denoising_strength if hires is not None else strength,
        clip_skip=request.clip_skip if request.clip_skip > 1 else None,
        rng="CPU",
        hires_upscale=None if hires is None else hires.scale,
        hires_steps=None if hires is None else hires.steps,
        hires_upscaler=None if hires is None else hires.upscaler,
        refiner=refiner,
        refiner_switch_at=None if refiner is None else request.refiner_switch_at,
        lora_hashes=lora_hashes or {},
        version=f"{PROJECT} {project_version()}",
        other=other,
    )


def tag_of(weights: LoraWeights) -> str:
    """A tag that asks for these weights: <lora:name:0.8>."""
    return f"<lora:{weights.name}:{strength_of(weights)}>"


def strength_of(weights: LoraWeights) -> str:
    """The same without the name: 0.8, or 0.5:1 for text encoders and U-Net apart."""
    te, unet, hrte, hrunet = (_written(one) for one in (weights.te, weights.unet, weights.hrte, weights.hrunet))
    words = [te] if te == unet else [te, unet]
    words += [f"{name}={said}" for name, said, first in (("hrte", hrte, te), ("hrunet", hrunet, unet)) if said != first]
    return ":".join(words)


def model_name(name: str) -> str:
    """What a base is called: the last part of a path, a hub id as it is."""
    path = Path(name).expanduser()
    return title_of(path) if path.exists() else name


def vae_name(name: str) -> str:
    """The same of an autoencoder; A1111 calls one by its file, with the suffix."""
    path = Path(name).expanduser()
    return path.name if path.is_file() else model_name(name)


def _written(weights: StepWeights) -> str:
    if weights.is_constant:
        return f"{weights.weights[0]:g}"
    return ",".join(f"{y:g}@{x:g}" for x, y in zip(weights.positions, weights.weights, strict=True))
