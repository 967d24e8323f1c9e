"""Orders of batches without pictures."""

from __future__ import annotations

import numpy as np

from library.data.order import BatchOrder, Group


def whole_steps(
    samples: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, accumulation: int = 1
) -> BatchOrder:
    """Of class pictures: one group, and full steps only."""
    group = Group(np.arange(samples), batch_size)
    return BatchOrder([group], seed, rank, world_size, accumulation, whole_steps=True)
