"""A network of SD's own schedule as the velocity field of a rectified flow, by the exact change of variables.

z = alpha * latents + sigma' * noise of that schedule is x = (1 - sigma) * latents + sigma * noise times alpha + sigma', at the
sigma = sigma' / (alpha + sigma') of the same signal-to-noise ratio. So the weights stay what they are: the network sees its own
inputs at its own timesteps (fractions between them, as samplers have them), and its output means a velocity (`FlowVelocity`). An
Euler step along the flow is then a step of DDIM, to rounding, whatever the weights and the guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise_levels import NoiseLevels
from library.diffusion.parametrisation import Parametrisation
from library.diffusion.predictions import Prediction
from library.diffusion.rectified_flow import FlowPath
from library.diffusion.variance_preserving import VariancePreserving


@dataclass(frozen=True, eq=False)
class Bridge(FlowPath):
    """Timesteps are `process`'s own, float32, from 0 to its last one; in between, linear in the logarithm of the noise level."""

    process: VariancePreserving
    known: NoiseLevels
    """Of the process, on the CPU."""
    log_levels: Tensor
    """[T] float32 on the device: log(sigma' / alpha) of each timestep."""

    @classmethod
    def of(cls, process: VariancePreserving, known: NoiseLevels | None = None) -> Bridge:
        """Along the part of the flow that the network was trained on: of SD1.5 and SDXL up to sigma 0.936.

        known: the levels of `process`; default: read from its device.
        """
        known = process.levels if known is None else known
        log_levels = known.sigmas.log().float().to(process.alphas_cumprod.device)
        return cls(process.output, process, known, log_levels, high=_sigma(known.high))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], output: Prediction, device: torch.device | str) -> Bridge:
        return cls.of(VariancePreserving.from_config(config, output, device))

    @property
    def timesteps(self) -> int:
        return self.process.timesteps

    def _log_level(self, timesteps: Tensor) -> Tensor:
        before = timesteps.long().clamp(0, self.timesteps - 2)
        return torch.lerp(self.log_levels[before], self.log_levels[before + 1], timesteps.float() - before)

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """Those outside of the schedule are its ends."""
        table, levels = self.log_levels.to(sigmas.device), self.known
        logits = torch.logit(sigmas.float()).clamp(math.log(levels.low), math.log(levels.high))
        after = torch.searchsorted(table, logits).clamp(1, self.timesteps - 1)
        return after - 1 + (logits - table[after - 1]) / (table[after] - table[after - 1])

    def timestep_of(self, sigma: float) -> float:
        return self.known.timestep(sigma / (1 - sigma))

    def sigma_of(self, timestep: float) -> float:
        return _sigma(self.known.sigma(timestep))

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        level = self._log_level(timesteps).exp().view(-1, 1, 1, 1)
        alpha = (1.0 + level.square()).rsqrt()
        return alpha, level * alpha

    def snr(self, timesteps: Tensor) -> Tensor:
        return (-2.0 * self._log_level(timesteps)).exp()

    def require_conversion(self, to: Prediction) -> None:
        """Every level is finite, so that there is signal in all of them."""

    def inverse_scale(self, level: float) -> float:
        return math.sqrt((1 - level) ** 2 + level**2)

    def seen(self, x: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is shown and told at points x [B, C, h, w] of the flow, and at any sigmas [B] in 0..1."""
        return x * _scale(sigmas.view(-1, 1, 1, 1)), self.timesteps_of(sigmas)

    def velocity(self, output: Tensor, x: Tensor, sigmas: Tensor) -> Tensor:
        """u that the network's output for `seen` means, float32.

        Beyond its last level the network says which latents it sees in this much noise, and u leads away from them.
        """
        sigma = sigmas.view(-1, 1, 1, 1)
        known = sigma.clamp(max=self.high)
        alpha, level, seen = (1 - known) * _scale(known), known * _scale(known), x * _scale(sigma)
        noise = self.output.noise(output, seen, alpha, level)
        latents = (seen - level * noise) / alpha
        return torch.where(sigma > known, (x - latents) / sigma, (noise - x) / (1 - known))

    def clean(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        return self.process.clean(output, x / (1 - level), level / (1 - level))


def along_flow(
    parametrisation: Parametrisation, shift: float | None = None, known: NoiseLevels | None = None
) -> FlowPath:
    """The same base along a rectified flow, by a bridge where its network is of SD's schedules.

    shift: of the levels drawn with. known: as in `Bridge.of`.
    """
    if isinstance(parametrisation, VariancePreserving):
        path: FlowPath = Bridge.of(parametrisation, known)
    else:
        assert isinstance(parametrisation, FlowPath)
        path = parametrisation
    return path if shift is None else replace(path, shift=shift)


def _scale(sigma: Tensor) -> Tensor:
    """Of z of the schedule over x of the flow, at one signal-to-noise ratio."""
    return ((1 - sigma).square() + sigma.square()).rsqrt()


def _sigma(level: float) -> float:
    """The flow's sigma at a level of `NoiseLevels`."""
    return level / (1 + level)
