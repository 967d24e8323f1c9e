"""Noise levels as samplers count them, and which timestep of the training a level is.

A level is the strength of the noise beside latents of strength 1, sigma / alpha of x = alpha * latents + sigma * noise
(k-diffusion's convention, arXiv 2206.00364).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class NoiseLevels:
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
