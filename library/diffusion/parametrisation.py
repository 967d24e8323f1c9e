"""A diffusion process and what its network predicts: all that training, evaluation and samplers ask of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise_levels import NoiseLevels
from library.diffusion.predictions import Prediction


@dataclass(frozen=True, eq=False)
class Parametrisation(ABC):
    """How latents become noise, x = alpha * latents + sigma * noise, and what kind of output the network has.

    latents, noise, noisy, output: [B, C, h, w] float32; timesteps: [B], on the device of the process. A sampler keeps
    x / alpha = latents + level * noise, whose level is sigma / alpha.
    """

    output: Prediction

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], output: Prediction, device: torch.device | str) -> Parametrisation:
        """Of a diffusers scheduler_config.json."""

    @abstractmethod
    def with_zero_terminal_snr(self) -> Parametrisation:
        """The process that ends in pure noise. Raises UserError where there is no such thing."""

    # The process

    @property
    @abstractmethod
    def timesteps(self) -> int:
        """How many there are: from 0 to below this."""

    @abstractmethod
    def draw_timesteps(self, count: int, generator: torch.Generator, first: int = 0, end: int | None = None) -> Tensor:
        """[count] on the generator's device, uniform from `first` to below `end`; by default all there are."""

    @abstractmethod
    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, each [B, 1, 1, 1] float32."""

    @abstractmethod
    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio (alpha / sigma)^2, [B] float32."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self.at(timesteps)
        return alpha * latents + sigma * noise

    # The network's output

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor, of: Prediction | None = None) -> Tensor:
        """What a perfect network says; of: one with another kind of output."""
        return (of or self.output).target(latents, noise, *self.at(timesteps))

    def convert(self, output: Tensor, noisy: Tensor, timesteps: Tensor, to: Prediction) -> Tensor:
        """An output as a network of kind `to` would have said it: exact, however wrong it is."""
        if to is self.output:
            return output
        self.require_conversion(to)
        alpha, sigma = self.at(timesteps)
        return to.of_noise(self.output.noise(output, noisy, alpha, sigma), noisy, alpha, sigma)

    @abstractmethod
    def require_conversion(self, to: Prediction) -> None:
        """Raise UserError where no `to` follows from what the network says."""

    # For samplers

    @property
    @abstractmethod
    def levels(self) -> NoiseLevels:
        """Level of each timestep and the way back."""

    @abstractmethod
    def inverse_alpha(self, level: float) -> float:
        """1 / alpha at a level: what a sampler's latents are divided by to be what the network saw in training."""

    def clean(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        """The clean latents that an output means. x: the sampler's latents; the network was given x / inverse_alpha."""
        return self.output.clean(output, x, 1 / self.inverse_alpha(level), level)
