"""Noise levels as samplers count them, and which timestep of the training a level is.

On SD's schedules a level is the strength of the noise beside latents of strength 1, sigma / alpha of x = alpha * latents +
sigma * noise (k-diffusion's convention, arXiv 2206.00364). Along a rectified flow it is sigma of (1 - sigma) * latents +
sigma * noise, from 1 to 0, as in ComfyUI.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


def shifted(sigma: Any, shift: float) -> Any:
    """A flow's sigma, a number or array, with sigma / (1 - sigma) times `shift` (Esser et al. 2024, section 5.3.2).

    The way back is the shift 1 / shift, and two shifts are one by their product: applied twice it is another density.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


class Levels(ABC):
    """The levels between which a base can be drawn."""

    @abstractmethod
    def timestep(self, sigma: float) -> float:
        """The timestep that the network is given at a level."""

    @abstractmethod
    def spaced(self, steps: int) -> np.ndarray:
        """[steps + 1] levels of equally spaced timesteps, the last of them 0."""


@dataclass(frozen=True)
class NoiseLevels(Levels):
    """The level of every training timestep of a base, and the way back; in between, linear in the logarithm of the level."""

    sigmas: Tensor
    """[T] float64 on the CPU, ascending, finite"""

    @property
    def low(self) -> float:
        return float(self.sigmas[0])

    @property
    def high(self) -> float:
        return float(self.sigmas[-1])

    def sigma(self, timestep: float) -> float:
        """Of a timestep, fractions too; those outside of the training's are its ends."""
        positions = np.arange(len(self.sigmas))
        return math.exp(np.interp(timestep, positions, self.sigmas.log().numpy()))

    def timestep(self, sigma: float) -> float:
        """Inverse of `sigma`: the timestep that the U-Net is given. A1111 and ComfyUI hand such fractions over as they are."""
        if sigma <= 0:
            return 0.0
        return float(np.interp(math.log(sigma), self.sigmas.log().numpy(), np.arange(len(self.sigmas))))

    def spaced(self, steps: int) -> np.ndarray:
        """From the last timestep to the first, and then 0."""
        return np.array([*(self.sigma(timestep) for timestep in np.linspace(len(self.sigmas) - 1, 0, steps)), 0.0])


@dataclass(frozen=True)
class FlowLevels(Levels):
    """Sigmas of a rectified flow. of: the timestep of a sigma. high: where drawing begins."""

    of: Callable[[float], float]
    shift: float = 1.0
    high: float = 1.0

    def timestep(self, sigma: float) -> float:
        return self.of(sigma)

    def spaced(self, steps: int) -> np.ndarray:
        """Equal steps from `high` to 0 before they are shifted, once: the grid of Lune and Stable Diffusion 3, and ComfyUI's
        "simple" where `steps` divides 1000.
        """
        return shifted(np.linspace(shifted(self.high, 1 / self.shift), 0, steps + 1), self.shift)
