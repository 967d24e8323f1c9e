"""Alignment losses against slow references: loops over float64 numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion import alignment_losses as losses


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def unit(vector: list[float]) -> list[float]:
    length = max(math.sqrt(sum(x * x for x in vector)), 1e-6)
    return [x / length for x in vector]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def pooled(sample: list[list[float]]) -> list[float]:
    rows = [unit(row) for row in sample]
    return unit([sum(row[d] for row in rows) / len(rows) for d in range(len(rows[0]))])


def hinge(difference: float, margin: float) -> float:
    return max(abs(difference) - margin, 0.0) ** 2


def test_token_loss_is_the_mean_of_one_minus_cosine() -> None:
    predicted, target = tokens(3, 5, 7, seed=1), tokens(3, 5, 7, seed=2)
    expected = [
        1 - dot(unit(p), unit(t))
        for ps, ts in zip(predicted.tolist(), target.tolist(), strict=True)
        for p, t in zip(ps, ts, strict=True)
    ]
    assert losses.token_loss(predicted, target).item() == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_token_loss_is_0_for_the_same_and_2_for_the_opposite_direction() -> None:
    target = tokens(2, 4, 8)
    assert losses.token_loss(target * 3, target).item() == pytest.approx(0, abs=1e-6)
    assert losses.token_loss(-target, target).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_sample_manifold_loss_is_the_mean_over_pairs_of_pooled_images(margin: float) -> None:
    predicted, target = tokens(4, 3, 6, seed=3), tokens(4, 3, 6, seed=4)
    p, t = [pooled(s) for s in predicted.tolist()], [pooled(s) for s in target.tolist()]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    expected = sum(hinge(dot(p[i], p[j]) - dot(t[i], t[j]), margin) for i, j in pairs) / len(pairs)
    assert losses.sample_manifold_loss(predicted, target, margin).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_token_manifold_loss_is_the_mean_over_all_token_pairs_of_each_image(margin: float) -> None:
    predicted, target = tokens(2, 4, 6, seed=5), tokens(2, 4, 6, seed=6)
    expected = []
    for ps, ts in zip(predicted.tolist(), target.tolist(), strict=True):
        p, t = [unit(row) for row in ps], [unit(row) for row in ts]
        expected += [hinge(dot(p[i], p[j]) - dot(t[i], t[j]), margin) for i in range(4) for j in range(4)]
    value = losses.token_manifold_loss(predicted, target, margin).item()
    assert value == pytest.approx(sum(expected) / len(expected), abs=1e-7)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_an_l1_loss_takes_amounts_and_not_squares(margin: float) -> None:
    """With margin 0.1 on the tokens of each image, VideoREPA's Token Relation Distillation."""

    def amount(difference: float) -> float:
        return max(abs(difference) - margin, 0.0)

    predicted, target = tokens(4, 3, 6, seed=5), tokens(4, 3, 6, seed=6)
    flat_p, flat_t = ([[unit(row) for row in one] for one in side.tolist()] for side in (predicted, target))
    every = [(i, j) for i in range(3) for j in range(3)]
    slow = [amount(dot(p[i], p[j]) - dot(t[i], t[j])) for p, t in zip(flat_p, flat_t, strict=True) for i, j in every]
    value = losses.token_manifold_loss(predicted, target, margin, cost="l1").item()
    assert value == pytest.approx(sum(slow) / len(slow), abs=1e-6)
    p, t = [pooled(s) for s in predicted.tolist()], [pooled(s) for s in target.tolist()]
    slow = [amount(dot(p[i], p[j]) - dot(t[i], t[j])) for i in range(4) for j in range(i + 1, 4)]
    ones = losses.Weights(torch.ones(4), torch.ones(4))
    for weights in (None, ones):
        value = losses.sample_manifold_loss(predicted, target, margin, weights=weights, cost="l1").item()
        assert value == pytest.approx(sum(slow) / len(slow), abs=1e-6)


def test_spatial_normalisation_is_iREPAs_over_the_tokens_of_each_picture() -> None:
    y = tokens(2, 5, 3, seed=9) * 4 + 2
    found = losses.spatially_normalised(y, 0.6).tolist()
    for picture, normalised in zip(y.tolist(), found, strict=True):
        for channel in range(3):
            column = [row[channel] for row in picture]
            mean = sum(column) / 5
            spread = math.sqrt(sum((value - mean) ** 2 for value in column) / 4)
            expected = [(value - 0.6 * mean) / (spread + 1e-6) for value in column]
            assert [row[channel] for row in normalised] == pytest.approx(expected, rel=1e-4)
    assert losses.spatially_normalised(y, 0.0) is y
    assert losses.spatially_normalised(y[:, :1], 0.6).isfinite().all()


def test_random_manifold_loss_compares_the_chosen_tokens_of_the_whole_batch() -> None:
    predicted, target = tokens(2, 3, 5, seed=7), tokens(2, 3, 5, seed=8)
    chosen = [0, 4, 5]
    flat_p = [unit(row) for sample in predicted.tolist() for row in sample]
    flat_t = [unit(row) for sample in target.tolist() for row in sample]
    expected = [(dot(flat_p[i], flat_p[j]) - dot(flat_t[i], flat_t[j])) ** 2 for i in chosen for j in chosen]
    value = losses.random_manifold_loss(predicted, target, torch.tensor(chosen)).item()
    assert value == pytest.approx(sum(expected) / len(expected), abs=1e-7)


WEIGHTED = losses.Weights(
    pictures=torch.tensor([1.0, 0.5, 0.0, 0.25]),
    real=torch.tensor([1.0, 1.0, 0.0, 1.0]),
    tokens=torch.rand(4, 3, generator=torch.Generator().manual_seed(0)),
)
"""Of four pictures of three tokens, the third of which only fills the shape."""


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_weighted_losses_are_sums_over_what_counts_by_the_number_of_what_is_real(margin: float) -> None:
    predicted, target = tokens(4, 3, 6, seed=3), tokens(4, 3, 6, seed=4)
    pictures, real = [1.0, 0.5, 0.0, 0.25], 3
    of_tokens = WEIGHTED.of_tokens(3).tolist()
    p, t = ([[unit(row) for row in sample] for sample in values.tolist()] for values in (predicted, target))

    def mean(values: list[float]) -> float:
        return sum(w * value for w, value in zip(pictures, values, strict=True)) / real

    token = [sum(of_tokens[b][n] * (1 - dot(p[b][n], t[b][n])) for n in range(3)) / 3 for b in range(4)]
    assert losses.token_loss(predicted, target, WEIGHTED).item() == pytest.approx(mean(token), abs=1e-6)

    def difference(one: tuple[int, int], other: tuple[int, int]) -> float:
        (a, i), (b, j) = one, other
        return hinge(dot(p[a][i], p[b][j]) - dot(t[a][i], t[b][j]), margin)

    pairs = [(i, j) for i in range(3) for j in range(3)]
    within = [
        sum(of_tokens[b][i] * of_tokens[b][j] * difference((b, i), (b, j)) for i, j in pairs) / 9 for b in range(4)
    ]
    found = losses.token_manifold_loss(predicted, target, margin, WEIGHTED).item()
    assert found == pytest.approx(mean(within), abs=1e-7)

    def pool(sample: list[list[float]], weights: list[float]) -> list[float]:
        return unit([sum(w * row[d] for w, row in zip(weights, sample, strict=True)) for d in range(6)])

    pp, pt = ([pool(one, weights) for one, weights in zip(values, of_tokens, strict=True)] for values in (p, t))
    between = [
        pictures[a] * pictures[b] * hinge(dot(pp[a], pp[b]) - dot(pt[a], pt[b]), margin)
        for a in range(4)
        for b in range(a + 1, 4)
    ]
    found = losses.sample_manifold_loss(predicted, target, margin, weights=WEIGHTED).item()
    assert found == pytest.approx(sum(between) / 3, abs=1e-7), "three pairs are real"

    chosen = [(0, 1), (1, 2), (2, 0), (3, 0)]
    weights = [pictures[b] * of_tokens[b][n] for b, n in chosen]
    among = [
        weights[i] * weights[j] * difference(chosen[i], chosen[j])
        for i in range(len(chosen))
        for j in range(len(chosen))
    ]
    places = torch.tensor([3 * b + n for b, n in chosen])
    found = losses.random_manifold_loss(predicted, target, places, margin, WEIGHTED).item()
    assert found == pytest.approx(sum(among) / 9, abs=1e-7), "three of the chosen tokens are real"


def test_weights_of_1_change_nothing_and_a_batch_of_fillers_costs_nothing() -> None:
    predicted, target = tokens(3, 5, 6, seed=3).requires_grad_(), tokens(3, 5, 6, seed=4)
    places = torch.tensor([0, 4, 9, 14])

    def every(weights: losses.Weights | None) -> list[torch.Tensor]:
        return [
            losses.token_loss(predicted, target, weights),
            losses.sample_manifold_loss(predicted, target, weights=weights),
            losses.token_manifold_loss(predicted, target, weights=weights),
            losses.random_manifold_loss(predicted, target, places, weights=weights),
        ]

    torch.testing.assert_close(every(losses.Weights(torch.ones(3), torch.ones(3))), every(None))
    nothing = torch.stack(every(losses.Weights(torch.zeros(3), torch.zeros(3), torch.zeros(3, 5))))
    nothing.sum().backward()
    assert not nothing.any() and predicted.grad is not None and not predicted.grad.any()


def test_two_opposite_pairs_give_the_similarity_difference_by_hand() -> None:
    # Pooled images (1, 0) and (0, 1): cosine 0. Teacher (1, 0) and (1, 0): cosine 1. One pair: (0 - 1)^2.
    predicted = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    target = torch.tensor([[[2.0, 0.0]], [[3.0, 0.0]]])
    assert losses.sample_manifold_loss(predicted, target).item() == pytest.approx(1.0)
    # All four entries of the 2 x 2 Gram matrix of one image's tokens: two diagonal zeros, two ones.
    assert losses.token_manifold_loss(predicted.transpose(0, 1), target.transpose(0, 1)).item() == pytest.approx(0.5)


def test_manifold_losses_are_0_when_similarities_agree_although_tokens_do_not() -> None:
    target = tokens(3, 4, 6)
    rotation = torch.linalg.qr(tokens(6, 6, seed=9))[0]
    turned = target @ rotation
    for loss in (losses.sample_manifold_loss, losses.token_manifold_loss):
        assert loss(turned, target).item() == pytest.approx(0, abs=1e-10)
    assert losses.token_loss(turned, target).item() > 0.3


def test_one_sample_has_no_pair_and_a_sample_loss_of_0_with_a_gradient() -> None:
    predicted = tokens(1, 4, 6).requires_grad_()
    loss = losses.sample_manifold_loss(predicted, tokens(1, 4, 6, seed=1))
    loss.backward()
    assert loss.item() == 0 and predicted.grad is not None


def test_losses_are_float32_whatever_comes_in() -> None:
    predicted, target = tokens(2, 4, 8).bfloat16(), tokens(2, 4, 8, seed=1).half()
    for loss in (losses.token_loss, losses.sample_manifold_loss, losses.token_manifold_loss):
        assert loss(predicted, target).dtype == torch.float32


def test_zero_tokens_give_finite_losses_and_gradients() -> None:
    predicted = torch.zeros(2, 3, 4, requires_grad=True)
    loss = losses.token_loss(predicted, tokens(2, 3, 4)) + losses.sample_manifold_loss(predicted, tokens(2, 3, 4))
    loss.backward()
    assert loss.isfinite() and predicted.grad is not None and predicted.grad.isfinite().all()


@given(value=st.floats(1e-6, 1e3), cap=st.floats(1e-3, 10))
def test_clipping_caps_the_value_and_scales_the_gradient_alike(value: float, cap: float) -> None:
    x = torch.tensor(value, requires_grad=True)
    clipped = losses.clip_loss(x * 1.0, cap)
    clipped.backward()
    factor = min(1.0, cap / value)
    assert clipped.item() == pytest.approx(value * factor, rel=1e-5)
    assert x.grad is not None and x.grad.item() == pytest.approx(factor, rel=1e-5)


def test_the_grid_ceiling_is_1_for_a_flat_image_and_falls_with_a_coarser_tap() -> None:
    flat = tokens(2, 1, 8).expand(2, 64, 8)
    assert losses.grid_ceiling(flat, (8, 8), (4, 4)).item() == pytest.approx(1, abs=1e-5)
    varied = tokens(2, 64, 8)
    coarse, fine, same = (losses.grid_ceiling(varied, (8, 8), tap).item() for tap in ((2, 2), (4, 4), (8, 8)))
    assert coarse < fine < same == pytest.approx(1, abs=1e-5)
    assert losses.grid_ceiling(varied, (4, 16), (4, 16)).item() == pytest.approx(1, abs=1e-5)


def test_the_constant_baseline_is_the_best_of_all_constants() -> None:
    """Over pictures on two grids, added one after another."""
    square, wide = tokens(4, 6, 5), tokens(3, 8, 5, seed=1)
    constants = losses.TokenConstants()
    for part in (square[:1], square[1:]):
        constants.add(part, (2, 3))
    constants.add(wide, (2, 4))
    constant, positional = constants.losses()
    every = torch.cat([square.flatten(0, 1), wide.flatten(0, 1)])[None]
    best = losses.normalize(losses.normalize(every).mean(dim=(0, 1))).expand_as(every)
    assert losses.token_loss(best, every).item() == pytest.approx(constant, abs=1e-6)
    for seed in range(20):
        assert losses.token_loss(tokens(5, seed=seed).expand_as(every), every) >= constant - 1e-6
    by_position = [losses.normalize(losses.normalize(part).mean(dim=0)).expand_as(part) for part in (square, wide)]
    slow = sum(
        losses.token_loss(p, t) * t.shape[0] * t.shape[1] for p, t in zip(by_position, (square, wide), strict=True)
    )
    assert (slow / every.shape[1]).item() == pytest.approx(positional, abs=1e-6) and positional <= constant
