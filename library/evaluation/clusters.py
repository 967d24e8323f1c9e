"""Clusters of features without labels, and how much two labellings of the same pictures say of each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RESTARTS = 4
MOST_ROUNDS = 100
SHUFFLES = 20


def k_means(features: Tensor, count: int, seed: int) -> Tensor:
    """The cluster of each row of `features` [n, D], [n] int64 below `count`; the same for the same seed.

    Lloyd's algorithm from k-means++'s beginning (Arthur and Vassilvitskii 2007), the best of RESTARTS by the squared distances.
    """
    generator = torch.Generator().manual_seed(seed)
    x = features.float()
    best, least = torch.zeros(len(x), dtype=torch.int64), math.inf
    for _ in range(RESTARTS):
        centres = _spread_out(x, min(count, len(x)), generator)
        chosen = torch.full((len(x),), -1)
        for _ in range(MOST_ROUNDS):
            distances = torch.cdist(x, centres)
            before, chosen = chosen, distances.argmin(dim=1)
            if torch.equal(before, chosen):
                break
            members = F.one_hot(chosen, len(centres)).to(x)  # [n, clusters]
            counts = members.sum(dim=0)[:, None]
            centres = torch.where(counts > 0, members.T @ x / counts.clamp(min=1), centres)
        inertia = float(distances.amin(dim=1).double().square().sum())
        if inertia < least:
            best, least = chosen, inertia
    return best


def _spread_out(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of `x`, each chosen in proportion to its squared distance to those before it."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    for _ in range(count - 1):
        nearest = torch.cdist(x, x[chosen]).amin(dim=1).double().square()
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return x[chosen].clone()


def normalised_mutual_information(a: Tensor, b: Tensor) -> float:
    """2 I(a; b) / (H(a) + H(b)) of two labellings [n]: 1 where each follows from the other, 0 where neither says anything.

    Of few pictures it is above 0 by chance; `chance_information` says how far.
    """
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    joint.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    joint /= len(a)
    rows, columns = _entropy(joint.sum(dim=1)), _entropy(joint.sum(dim=0))
    both = rows + columns
    return 2 * (both - _entropy(joint.flatten())) / both if both > 0 else 1.0


def chance_information(a: Tensor, b: Tensor, seed: int) -> float:
    """The same of shuffled labels, the mean over SHUFFLES."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = (b[torch.randperm(len(b), generator=generator)] for _ in range(SHUFFLES))
    return sum(normalised_mutual_information(a, labels) for labels in shuffled) / SHUFFLES


def _entropy(shares: Tensor) -> float:
    there = shares[shares > 0]
    return float(-(there * there.log()).sum())
