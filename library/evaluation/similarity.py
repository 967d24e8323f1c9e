"""Similarity of two representations of the same pictures: token by token, and of the cosines between pictures.

Rows of both sides belong to the same pictures in the same order. Results are floats; nan where a side has no variance and the
measure is undefined. Each should be compared with the predictors of `baselines`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from library.diffusion.alignment_losses import normalize
from library.errors import UserError

Mean = Literal["set", "position", "image"]

_AXES: dict[Mean, tuple[int, ...]] = {"set": (0, 1), "position": (0,), "image": (1,)}
_FLAT = 1e-6
"""Deviation relative to length below which features are equal except for rounding in float32."""


def token_cosine(predicted: Tensor, target: Tensor) -> float:
    """Mean over pictures and tokens of cos(predicted, target), both [n, N, D]; self 1, unrelated directions 0.

    Biased upwards by what the target's tokens have in common: a constant gets about the length of their mean unit vector, 0.3 to
    0.6 for DINOv2. `centred_token_cosine` removes that. The number of pictures affects only its standard error.
    """
    return (normalize(predicted) * normalize(target)).sum(dim=-1).mean().item()


def centred_token_cosine(predicted: Tensor, target: Tensor, mean: Mean) -> float:
    """`token_cosine` after the mean of each side's unit tokens [n, N, D] was subtracted; self 1, any constant 0.

    mean: over the whole set; over the pictures at each position, which removes what the position alone predicts; or over the
    tokens of each image, which leaves the differences within it. A token that equals its mean counts as 0. The means are of these
    n pictures: independent sides still get 0, but with few pictures the remainders are too short.
    """
    sides = [normalize(side) for side in (predicted, target)]
    left = [side - side.mean(dim=_AXES[mean], keepdim=True) for side in sides]
    # normalize() does not lengthen vectors shorter than 1e-6: rounding errors must not become directions.
    left = [torch.where(side.norm(dim=-1, keepdim=True) > _FLAT, side, 0.0) for side in left]
    return token_cosine(*left)


def pool_tokens(tokens: Tensor) -> Tensor:
    """One unit vector per picture, [n, N, D] -> [n, D]: the mean of its unit tokens, as the sample manifold loss pools."""
    return normalize(normalize(tokens).mean(dim=1))


def sample_similarity_mae(a: Tensor, b: Tensor, *, centred: bool = False) -> float:
    """Mean over pairs of pictures of |cos(a_i, a_j) - cos(b_i, b_j)|; features [n, *], widths may differ. Self 0.

    A distance, in [0, 2]. Where features share a large mean, as a U-Net's do, all cosines are near 1 and the distance is always
    large; centred subtracts each side's mean first. Unbiased in n; needs 2 pictures.
    """
    count = count_pairs(a, b, least=2, what="Similarities between pictures")
    if centred:
        a, b = _centred(a), _centred(b)
    difference = (cosines(a) - cosines(b)).abs()
    difference.fill_diagonal_(0.0)
    return (difference.sum() / (count * (count - 1))).item()


def linear_cka(a: Tensor, b: Tensor, *, debiased: bool = True) -> float:
    """Linear centred kernel alignment of features [n, *] (Kornblith et al. 2019), widths may differ; self 1.

    Invariant to rotation, scale and shift of either side. debiased: with the unbiased HSIC of Song et al. 2012 (JMLR 13, equation
    5), whose expectation is 0 for unrelated features and which may be below; needs 4 pictures. The biased one is in [0, 1] and near
    1 for unrelated features of width >> n, about 0.9 at width 10 n: do not compare it across n.
    """
    count_pairs(a, b, least=4 if debiased else 2, what="CKA")
    a, b = _centred(a.double()), _centred(b.double())
    if a.count_nonzero() == 0 or b.count_nonzero() == 0:
        return math.nan
    hsic = unbiased_hsic if debiased else _hsic_of_centred
    k, j = a @ a.T, b @ b.T
    return _ratio(hsic(k, j), hsic(k, k), hsic(j, j))


def unbiased_hsic(k: Tensor, j: Tensor) -> Tensor:
    """Song et al. 2012 (JMLR 13), equation 5, of two n x n matrices; their diagonals do not matter. Needs n >= 4.

    As published, for symmetric matrices; for others, which CKNNA's masks give, as in platonic-rep's metrics.py.
    """
    count = k.shape[0]
    k, j = (matrix.clone().fill_diagonal_(0.0) for matrix in (k, j))
    total = (k * j.T).sum() + k.sum() * j.sum() / ((count - 1) * (count - 2))
    return (total - 2 * (k.sum(dim=0) @ j.sum(dim=1)) / (count - 2)) / (count * (count - 3))


def clamp_outliers(features: Tensor, quantile: float = 0.95) -> Tensor:
    """Features [n, D] clamped to +- the mean over rows of each row's `quantile` of absolute values.

    As platonic-rep does before it searches neighbours: a few channels of a U-Net are so large that they determine every cosine.
    """
    bound = torch.quantile(features.abs(), quantile, dim=1).mean()
    return features.clamp(-bound, bound)


def cosines(features: Tensor) -> Tensor:
    """Cosine of every pair of rows, [n, D] -> [n, n] float32."""
    unit = normalize(features)
    return unit @ unit.T


def count_pairs(a: Tensor, b: Tensor, *, least: int, what: str) -> int:
    """The number of pictures of both sides. Raises UserError where the sides differ, or are too few for the measure."""
    if a.shape[0] != b.shape[0]:
        raise UserError(f"{what}: both sides must be of the same pictures, got {a.shape[0]} and {b.shape[0]}.")
    if a.shape[0] < least:
        raise UserError(f"{what}: at least {least} pictures are needed, got {a.shape[0]}. Give more held-out pictures.")
    return a.shape[0]


def _centred(features: Tensor) -> Tensor:
    """features minus their mean row; exactly zero where only rounding is left."""
    left = features - features.mean(dim=0)
    return left if left.norm() > _FLAT * features.norm() else torch.zeros_like(left)


def _hsic_of_centred(k: Tensor, j: Tensor) -> Tensor:
    return (k * j).sum()


def _ratio(across: Tensor, first: Tensor, second: Tensor) -> float:
    """across / sqrt(first * second); nan where one of these is not positive."""
    if first <= 0 or second <= 0:
        return math.nan
    return (across / (first.sqrt() * second.sqrt())).item()
