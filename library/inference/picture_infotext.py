"""The parameters text of a picture (`library.inference.infotext`), from the request that it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library import project_version
from library.inference.find_adapters import title_of
from library.inference.infotext import Infotext
from library.inference.lora_tags import LoraWeights, StepWeights, cut_out_tags
from library.inference.picture_request import PictureRequest
from networks.prediction_names import FLOW_NAME

# Stands before the version: A1111 would take a number alone for its own version, and imitate that one.
PROJECT = "repa-scripts"


def infotext_of(
    request: PictureRequest,
    seed: int,
    model: str,
    *,
    model_hash: str | None = None,
    lora_hashes: Mapping[str, str] | None = None,
    refiner: str | None = None,
    vae: str | None = None,
    is_flow: bool = False,
    text_fusion: str | None = None,
) -> Infotext:
    """What A1111 and others need to draw the picture again. The text has no field for an init image or the prompt's dialect, and
    ancestral samplers draw other noise there.

    Adapters without a tag in the prompt are appended to it as tags. vae: the name of another autoencoder. is_flow: whether the base
    is a flow model, which nothing else in the text tells. text_fusion: the name of its file.
    """
    hires, other = request.hires, {}
    sampler, schedule = request.sampler_and_schedule
    named = {tag.positional[0] for tag in cut_out_tags(request.prompt)[1] if tag.positional}
    tags = "".join(f" {tag_of(use.weights)}" for use in request.loras if use.weights.name not in named)
    if refiner is not None:
        other["Refiner switch by sampling steps"] = "True"
    if request.emphasis != "original":
        other["Emphasis"] = "No norm"
    if request.fills_conds:
        other["Pad conds"] = "True"
    if request.flow_shift is not None:
        other["Flow shift"] = f"{request.flow_shift:g}"
    if is_flow:
        other["Prediction type"] = FLOW_NAME.modelspec
    if text_fusion is not None:
        other["Text fusion"] = text_fusion
    if request.latent_multiplier != 1:
        other["Latent multiplier"] = f"{request.latent_multiplier:g}"
    if (reference := request.reference) is not None and reference.strength > 0:
        other["Align guidance"] = f"{reference.strength:g}"
        other["Align reference"] = reference.photo.name
        other["Align state"] = "/".join(reference.state.resolve().parts[-2:])
        other["Align window"] = " ".join(f"{end:g}" for end in reference.window)
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
    """The tag of these weights: <lora:name:0.8>."""
    return f"<lora:{weights.name}:{strength_of(weights)}>"


def strength_of(weights: LoraWeights) -> str:
    """The weights as in a tag: 0.8, or 0.5:1 where text encoders and U-Net differ."""
    te, unet, hrte, hrunet = (_written(part) for part in (weights.te, weights.unet, weights.hrte, weights.hrunet))
    words = [te] if te == unet else [te, unet]
    words += [f"{name}={text}" for name, text, first in (("hrte", hrte, te), ("hrunet", hrunet, unet)) if text != first]
    return ":".join(words)


def model_name(name: str) -> str:
    """The name of a base: the last part of a path, or the whole hub id."""
    path = Path(name).expanduser()
    return title_of(path) if path.exists() else name


def vae_name(name: str) -> str:
    """The name of an autoencoder; A1111 names a file with its suffix."""
    path = Path(name).expanduser()
    return path.name if path.is_file() else model_name(name)


def _written(weights: StepWeights) -> str:
    if weights.is_constant:
        return f"{weights.weights[0]:g}"
    return ",".join(f"{y:g}@{x:g}" for x, y in zip(weights.positions, weights.weights, strict=True))
