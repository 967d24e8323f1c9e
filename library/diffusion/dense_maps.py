"""Dense maps: the teacher's and the predicted tokens of a picture in colours, and their cosine at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.diffusion.alignment_losses import normalize

LOW, MIDDLE, HIGH = (59, 76, 192), (221, 221, 221), (180, 4, 38)
"""Moreland's diverging cool-warm colours, for -1, 0 and 1."""


@dataclass(frozen=True)
class DenseMaps:
    """The maps of one held-out picture, each of its size. teacher and predicted share their colours; trunk has others."""

    sample_id: str
    photo: Image.Image
    teacher: Image.Image
    predicted: Image.Image
    cosine: Image.Image
    """Cosine of the two token by token: blue -1, grey 0, red 1."""
    trunk: Image.Image
    mean_cosine: float

    def columns(self) -> dict[str, Image.Image]:
        return {
            "photo": self.photo,
            "DINOv2": self.teacher,
            "predicted": self.predicted,
            "cosine": self.cosine,
            "trunk": self.trunk,
        }


def dense_maps(
    ids: Sequence[str],
    photos: Sequence[Image.Image],
    teacher: Tensor,
    predicted: Tensor,
    maps: Tensor,
    token_grid: tuple[int, int] | None = None,
) -> list[DenseMaps]:
    """Maps of tokens [n, N, D] and of trunk features [n, C, h, w], of the same n photos. token_grid: rows and columns of the
    tokens; None is a square."""
    rows, columns = token_grid or (int(teacher.shape[1] ** 0.5),) * 2
    sides = [normalize(tokens).unflatten(1, (rows, columns)) for tokens in (teacher, predicted)]
    cosines = (sides[0] * sides[1]).sum(dim=-1)  # [n, rows, columns]
    colours = [pca_colours(tokens, like=sides[0]) for tokens in sides]
    trunk = maps.float().permute(0, 2, 3, 1)
    own = pca_colours(trunk, like=trunk)
    return [
        DenseMaps(
            sample_id=sample_id,
            photo=photo,
            teacher=colour_picture(colours[0][i], photo.size),
            predicted=colour_picture(colours[1][i], photo.size),
            cosine=colour_picture(diverging(cosines[i]), photo.size),
            trunk=colour_picture(own[i], photo.size),
            mean_cosine=cosines[i].mean().item(),
        )
        for i, (sample_id, photo) in enumerate(zip(ids, photos, strict=True))
    ]


def pca_colours(features: Tensor, *, like: Tensor) -> Tensor:
    """`features` [..., D] as red, green and blue by the first three principal components of `like`: [..., 3] in [0, 1].

    The range of a colour is its component's 2nd to 98th percentile in `like`. Signs are fixed, so that equal features get equal
    colours; with fewer than three components the remaining colours are 0.5.
    """
    rows = like.reshape(-1, like.shape[-1]).float()
    mean = rows.mean(dim=0)
    axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:3]  # [<=3, D]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    known = (rows - mean) @ axes.T
    low, high = torch.quantile(_thinned(known), torch.tensor([0.02, 0.98]), dim=0)
    flat = high - low <= 1e-6 * known.abs().amax()
    values = ((features.float() - mean) @ axes.T - low) / (high - low).clamp(min=1e-12)
    values = torch.where(flat, 0.5, values).clamp(0, 1)
    return torch.cat([values, values.new_full((*values.shape[:-1], 3 - len(axes)), 0.5)], dim=-1)


def diverging(values: Tensor) -> Tensor:
    """Values in [-1, 1] as colours, [..., 3] in [0, 1]."""
    low, middle, high = (torch.tensor(colour) / 255 for colour in (LOW, MIDDLE, HIGH))
    strength = values.abs().clamp(max=1)[..., None]
    return middle + (torch.where(values[..., None] < 0, low, high) - middle) * strength


def colour_picture(colours: Tensor, size: tuple[int, int]) -> Image.Image:
    """[h, w, 3] in [0, 1] as an image of `size`, each token a block."""
    pixels = (colours * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.NEAREST)


def _thinned(rows: Tensor, limit: int = 1 << 20) -> Tensor:
    """At most `limit` rows, evenly spaced: torch.quantile accepts at most 2^24 numbers."""
    return rows[:: -(-len(rows) // limit)]
