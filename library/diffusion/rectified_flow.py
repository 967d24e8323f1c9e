"""Rectified flow: the straight path x = (1 - sigma) * latents + sigma * noise, and networks that give its direction or SD's.

Conventions of kohya, diffusers, Stable Diffusion 3 and ComfyUI: sigma is 1 at pure noise, u = noise - latents, and the timestep
is 1000 * sigma as a float. Diff2Flow's and Lumina's have another sign or run the other way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from library.diffusion.densities import SigmaDensity
from library.diffusion.noise_levels import FlowLevels
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import FLOW, VELOCITY, Prediction
from library.errors import UserError


@dataclass(frozen=True, eq=False)
class FlowPath(Parametrisation):
    """What is the same whatever the network: sigmas are drawn by a density, and samplers step along the path itself."""

    density: SigmaDensity = field(default_factory=SigmaDensity, kw_only=True)
    low: float = field(default=0.0, kw_only=True)
    """Sigmas below are not trained."""
    high: float = field(default=1.0, kw_only=True)
    """Sigmas above are not trained, and drawing begins here."""
    shift: float = field(default=1.0, kw_only=True)
    """Of the levels that pictures are drawn with."""

    @abstractmethod
    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """What the network is told at these sigmas, float32."""

    @abstractmethod
    def timestep_of(self, sigma: float) -> float:
        """The same of a number, on the host."""

    @abstractmethod
    def sigma_of(self, timestep: float) -> float:
        """The way back."""

    def with_zero_terminal_snr(self) -> Parametrisation:
        raise UserError(
            "zero_terminal_snr rescales a schedule of betas, and a flow ends in pure noise anyway. Leave it out."
        )

    def draw_timesteps(
        self, latents: torch.Size, generator: torch.Generator, first: int = 0, end: int | None = None
    ) -> Tensor:
        """float32; by one torch.rand for each sample. first, end: the part of the density within these timesteps is drawn."""
        uniform = torch.rand(latents[:1], generator=generator, device=generator.device)
        return self.timesteps_at(uniform, first, end, latents[-2] * latents[-1])

    def timesteps_at(
        self, quantiles: Tensor, first: int = 0, end: int | None = None, area: float | None = None
    ) -> Tensor:
        """float32"""
        low = max(self.low, self.sigma_of(first)) if first else self.low
        high = self.high if end in (None, self.timesteps) else min(self.high, self.sigma_of(end))
        return self.timesteps_of(self.density.part(quantiles, low, high, area))

    def spread(self, places: Tensor) -> Tensor:
        """float32, even in sigma."""
        return self.timesteps_of((self.low + (self.high - self.low) * places).float())

    @cached_property
    def levels(self) -> FlowLevels:
        return FlowLevels(self.timestep_of, self.shift, self.high)

    def signal(self, level: float) -> float:
        return 1 - level


@dataclass(frozen=True, eq=False)
class RectifiedFlow(FlowPath):
    """The network sees x and 1000 * sigma: a native flow model."""

    count: int = 1000
    """Timesteps are sigma times this."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], output: Prediction, device: torch.device | str) -> RectifiedFlow:
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        return cls(output, config.get("num_train_timesteps") or 1000, shift=float(shift))

    @property
    def timesteps(self) -> int:
        return self.count

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        return sigmas * self.count

    def timestep_of(self, sigma: float) -> float:
        return sigma * self.count

    def sigma_of(self, timestep: float) -> float:
        return timestep / self.count

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (timesteps.float() / self.count).view(-1, 1, 1, 1)
        return 1.0 - sigma, sigma

    def snr(self, timesteps: Tensor) -> Tensor:
        sigma = timesteps.float() / self.count
        return ((1.0 - sigma) / sigma).square()

    def require_conversion(self, to: Prediction) -> None:
        """v is of schedules with alpha^2 + sigma^2 = 1."""
        if to is VELOCITY and self.output is FLOW:
            raise UserError(
                "The base is a rectified flow, whose velocity noise - latents is another one than v. Leave objective v out."
            )

    def inverse_scale(self, level: float) -> float:
        return 1.0

    def clean(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        return x - level * output
