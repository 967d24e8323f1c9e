"""Which sigmas of a rectified flow are trained, and how often."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from library.diffusion.noise_levels import shifted

_BISECTIONS = 60


@dataclass(frozen=True)
class SigmaDensity:
    """A density on (0, 1), by its quantile function, so that a part of it is drawn exactly and without rejection.

    uniform. logit_normal: sigmoid(mean + std * N(0, 1)) (Esser et al. 2024, equation 19). mode: u - mode_scale *
    (sin^2(pi u / 2) - u) for uniform u (their equation 20), -1 <= mode_scale <= 2 / (pi - 2). All of them shifted by `shift`, which
    for logit_normal is a mean of ln(shift) more; base_area: latents of this many places keep that shift, others have it times
    sqrt(area / base_area) (their equation 23).
    """

    kind: Literal["uniform", "logit_normal", "mode"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    base_area: float | None = None

    def part(self, uniform: Tensor, low: float = 0.0, high: float = 1.0, area: float | None = None) -> Tensor:
        """Sigmas at these quantiles of the part from `low` to `high`: of uniform numbers in 0..1, draws.

        area: places of the latents, for base_area.
        """
        shift = self.shift_at(area)
        first, last = (self._cumulative(shifted(end, 1 / shift)) for end in (low, high))
        return shifted(self._quantile(first + (last - first) * uniform), shift).clamp(low, high)

    def shift_at(self, area: float | None = None) -> float:
        if self.base_area is None or area is None:
            return self.shift
        return self.shift * math.sqrt(area / self.base_area)

    def _quantile(self, uniform: Tensor) -> Tensor:
        """Before the shift."""
        if self.kind == "logit_normal":
            normal = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
            return torch.sigmoid(self.mean + self.std * normal)
        if self.kind == "mode":
            return _mode(uniform, self.mode_scale, torch.sin)
        return uniform

    def _cumulative(self, sigma: float) -> float:
        """The inverse of `_quantile`, for a number."""
        if self.kind == "logit_normal" and 0 < sigma < 1:
            logit = math.log(sigma / (1 - sigma))
            return math.erfc((self.mean - logit) / (self.std * math.sqrt(2))) / 2
        if self.kind == "mode" and 0 < sigma < 1:
            return _mode_inverse(sigma, self.mode_scale)
        return sigma


def _mode(uniform: Any, scale: float, sin: Callable[[Any], Any]) -> Any:
    return uniform - scale * (sin(math.pi / 2 * uniform) ** 2 - uniform)


@lru_cache
def _mode_inverse(sigma: float, scale: float) -> float:
    """By bisection; asked for the same ends at every step of a training."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _mode(middle, scale, math.sin) < sigma else (low, middle)
    return low
