"""A diffusion process and what its network predicts: all that training, evaluation and samplers ask of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise_levels import Levels
from library.diffusion.predictions import Prediction


@dataclass(frozen=True, eq=False)
class Parametrisation(ABC):
    """How latents become noise, x = alpha * latents + sigma * noise, and what kind of output the network has.

    latents, noise, noisy, output: [B, C, h, w] float32; timesteps: [B], on the device of the process. A sampler keeps
    signal(level) * latents + level * noise: on SD's schedules x / alpha, whose signal is 1 and whose level is sigma / alpha.
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
    def draw_timesteps(
        self, latents: torch.Size, generator: torch.Generator, first: int = 0, end: int | None = None
    ) -> Tensor:
        """[B] for latents of this shape, on the generator's device, from `first` to below `end`; by default all there are."""

    @abstractmethod
    def timesteps_at(
        self, quantiles: Tensor, first: int = 0, end: int | None = None, area: float | None = None
    ) -> Tensor:
        """The timesteps at these quantiles, [B] in 0..1, of what `draw_timesteps` draws, the least noise first.

        area: places of the latents, where the density depends on it.
        """

    @abstractmethod
    def spread(self, places: Tensor) -> Tensor:
        """The timesteps at these places in what is trained, from 0 (the least noise) to below 1; to compare models by."""

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
    def levels(self) -> Levels:
        """The levels that are drawn with, and the timestep of each."""

    def signal(self, level: float) -> float:
        """Strength of the latents in what a sampler keeps at a level."""
        return 1.0

    def time(self, level: float) -> float:
        """How noisy a level is, from 0 to 1: t of `timestep_weights`, sigma of the flow with this signal-to-noise ratio."""
        return level / (self.signal(level) + level)

    @abstractmethod
    def inverse_scale(self, level: float) -> float:
        """What a sampler's latents are divided by to be what the network saw in training; on SD's schedules 1 / alpha."""

    def clean(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        """The clean latents that an output means. x: the sampler's latents; the network was given x / inverse_scale."""
        return self.output.clean(output, x, 1 / self.inverse_scale(level), level)
