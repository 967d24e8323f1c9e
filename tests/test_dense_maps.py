"""Tokens in colours, and where two of them agree."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from library.diffusion.dense_maps import dense_maps, diverging, pca_colours


def test_the_cosine_map_shows_where_tokens_agree() -> None:
    teacher = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    predicted = torch.stack([3 * teacher[0, 0], -teacher[0, 1], teacher[0, 2], teacher[0, 3]])[None]
    one = dense_maps(["x"], [Image.new("RGB", (20, 20))], teacher, predicted, torch.rand(1, 5, 2, 2))[0]
    assert one.mean_cosine == pytest.approx(0.5, abs=1e-6)
    corners = [one.cosine.getpixel(place) for place in ((2, 2), (17, 2), (2, 17))]
    assert corners == [(180, 4, 38), (59, 76, 192), (180, 4, 38)]
    assert one.teacher.getpixel((2, 2)) == one.predicted.getpixel((2, 2)) != one.predicted.getpixel((17, 2))


def test_colours_are_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 30, 30, 3, generator=generator) * torch.tensor([1.0, 9.0, 3.0]) + 5
    colours = pca_colours(features, like=features)
    assert colours.min() >= 0 and colours.max() <= 1
    for colour, channel in enumerate((1, 2, 0)):
        both = torch.stack([colours[..., colour].flatten(), features[..., channel].flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9
    assert torch.equal(pca_colours(features * 2, like=features * 2), pca_colours(features * 2, like=features * 2))
    flat = pca_colours(torch.ones(2, 3, 4), like=torch.ones(2, 3, 4))
    assert torch.equal(flat, torch.full((2, 3, 3), 0.5))


def test_the_diverging_scale_is_grey_in_the_middle() -> None:
    low, middle, high = (diverging(torch.tensor([-1.0, 0.0, 2.0])) * 255).round().int().tolist()
    assert (low, middle, high) == ([59, 76, 192], [221, 221, 221], [180, 4, 38])
