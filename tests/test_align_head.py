"""AlignHead: the documented formula, its shapes, its size, and where its first weights come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from networks import AdapterError
from networks.align_head import AlignHead, AlignHeads, HeadKind, resize_bilinear
from networks.features import TIME

KINDS: tuple[HeadKind, ...] = ("mlp", "linear", "conv3x3")


def slow_resize(x: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with half-pixel centres and clamped borders, [C, h, w] -> [C, size, size], one pixel at a time."""
    channels, height, width = x.shape
    out = np.zeros((channels, size, size))
    for row in range(size):
        for column in range(size):
            y = max((row + 0.5) * height / size - 0.5, 0.0)
            z = max((column + 0.5) * width / size - 0.5, 0.0)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dz = y - top, z - left
            above = x[:, top, left] * (1 - dz) + x[:, top, right] * dz
            below = x[:, bottom, left] * (1 - dz) + x[:, bottom, right] * dz
            out[:, row, column] = above * (1 - dy) + below * dy
    return out


def slow_tokens(head: AlignHead, features: torch.Tensor) -> np.ndarray:
    """The mlp head on one feature map [C, h, w] in float64 with loops, from the formula alone."""
    state = {name: value.double().numpy() for name, value in head.state_dict().items()}
    first, bias, second = (state[f"proj.{name}"] for name in ("0.weight", "0.bias", "2.weight"))
    x = features.double().numpy()
    projected = np.zeros((second.shape[0], *x.shape[1:]))
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            hidden = first[:, :, 0, 0] @ x[:, row, column] + bias
            hidden = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in hidden])
            projected[:, row, column] = second[:, :, 0, 0] @ hidden
    resized = slow_resize(projected, head.grid)
    tokens = [resized[:, row, column] for row in range(head.grid) for column in range(head.grid)]
    return np.stack([token / np.linalg.norm(token) for token in tokens])


def test_mlp_is_the_documented_formula() -> None:
    head = AlignHead(6, 5, grid=7, seed=3)
    features = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))
    tokens = head(features)
    expected = np.stack([slow_tokens(head, one) for one in features])
    assert tokens.shape == (2, 49, 5)
    np.testing.assert_allclose(tokens.detach().numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (4, 6), (37, 37), (1, 1)])
def test_resize_is_torchs_bilinear(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_bilinear(x, 16, 16), expected, atol=1e-5, rtol=0)
    expected = F.interpolate(x, size=(5, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_bilinear(x, 5, 9), expected, atol=1e-5, rtol=0)


def test_mlp_has_the_documented_size_and_names() -> None:
    heads = AlignHeads({"mid": 1280}, {"a": 1024})
    assert sum(parameter.numel() for parameter in heads.parameters()) == 2_360_320
    assert list(heads.state_dict()) == ["mid.proj.0.weight", "mid.proj.0.bias", "mid.proj.2.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_unit_vectors_on_the_grid(kind: HeadKind) -> None:
    tokens = AlignHead(8, 12, grid=16, kind=kind)(torch.randn(2, 8, 4, 4))
    assert tokens.shape == (2, 256, 12)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 256))


@pytest.mark.bits
def test_tokens_of_a_map_of_another_aspect_come_on_a_grid_of_its_own() -> None:
    """A map that varies by row alone gives equal tokens along the rows of any grid, row by row."""
    head = AlignHead(8, 12, grid=16)
    column = torch.randn(2, 8, 4, 1, generator=torch.Generator().manual_seed(0)).expand(2, 8, 4, 6)
    tokens = head(column, (6, 9)).unflatten(1, (6, 9))
    torch.testing.assert_close(tokens, tokens[:, :, :1].expand_as(tokens))
    assert not torch.allclose(tokens[:, 0], tokens[:, 5])
    assert torch.equal(head(column, (16, 16)), head(column))


@pytest.mark.parametrize(("kind", "expected"), [("linear", 8 * 12 + 12), ("conv3x3", 8 * 12 * 9 + 12)])
def test_variants_are_one_convolution_with_bias(kind: HeadKind, expected: int) -> None:
    assert sum(parameter.numel() for parameter in AlignHead(8, 12, kind=kind).parameters()) == expected


def test_bfloat16_features_give_float32_tokens_and_float32_gradients() -> None:
    head = AlignHead(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = head(torch.randn(1, 8, 4, 4).bfloat16())
    tokens[..., 0].sum().backward()
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(1, 256))  # not rounded to bfloat16
    assert {parameter.grad.dtype for parameter in head.parameters() if parameter.grad is not None} == {torch.float32}


def test_a_zero_feature_map_has_finite_tokens_and_gradients() -> None:
    head = AlignHead(8, 12)
    features = torch.zeros(1, 8, 4, 4, requires_grad=True)
    head.proj[0].bias.data.zero_()
    head(features).sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()


@pytest.mark.bits
@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_follow_from_seed_and_tap_alone(kind: HeadKind) -> None:
    torch.manual_seed(1)
    one = AlignHeads({"mid": 8}, {"a": 12}, kind=kind, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    both = AlignHeads({"enc_last": 8, "mid": 8}, {"a": 12}, kind=kind, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, both.state_dict()[name])
        assert not torch.equal(value, both.state_dict()[name.replace("mid", "enc_last")])
    other = AlignHeads({"mid": 8}, {"a": 12}, kind=kind, seed=6)
    assert not torch.equal(one["mid"].proj[0].weight, other["mid"].proj[0].weight)


def test_initial_weights_fill_the_range_of_kaiming_uniform() -> None:
    weight = AlignHead(100, 64, kind="conv3x3").proj[0].weight
    bound = 1 / math.sqrt(100 * 9)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert abs(weight.std().item() - bound / math.sqrt(3)) < 0.01 * bound


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(AdapterError, match="align_head must be one of mlp, linear, conv3x3, got 'mpl'"):
        AlignHead(8, 12, kind="mpl")  # type: ignore[arg-type]


@pytest.mark.bits
@pytest.mark.parametrize("kind", KINDS)
def test_a_time_aware_head_begins_as_the_head_without(kind: HeadKind) -> None:
    generator = torch.Generator().manual_seed(0)
    features, time = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 6, generator=generator)
    plain, timed = (
        AlignHeads({"down_blocks.1": 8}, {"a": 12}, kind=kind, seed=5, time_width=width) for width in (None, 6)
    )
    captured = {"down_blocks.1": features, TIME: time}
    assert plain.captured == ["down_blocks.1"] and timed.captured == ["down_blocks.1", TIME]
    assert torch.equal(plain.tokens("down_blocks.1", captured), timed.tokens("down_blocks.1", captured))
    names = list(timed.state_dict())
    assert names[-2:] == ["down_blocks_1.film.weight", "down_blocks_1.film.bias"]
    assert names[:-2] == list(plain.state_dict())
    again = AlignHeads({"down_blocks.1": 8}, {"a": 12}, kind=kind, seed=6, time_width=6)
    again.load_state_dict(timed.state_dict())
    assert torch.equal(again.tokens("down_blocks.1", captured), timed.tokens("down_blocks.1", captured))


def test_the_timestep_scales_and_shifts_the_projection() -> None:
    """FiLM: (1 + gamma(t)) * x + beta(t) of each channel, gamma and beta linear in SiLU of the embedding."""
    generator = torch.Generator().manual_seed(1)
    head = AlignHead(3, 2, grid=2, kind="linear", time_width=4)
    assert head.film is not None
    with torch.no_grad():
        for weight in head.film.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    features, time = torch.randn(2, 3, 2, 2, generator=generator), torch.randn(2, 4, generator=generator)
    tokens = head(features, time=time).detach().numpy()
    projected = head.proj(features).detach().double().numpy()
    weight, bias = (part.detach().double().numpy() for part in (head.film.weight, head.film.bias))
    for picture in range(2):
        hidden = np.array([value / (1 + math.exp(-value)) for value in time[picture].tolist()])
        both = weight @ hidden + bias
        for place in range(4):
            token = projected[picture, :, place // 2, place % 2] * (1 + both[:2]) + both[2:]
            np.testing.assert_allclose(tokens[picture, place], token / np.linalg.norm(token), atol=2e-6)
