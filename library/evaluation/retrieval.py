"""Agreement of two representations of the same pictures on nearest neighbours.

Neighbours are by cosine; a picture is not its own neighbour. Where all features are equal, the result depends on the order of the
pictures alone; `similarity.linear_cka` is nan for such features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from library.diffusion.alignment_losses import normalize
from library.errors import UserError
from library.evaluation.similarity import cosines, count_pairs, unbiased_hsic

ROUNDING = 1e-6
"""Cosines in float32 that differ by less are equal: eight units in the last place of 1."""


def nearest(features: Tensor, k: int) -> Tensor:
    """Indices of each picture's k nearest others, the nearest first; features [n, D] -> [n, k]."""
    count = features.shape[0]
    if not 1 <= k < count:
        raise UserError(
            f"{k} neighbours of each of {count} pictures are impossible: k must be at least 1 and below {count}."
        )
    return cosines(features).fill_diagonal_(-torch.inf).topk(k, dim=1).indices


def mutual_knn(a: Tensor, b: Tensor, k: int = 10) -> float:
    """Mean share of a picture's k nearest in `a` that are among its k nearest in `b` (Huh et al. 2024); self 1.

    Unrelated features get k / (n - 1), which falls with n: compare only at equal n and k.
    """
    count_pairs(a, b, least=2, what="Mutual neighbours")
    return (_mask(a, k) & _mask(b, k)).sum(dim=1).float().mean().item() / k


def neighbour_recall(features: Tensor, teacher: Tensor, k: int) -> float:
    """Share of pictures whose nearest picture to the teacher is among the k nearest of `features`; self 1.

    Unrelated features get k / (n - 1). The spaces may differ, so that it works for the trunk as well as for the head.
    """
    count_pairs(features, teacher, least=2, what="Neighbours")
    return (nearest(features, k) == nearest(teacher, 1)).any(dim=1).float().mean().item()


def retrieval_recall(predicted: Tensor, teacher: Tensor, k: int) -> float:
    """Share of pictures whose own teacher vector is among the k nearest to its prediction; self 1.

    Both [n, D] in the teacher's space. Unrelated predictions get k / n. Duplicates of a picture lower it.
    """
    count = count_pairs(predicted, teacher, least=2, what="Retrieval")
    if not 1 <= k <= count:
        raise UserError(f"{k} nearest of {count} pictures are impossible: k must be at least 1 and at most {count}.")
    similarities = normalize(predicted) @ normalize(teacher).T
    own = similarities.diagonal()[:, None]
    # Ties do not count, or a constant would retrieve everything. Equal cosines differ by rounding between columns.
    others = (similarities >= own - ROUNDING).sum(dim=1) - 1
    return (others < k).float().mean().item()


def cknna(a: Tensor, b: Tensor, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment: CKA on pairs that are near each other on both sides; self 1.

    REPA's definition (arXiv 2410.06940, appendix) as in platonic-rep's code, which centres at another point than the printed one:
    unbiased HSIC of the cosines, masked to pairs i != j where j is among i's k nearest on both sides. Compared with itself, a
    side's mask is its own neighbours. Invariant to rotation and scale, not to shifts. Unrelated features get about k / n, because
    both factors are zero at the same pairs. REPA reports n = 10,000 and k = 10. Needs 4 pictures.
    """
    count_pairs(a, b, least=4, what="CKNNA")
    if k < 2:
        raise UserError(f"CKNNA needs 2 neighbours or more, got {k}.")
    kernels = [cosines(side).double() for side in (a, b)]
    masks = [_mask(side, k) for side in (a, b)]
    both = masks[0] & masks[1]
    across = unbiased_hsic(both * kernels[0], both * kernels[1])
    own = [unbiased_hsic(mask * kernel, mask * kernel) for mask, kernel in zip(masks, kernels, strict=True)]
    # HSIC of an asymmetric matrix with itself can be negative at very small n.
    if min(own) <= 0:
        return math.nan
    return (across / (own[0].sqrt() * own[1].sqrt())).item()


def _mask(features: Tensor, k: int) -> Tensor:
    """[n, n]: whether j is among the k nearest of i."""
    count = features.shape[0]
    empty = torch.zeros(count, count, dtype=torch.bool, device=features.device)
    return empty.scatter_(1, nearest(features, k), True)
