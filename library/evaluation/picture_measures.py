"""Measures of generated pictures on their embeddings: likeness to photos, drift, diversity, distances between sets.

Embeddings [n, D] have rows of unit length unless a docstring says otherwise. They are on the CPU; long sums are in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from library.evaluation.standard_errors import CONFIDENCE, Statistic

FEWEST_FOR_SETS = 64
"""Pictures on each side below which the noise of a distance between sets exceeds the difference. Measured: two slightly
different models are 0.35 standard deviations apart at 8 to 32 pictures, 0.6 at 64, 1.2 at 256."""
COPIES_BY_CHANCE = 0.05
"""Share of real photos, held-out ones and training pictures, that are nearer to another training picture than a copy has to be."""
SAME_PICTURE = 1 - 1e-6
"""Cosine above which two embeddings are of one picture: that it is there twice says nothing of how near photos are."""
FEWEST_REAL = 4
"""Photos and training pictures, together, without which it cannot be said how near these are to each other."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Bandwidth and factor of CMMD's published code (Jayasumana et al. 2024, arXiv 2401.09603)."""


def likeness(pictures: Tensor, photos: Tensor) -> Tensor:
    """Mean cosine of each picture to the photos: [n]. DreamBooth's DINO-I (arXiv 2208.12242)."""
    return (pictures.double() @ photos.double().T).mean(dim=1)


def likeness_among(photos: Tensor) -> float:
    """Mean cosine between different photos: the likeness of pictures that are as like the photos as these are to each other."""
    count = len(photos)
    cosines = photos.double() @ photos.double().T
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def nearest_photo(pictures: Tensor, photos: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each picture to the photo that is nearest to it, and which one it is: [n], [n]."""
    nearest = (pictures.double() @ photos.double().T).max(dim=1)
    return nearest.values, nearest.indices


def nearest_among(photos: Tensor) -> Tensor:
    """Cosine of each photo to the nearest other one: [n]; empty where there is none."""
    if len(photos) < 2:
        return torch.empty(0, dtype=torch.float64)
    return (photos.double() @ photos.double().T).fill_diagonal_(-torch.inf).max(dim=1).values


def copying_level(real: Tensor) -> tuple[float, float]:
    """The cosine to its nearest training picture above which a picture is a copy, and the share that may be so by chance.

    real [n]: those of pictures that were not drawn, of which COPIES_BY_CHANCE reach the level. How many others of their kind do is
    Beta-distributed, as order statistics are (David and Nagaraja 2003, "Order Statistics", 2.5): of few it may be many.
    """
    from scipy.stats import beta

    real = real[real < SAME_PICTURE].sort(descending=True).values
    reach = max(1, round(COPIES_BY_CHANCE * len(real)))
    return float(real[reach - 1]), float(beta.ppf(CONFIDENCE, reach, len(real) + 1 - reach))


def finds_own(pictures: Tensor, gallery: Tensor, own: Tensor, left_out: Tensor) -> Tensor:
    """1 for each picture whose nearest of the gallery [m, D] is one of its own, else 0: [n]. own, left_out: bool [n, m]."""
    cosines = (pictures.double() @ gallery.double().T).masked_fill(left_out, -torch.inf)
    return own.gather(1, cosines.argmax(dim=1, keepdim=True))[:, 0].double()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine, row by row: [n]."""
    return 1 - (a.double() * b.double()).sum(dim=1)


def pixel_distances(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of pictures uint8 [n, 3, h, w], as a share of white: [n]."""
    return torch.stack([((x.double() - y.double()) / 255).square().mean().sqrt() for x, y in zip(a, b, strict=True)])


def diversity(pictures: Tensor, groups: Tensor) -> Statistic:
    """Mean of 1 - cosine over pairs of seeds within each group (prompt), groups weighted equally; nan where a group has no pair."""
    apart = 1 - pictures.double() @ pictures.double().T

    def statistic(weights: Tensor) -> float:
        rows = [groups == group for group in groups.unique()]
        return sum(_mean_of_pairs(apart[row][:, row], weights[row]) for row in rows) / len(rows)

    return statistic


def _mean_of_pairs(values: Tensor, weights: Tensor) -> float:
    """Mean of values [n, n] at i != j, weighted by products of weights [n]; nan without any pair."""
    pairs = torch.outer(weights, weights).fill_diagonal_(0)
    total = float(pairs.sum())
    return float((pairs * values).sum()) / total if total else math.nan


def ratio(of: Statistic, to: Statistic) -> Statistic:
    """The quotient of two statistics; nan where the denominator is 0."""

    def statistic(weights: Tensor) -> float:
        below = to(weights)
        return of(weights) / below if below else math.nan

    return statistic


def kernel_distance(pictures: Tensor, photos: Tensor) -> Statistic:
    """KID's unbiased estimate on any embeddings, not of unit length: squared MMD under (x.y / D + 1)^3. May be below 0.

    Binkowski et al. 2018 (arXiv 1801.01401), eq. 4. With DINOv2's embeddings it agrees better with human judgement than
    with Inception's (Stein et al. 2023, arXiv 2306.04675).
    """
    width = pictures.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / width + 1) ** 3

    return _unbiased(kernel(pictures, pictures), kernel(pictures, photos), kernel(photos, photos))


def clip_distance(pictures: Tensor, photos: Tensor) -> Statistic:
    """CMMD, as a U-statistic: squared MMD of CLIP embeddings of unit length under a Gaussian kernel, times 1000.

    Unlike in the published code, pairs of a picture with itself are left out, which would bias it by n. May be below 0.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return CMMD_SCALE * (-torch.cdist(a.double(), b.double()).square() / (2 * CMMD_SIGMA**2)).exp()

    return _unbiased(kernel(pictures, pictures), kernel(pictures, photos), kernel(photos, photos))


def _unbiased(of: Tensor, across: Tensor, to: Tensor) -> Statistic:
    """Squared MMD from the kernel matrices pictures x pictures, pictures x photos and photos x photos."""
    others = _mean_of_pairs(to, torch.ones(len(to), dtype=torch.float64))
    to_photos = across.mean(dim=1)

    def statistic(weights: Tensor) -> float:
        return _mean_of_pairs(of, weights) + others - 2 * float((weights * to_photos).sum() / weights.sum())

    return statistic
