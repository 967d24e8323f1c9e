"""The process of SD1.5 and SDXL: x_t = alpha * x_0 + sigma * eps with alpha^2 + sigma^2 = 1, on a schedule of timesteps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise_levels import NoiseLevels
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import Prediction
from library.errors import UserError

# What A1111 and ComfyUI put in place of alphas_cumprod = 0, where the level would be infinite: 4518.8.
_LEAST_ALPHA_CUMPROD = 4.8973451890853435e-08
_SCHEDULE = frozenset(
    ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
)


@dataclass(frozen=True, eq=False)
class VariancePreserving(Parametrisation):
    """alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod)."""

    alphas_cumprod: Tensor
    """[T] float32 on the training device"""

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], output: Prediction, device: torch.device | str
    ) -> VariancePreserving:
        """SD1.5's betas are scaled_linear, 0.00085 to 0.012 (Rombach et al. 2022, and the file itself).

        The sum is diffusers' own, so that training and sampling agree to the bit. What the file leaves out is what its own
        class takes for it.
        """
        import diffusers

        own = inspect.signature(getattr(diffusers, config.get("_class_name") or "DDPMScheduler").__init__).parameters
        taken = {name: own[name].default for name in _SCHEDULE & own.keys()}
        given = {name: value for name, value in config.items() if name in _SCHEDULE and value is not None}
        scheduler = diffusers.DDPMScheduler(**taken | given)
        return cls(output, scheduler.alphas_cumprod.to(device=device, dtype=torch.float32))

    def with_zero_terminal_snr(self) -> VariancePreserving:
        """sqrt(alphas_cumprod) shifted to end at 0 and scaled to begin as before.

        Lin et al. 2023 (arXiv 2305.08891), algorithm 1. SNRs, and weights by them, are those of the new schedule.
        """
        alphas = self.alphas_cumprod.double().sqrt()
        first, last = alphas[0], alphas[-1]
        shifted = (alphas - last) * (first / (first - last))
        return replace(self, alphas_cumprod=shifted.square().float())

    @property
    def timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    @cached_property
    def ends_in_noise(self) -> bool:
        """Whether nothing is left of the latents at the last timestep. Read from the device once."""
        return self.alphas_cumprod[-1].item() == 0

    def draw_timesteps(
        self, latents: torch.Size, generator: torch.Generator, first: int = 0, end: int | None = None
    ) -> Tensor:
        """int64, uniform; by torch.randint and nothing else."""
        end = self.timesteps if end is None else end
        return torch.randint(first, end, latents[:1], generator=generator, device=generator.device)

    def timesteps_at(
        self, quantiles: Tensor, first: int = 0, end: int | None = None, area: float | None = None
    ) -> Tensor:
        """int64"""
        end = self.timesteps if end is None else end
        return (first + (quantiles * (end - first)).long()).clamp(max=end - 1)

    def spread(self, places: Tensor) -> Tensor:
        """int64, even in timesteps."""
        return (places * self.timesteps).long()

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()

    def snr(self, timesteps: Tensor) -> Tensor:
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return alphas_cumprod / (1.0 - alphas_cumprod)

    def require_conversion(self, to: Prediction) -> None:
        """Raise UserError where the schedule ends in pure noise, out of which no velocity follows from a predicted epsilon."""
        if to is not self.output and to.needs_signal and self.ends_in_noise:
            raise UserError(
                "zero_terminal_snr ends the schedule in pure noise, where a base that predicts epsilon says nothing of the "
                "picture, and its velocity (eps - sigma * x_t) / alpha divides by 0. Leave zero_terminal_snr out, or take the "
                "base's raw output for v."
            )

    @cached_property
    def levels(self) -> NoiseLevels:
        """A schedule that ends in pure noise ends at level 4518.8 instead of infinity, as in A1111."""
        alphas = self.alphas_cumprod.detach().cpu().double().clamp(min=_LEAST_ALPHA_CUMPROD)
        return NoiseLevels(((1 - alphas) / alphas).sqrt())

    def inverse_scale(self, level: float) -> float:
        return math.sqrt(level**2 + 1)
