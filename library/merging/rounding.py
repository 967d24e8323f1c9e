"""How merged weights become numbers of a narrower format, and how much of a change arrives there.

Rounding to nearest loses a change that is smaller than half the distance of two numbers of the format. Rounding at random,
up with the probability that makes the mean right, keeps it on average over a layer (Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Rounding:
    """To the nearest number, or at random to one of the two nearest."""

    stochastic: bool = False
    seed: int = 0

    def of(self, name: str) -> Callable[[Tensor, torch.dtype], Tensor]:
        """Rounds one tensor, perhaps in several pieces in their order. name: what is random follows from it and the seed."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return lambda values, dtype: self._round(values, dtype, generator)

    def __call__(self, values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """`values`, float32, the whole tensor `name` (see `of`), as `dtype`."""
        return self.of(name)(values, dtype)

    def _round(self, values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        nearest = values.to(dtype)
        if not self.stochastic or not dtype.is_floating_point or dtype.itemsize >= values.dtype.itemsize:
            return nearest
        draws = torch.rand(values.shape, generator=generator).to(values.device)
        size = values.abs()
        near = size.to(dtype)
        # Numbers of a format follow each other as their bits do.
        bits = near.view(_BITS[dtype.itemsize])
        below = bits - (near.float() > size).to(bits.dtype)
        low, high = below.view(dtype).float(), (below + 1).view(dtype).float()
        goes_up = draws * (high - low) < size - low  # never up where it is a number of the format already
        rounded = torch.where(goes_up, high, low).copysign(values)
        return torch.where(torch.isfinite(nearest.float()), rounded, nearest.float()).to(dtype)

    def describe(self) -> str:
        """ ", rounded stochastically (seed 0)", or nothing."""
        return f", rounded stochastically (seed {self.seed})" if self.stochastic else ""


NEAREST = Rounding()


@dataclass
class Arrival:
    """What of a change is in a weight as written, summed up over the weight's pieces."""

    before: float = 0.0
    """Square of the Frobenius norm of the weight before."""
    change: float = 0.0
    """The same of the change."""
    found: float = 0.0
    """Scalar product of after - before with the change."""

    def add(self, before: Tensor, change: Tensor, after: Tensor) -> None:
        """before, change: float32; after: as written."""
        old, wanted = before.flatten(), change.flatten()
        self.before += float(torch.dot(old, old))
        self.change += float(torch.dot(wanted, wanted))
        self.found += float(torch.dot(after.float().flatten() - old, wanted))

    @property
    def share(self) -> float:
        """The length of what arrived, projected on the change, over that of the change: 1 where all of it did, or it is zero."""
        return self.found / self.change if self.change > 0 else 1.0
