"""The denoising loss on held-out photos, by quarter of the timesteps, with the same noise and timesteps for all models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from library.data.pixels import square_crop
from library.diffusion.objective import Objective
from library.diffusion.parametrisation import Parametrisation
from library.inference.drawing_model import DrawingModel
from library.models.conditioning import TextConditioner
from library.models.encoders import VaeEncoder
from library.training.randomness import sample_noise

QUARTERS = 4
PER_QUARTER = 3
"""Timesteps in a quarter; every photo is noised to each of them."""
_BATCH_SIZE = 8


@dataclass(frozen=True)
class EncodedPhotos:
    """latents [n, 4, h, w] float32, scaled. prompts, ids: of each photo. size: side of the photos in pixels."""

    latents: Tensor
    prompts: list[str]
    ids: list[str]
    size: int


@torch.no_grad()
def encode_photos(
    model: DrawingModel, photos: Sequence[Image.Image], prompts: Sequence[str], ids: Sequence[str], size: int
) -> EncodedPhotos:
    """Photos as centred squares of `size` pixels. Raises UserError where size is no multiple of the autoencoder's factor."""
    encoder = VaeEncoder(model.vae)
    rows = []
    for photo in photos:
        pixels = torch.from_numpy(square_crop(photo, size)).permute(2, 0, 1)[None]
        rows.append(encoder.moments(pixels.contiguous())[0].float() * encoder.scaling_factor)
    return EncodedPhotos(torch.cat(rows), list(prompts), list(ids), size)


def spread_timesteps(parametrisation: Parametrisation) -> Tensor:
    """The middles of equal parts of what is trained, [QUARTERS * PER_QUARTER], the least noise first."""
    parts = QUARTERS * PER_QUARTER
    return parametrisation.spread((torch.arange(parts) + 0.5) / parts)


@torch.no_grad()
def denoising_losses(model: DrawingModel, photos: EncodedPhotos, seed: int, clip_skip: int = 1) -> Tensor:
    """Mean squared error of the predicted noise or velocity, [photos, timesteps] float64 on the CPU."""
    objective = Objective(model.parametrisation)
    skip = 1 if model.family.text_layer is not None else clip_skip  # that family's layer is fixed
    conditioner = TextConditioner(model.family, model.parts, clip_skip=skip)
    timesteps = spread_timesteps(model.parametrisation)
    shape = tuple(photos.latents.shape[1:])
    losses = torch.zeros(len(photos.ids), len(timesteps), dtype=torch.float64)
    for row, (latents, prompt, name) in enumerate(zip(photos.latents, photos.prompts, photos.ids, strict=True)):
        conditioning = conditioner([prompt])
        noise = sample_noise(seed, [f"{name}/{int(t)}" for t in timesteps], shape)
        clean = latents.cpu()[None].expand(len(timesteps), -1, -1, -1)
        noisy = model.parametrisation.add_noise(clean, noise, timesteps)
        target = objective.target(clean, noise, timesteps)
        for start in range(0, len(timesteps), _BATCH_SIZE):
            part = slice(start, start + _BATCH_SIZE)
            output = predicted(
                model, noisy[part], timesteps[part], conditioning.states, conditioning.pooled, photos.size
            )
            losses[row, part] = (output - target[part]).double().square().mean(dim=(1, 2, 3))
    return losses


def log_ratios(losses: Tensor, base: Tensor) -> Tensor:
    """log(loss / loss of the base) [photos, QUARTERS], the mean over the timesteps of a quarter.

    The ratio is taken at each photo and timestep, because losses at low timesteps are hundreds of times those at high ones.
    """
    return (losses / base).log().unflatten(1, (QUARTERS, -1)).mean(dim=2)


def predicted(
    model: DrawingModel, noisy: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None, size: int
) -> Tensor:
    """The U-Net's output without guidance, float32 on the CPU."""
    device, count, more = model.device, len(noisy), {}
    sizes = model.size_ids(size, size)
    if pooled is not None and sizes is not None:
        more["added_cond_kwargs"] = {
            "text_embeds": pooled.expand(count, -1).to(device, model.dtype),
            "time_ids": torch.tensor([sizes] * count, device=device, dtype=model.dtype),
        }
    text = states.expand(count, -1, -1).to(device, model.dtype)
    output = model.unet(noisy.to(device, model.dtype), timesteps.to(device), encoder_hidden_states=text, **more).sample
    return output.float().cpu()
