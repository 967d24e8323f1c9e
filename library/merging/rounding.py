"""How merged weights become numbers of a narrower format, and how much of a change arrives there.

Rounding to nearest loses a change that is smaller than half the distance of two numbers of the format. Rounding at random,
up with the probability that makes the mean right, keeps it on average over a layer (Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Rounding:
    """To the nearest number, or at random to one of the two nearest."""

    stochastic: bool = False
    seed: int = 0

    def __call__(self, values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """`values`, float32, as `dtype`. name: of the tensor, from which and the seed what is random follows."""
        nearest = values.to(dtype)
        if not self.stochastic or not dtype.is_floating_point or dtype.itemsize >= values.dtype.itemsize:
            return nearest
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
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


def share_arrived(before: Tensor, change: Tensor, after: Tensor) -> float:
    """How much of `change` is in after - before: the length of its projection on the change, 1 where all of it is.

    before, change: float32; after: as written. A change of zero arrives.
    """
    wanted, found = change.flatten(), (after.float() - before).flatten()
    whole = float(torch.dot(wanted, wanted))
    return float(torch.dot(found, wanted)) / whole if whole > 0 else 1.0
