"""What a step adds to its latents: noise, its variants, and timesteps. Nothing here waits for the device."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from library.diffusion.parametrisation import Parametrisation
from library.diffusion.timestep_bins import TimestepBins
from library.options.checks import require
from library.options.kohya.objective import NoiseOptions

# Levels of a pyramid shrink by a factor drawn from [2, 4).
SMALLEST_SHRINK, SHRINK_RANGE = 2.0, 2.0


@dataclass(frozen=True)
class Draw:
    """noise: what the target is made of. added_noise: what the latents get. Both [B, C, h, w]; timesteps [B].

    bins: of `TimestepBins` that the timesteps were drawn from, [B]; None where they were not.
    """

    noise: torch.Tensor
    added_noise: torch.Tensor
    timesteps: torch.Tensor
    bins: torch.Tensor | None = None


def draw(
    latents: torch.Tensor,
    generator: torch.Generator,
    recipe: NoiseOptions,
    parametrisation: Parametrisation,
    noise: torch.Tensor | None = None,
    bins: TimestepBins | None = None,
) -> Draw:
    """Noise and timesteps for `latents` [B, C, h, w] float32, in kohya's order: noise, offset, pyramid, timesteps, ip.

    noise: that which the latents belong to, where there is such; default: drawn.
    generator: on the latents' device, seeded for this step. With the defaults it draws torch.randn and the timesteps
    of the parametrisation and nothing else. bins: draw timesteps by how hard they are instead. Raises OptionError where the
    recipe's timesteps lie outside of the parametrisation's.
    """
    if noise is None:
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    if recipe.noise_offset or recipe.adaptive_noise_scale:
        noise = noise + offset(latents, generator, recipe)
    if recipe.multires_noise_iterations:
        noise = pyramid(noise, generator, recipe.multires_noise_iterations, recipe.multires_noise_discount)
    chosen, of_bins = draw_timesteps(latents.shape, generator, recipe, parametrisation, bins)
    added_noise = noise
    if recipe.ip_noise_gamma:
        strength = _strength(recipe.ip_noise_gamma, recipe.ip_noise_gamma_random_strength, generator)
        added_noise = noise + strength * torch.randn(latents.shape, generator=generator, device=latents.device)
    return Draw(noise, added_noise, chosen, of_bins)


def offset(latents: torch.Tensor, generator: torch.Generator, recipe: NoiseOptions) -> torch.Tensor:
    """A normal shift for each sample and channel, [B, C, 1, 1], noise_offset strong."""
    strength = _strength(recipe.noise_offset or 0.0, recipe.noise_offset_random_strength, generator)
    if recipe.adaptive_noise_scale is not None:
        means = latents.float().mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + recipe.adaptive_noise_scale * means).clamp(min=0.0)
    return strength * torch.randn((*latents.shape[:2], 1, 1), generator=generator, device=latents.device)


def pyramid(noise: torch.Tensor, generator: torch.Generator, iterations: int, discount: float) -> torch.Tensor:
    """`noise` [B, C, h, w] plus noise of lower and lower resolutions, divided by the standard deviation of the whole.

    Level i has the sides max(1, side / r^i), r drawn from [2, 4), and the strength discount^i; level 0 is one more
    full-resolution noise, and the first level with a side of 1 is the last. The deviation is that of the whole batch, as
    in kohya: samples of a batch are not independent of each other. The r are shapes, which the host has to know; they
    follow from the generator's seed, so that nothing is read from the device.
    """
    shrinks = random.Random(f"pyramid noise {generator.initial_seed()}")
    height, width = noise.shape[2:]
    for level in range(iterations):
        shrink = (shrinks.random() * SHRINK_RANGE + SMALLEST_SHRINK) ** level
        size = (max(1, int(height / shrink)), max(1, int(width / shrink)))
        small = torch.randn((*noise.shape[:2], *size), generator=generator, device=noise.device)
        noise = noise + F.interpolate(small, size=(height, width), mode="bilinear") * discount**level
        if 1 in size:
            break
    return noise / noise.std()


def draw_timesteps(
    latents: torch.Size,
    generator: torch.Generator,
    recipe: NoiseOptions,
    parametrisation: Parametrisation,
    bins: TimestepBins | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B] for latents of this shape, and the bins that they are of, where there are any."""
    first, end = timesteps_in(recipe, parametrisation)
    if bins is None:
        return parametrisation.draw_timesteps(latents, generator, first, end), None
    quantiles, chosen = bins.draw(latents[0], generator)
    return parametrisation.timesteps_at(quantiles, first, end, latents[-2] * latents[-1]), chosen


def timesteps_in(recipe: NoiseOptions, parametrisation: Parametrisation) -> tuple[int, int]:
    """The first timestep that is trained, and the one behind the last. Raises OptionError where there are none."""
    first, known = recipe.min_timestep or 0, parametrisation.timesteps
    end = known if recipe.max_timestep is None else recipe.max_timestep
    require(first < known, "min_timestep", f"is {first}, and the schedule's last timestep is {known - 1}.")
    require(end <= known, "max_timestep", f"is {end}, and the schedule has {known} timesteps.")
    return first, end


def _strength(strength: float, random_strength: bool, generator: torch.Generator) -> torch.Tensor | float:
    """`strength`, or a uniform share of it for the batch, [1]."""
    return torch.rand(1, generator=generator, device=generator.device) * strength if random_strength else strength
