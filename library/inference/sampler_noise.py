"""The noise of a picture from its own seed: the same at every place of a batch and on every device.

Drawn on the CPU as float32. A1111 draws ancestral noise for the whole batch on the GPU by default, and k-diffusion draws SDE noise
from a tree of its own: pictures of the stochastic samplers match theirs in distribution, not one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# noise(sigma, next_sigma): standard normal, [B, ...] like the latents.
NoiseSource = Callable[[float, float], Tensor]

# The time of the Brownian motion is log sigma. All levels in use lie within this range; it is resolved to 2^-21 of it, 1e-5.
_EARLIEST, _LATEST = math.log(1e-4), math.log(1e5)
_DEPTH = 21
# Random streams apart from that of the initial noise, whose generator has the plain seed.
_STEP_STREAM, _BRIDGE_STREAM, _PASS_STREAM = 1, 2, 3


def initial_noise(seed: int, shape: Sequence[int], second_pass: bool = False) -> Tensor:
    """Noise [1, *shape] of one picture, float32, on the CPU.

    In the first pass it is torch's for the plain seed, as in diffusers and A1111 (RNG source "CPU").
    """
    generator = _generator(seed, _PASS_STREAM) if second_pass else torch.Generator().manual_seed(seed)
    return torch.randn((1, *shape), generator=generator)


@dataclass
class _SeededNoise:
    """seeds: of each picture. shape: of one picture's latents, without the batch. second_pass: of the hires fix; other noise."""

    seeds: Sequence[int]
    shape: Sequence[int]
    device: torch.device | str = "cpu"
    second_pass: bool = field(default=False, kw_only=True)


@dataclass
class StepNoise(_SeededNoise):
    """Fresh noise at each step, for the ancestral samplers.

    Picture i's k-th draw depends on seeds[i] and k alone.
    """

    def __post_init__(self) -> None:
        self._generators = [_generator(seed, _STEP_STREAM, int(self.second_pass)) for seed in self.seeds]

    def __call__(self, _sigma: float, _next_sigma: float) -> Tensor:
        drawn = [torch.randn(self.shape, generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(self.device)


@dataclass
class BrownianNoise(_SeededNoise):
    """Increments of one Brownian motion per picture, for the SDE samplers; divided by their own deviation.

    The seed fixes the whole path, so that any two levels can be given in any order, and more steps refine a picture instead of
    making another one. Computed by halving the interval (the Brownian bridge, Lévy's construction); every midpoint has a generator
    of its own.
    """

    def __post_init__(self) -> None:
        # Consecutive steps share a level: one ends where the next begins.
        self._last: dict[float, Tensor] = {}

    def __call__(self, sigma: float, next_sigma: float) -> Tensor:
        start, end = sorted(_time(level) for level in (sigma, next_sigma))
        if start == end:
            raise ValueError(f"the two levels of a step must differ, got {sigma} and {next_sigma}")
        found = {time: self._last[time] if time in self._last else self._path(time) for time in (start, end)}
        self._last = found
        return ((found[end] - found[start]) / math.sqrt(end - start)).float().to(self.device)

    def _path(self, time: float) -> Tensor:
        """All pictures' paths at a time [B, ...] float64."""
        return torch.stack([self._one_path(seed, time) for seed in self.seeds])

    def _one_path(self, seed: int, time: float) -> Tensor:
        low, high = _EARLIEST, _LATEST
        at_low = torch.zeros(self.shape, dtype=torch.float64)
        at_high = math.sqrt(high - low) * self._normal(seed, 0, 0)
        place = 0
        for depth in range(1, _DEPTH + 1):
            middle = (low + high) / 2
            at_middle = (at_low + at_high) / 2 + math.sqrt(high - low) / 2 * self._normal(seed, depth, place)
            if time < middle:
                high, at_high, place = middle, at_middle, 2 * place
            else:
                low, at_low, place = middle, at_middle, 2 * place + 1
        return at_low + (time - low) / (high - low) * (at_high - at_low)

    def _normal(self, seed: int, depth: int, place: int) -> Tensor:
        return torch.randn(
            self.shape, generator=_generator(seed, _BRIDGE_STREAM, depth, place, int(self.second_pass))
        ).double()


def _time(sigma: float) -> float:
    return min(max(math.log(sigma), _EARLIEST), _LATEST)


def _generator(seed: int, *stream: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
