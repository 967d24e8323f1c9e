"""Probes and fitted baselines: each finds what is there, nothing where nothing is, and never looks at what it is judged on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from library.diffusion.alignment_losses import grid_ceiling, normalize
from library.errors import UserError
from library.evaluation import probes
from library.evaluation.baselines import (
    RidgeHead,
    best_on_grid,
    mean_token,
    pooled_to_grid,
    position_mean,
    random_trunk,
)
from library.evaluation.probes import L2_GRID, chance_accuracy, knn_accuracy, linear_probe, split_by_hash
from library.evaluation.similarity import token_cosine
from networks.align_head import AlignHead
from tests.tools.unets import small_unet

IDS = [f"p{i}" for i in range(120)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classified(count: int, seed: int, distance: float = 3.0, width: int = 10) -> tuple[Tensor, Tensor]:
    """Features around one of four centres, channels of unlike scale, and class ids that are no range."""
    of = torch.arange(count) % 4
    centres = distance * F.normalize(drawn(4, width, seed=99), dim=1)
    features = (centres[of] + drawn(count, width, seed=seed)) * torch.logspace(-2, 2, width)
    return features, torch.tensor([3, 7, 8, 20])[of]


# ------------------------------------------------------------------------------------------------ splits


@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=40, unique=True), st.randoms())
def test_a_split_belongs_to_the_ids_and_not_to_their_order(ids: list[str], random: object) -> None:
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    chosen = {one for one, apart in zip(ids, split_by_hash(ids, 0.3), strict=True) if apart}
    again = {one for one, apart in zip(shuffled, split_by_hash(shuffled, 0.3), strict=True) if apart}
    assert chosen == again
    assert len(chosen) == min(max(round(0.3 * len(ids)), 1), len(ids) - 1)


def test_splits_for_unlike_purposes_differ() -> None:
    assert not torch.equal(split_by_hash(IDS, 0.5, "a"), split_by_hash(IDS, 0.5, "b"))


# ------------------------------------------------------------------------------------------------ classifiers


def test_the_linear_probe_reads_classes_and_shuffled_ones_at_chance() -> None:
    (fit, labels), (test, truth) = classified(120, 0), classified(200, 1)
    assert linear_probe(fit, labels, test, truth, IDS).accuracy > 0.8
    nothing = linear_probe(drawn(120, 10), labels, drawn(200, 10, seed=1), truth, IDS)
    assert abs(nothing.accuracy - 0.25) < 0.1
    assert chance_accuracy(labels, truth) == 0.25


def test_the_logistic_fit_is_the_minimum() -> None:
    """Gradient descent from elsewhere comes to the same weights."""
    x, y = drawn(30, 4), torch.arange(30) % 3
    weights, bias = probes._fit_logistic(x, y, 3, 0.1)
    slow_w, slow_b = drawn(4, 3, seed=4).requires_grad_(), torch.zeros(3, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(x @ slow_w + slow_b, y) + 0.05 * slow_w.square().sum()
        gradients = torch.autograd.grad(loss, (slow_w, slow_b))
        with torch.no_grad():
            slow_w -= 0.2 * gradients[0]
            slow_b -= 0.2 * gradients[1]
    torch.testing.assert_close(weights, slow_w.detach(), atol=1e-3, rtol=0)
    torch.testing.assert_close(bias - bias.mean(), (slow_b - slow_b.mean()).detach(), atol=1e-3, rtol=0)


def test_the_penalty_is_chosen_without_the_pictures_it_is_judged_on() -> None:
    fit, labels = classified(120, 0, distance=1.0, width=60)
    test, truth = classified(200, 1, distance=1.0, width=60)
    probed = linear_probe(fit, labels, test, truth, IDS)
    assert probed.l2 in L2_GRID and probed.l2 > min(L2_GRID)  # with 60 channels for 96 pictures some is needed
    other = linear_probe(fit, labels, -test, truth.flip(0), IDS)
    assert (other.l2, other.fit_accuracy) == (probed.l2, probed.fit_accuracy)


def test_the_probe_does_not_depend_on_the_scale_of_channels() -> None:
    (fit, labels), (test, truth) = classified(120, 0), classified(200, 1)
    scale = torch.logspace(3, -3, 10)
    first, second = (linear_probe(fit * s, labels, test * s, truth, IDS) for s in (1.0, scale))
    assert first.accuracy == pytest.approx(second.accuracy, abs=0.011)


def test_a_class_that_was_not_fitted_is_missed() -> None:
    (fit, labels), (test, truth) = classified(120, 0), classified(200, 1)
    unknown = torch.where(truth == 7, 1234, truth)
    known = labels != 7
    ids = [one for one, kept in zip(IDS, known, strict=True) if kept]
    assert linear_probe(fit[known], labels[known], test, unknown, ids).accuracy <= 0.75


def test_neighbours_vote_as_written_out() -> None:
    (fit, labels), (test, truth) = classified(40, 0), classified(30, 1)
    right = 0
    for feature, label in zip(normalize(test).numpy(), truth.tolist(), strict=True):
        cosines = normalize(fit).numpy() @ feature
        votes: dict[int, float] = {}
        for i in np.argsort(-cosines)[:7]:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + float(np.exp(cosines[i] / 0.07))
        right += max(votes, key=votes.__getitem__) == label
    assert right / 30 > 0.3
    assert knn_accuracy(fit, labels, test, truth, 7) == pytest.approx(right / 30)
    assert knn_accuracy(fit, labels, fit, labels, 1) == 1  # each picture is its own nearest


def test_probes_say_what_they_lack() -> None:
    fit = drawn(10, 3)
    with pytest.raises(UserError, match="at least two classes"):
        linear_probe(fit, torch.ones(10), fit, torch.ones(10), IDS[:10])
    with pytest.raises(UserError, match="11 neighbours of 10 pictures are impossible"):
        knn_accuracy(fit, torch.ones(10), fit, torch.ones(10), 11)
    with pytest.raises(UserError, match="1 pictures cannot be split"):
        split_by_hash(["a"], 0.5)


# ------------------------------------------------------------------------------------------------ baselines


def test_the_mean_token_is_the_best_constant() -> None:
    target = drawn(30, 9, 6) + 0.5
    best = token_cosine(mean_token(target, 30), target)
    by_position = token_cosine(position_mean(target, 30), target)
    assert by_position >= best
    for seed in range(20):
        other = normalize(mean_token(target, 1)[0, 0] + 0.2 * drawn(6, seed=seed)).expand(30, 9, 6)
        assert token_cosine(other, target) < best


def test_a_fitted_head_finds_the_linear_head_that_made_the_tokens() -> None:
    """Held out: the tokens of a linear AlignHead on other maps."""
    head = AlignHead(12, 6, grid=4, kind="linear")
    maps, others = drawn(100, 12, 2, 2) * 50 + 7, drawn(40, 12, 2, 2, seed=1) * 50 + 7
    with torch.no_grad():
        target, truth = head(maps), head(others)
    fitted = RidgeHead.fit(maps, target, IDS[:100])
    assert token_cosine(fitted(others), truth) > 0.97
    assert fitted(others).shape == truth.shape


def test_a_fitted_head_solves_the_ridge_problem() -> None:
    maps, target = drawn(40, 3, 4, 4), normalize(drawn(40, 16, 5, seed=1))
    head = RidgeHead.fit(maps, target, IDS[:40])
    x = maps.flatten(2).transpose(1, 2).reshape(-1, 3).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    y = target.reshape(-1, 5).double()
    # Least squares with the penalty as rows of its own.
    rows = torch.cat([x / len(x) ** 0.5, head.l2**0.5 * torch.eye(3, dtype=torch.float64)])
    values = torch.cat([(y - y.mean(0)) / len(x) ** 0.5, torch.zeros(3, 5, dtype=torch.float64)])
    torch.testing.assert_close(head.weights.double(), torch.linalg.lstsq(rows, values).solution, atol=1e-5, rtol=1e-4)


def test_a_fitted_head_of_unrelated_maps_says_no_more_than_the_mean() -> None:
    target = drawn(120, 16, 8) + 0.5
    head = RidgeHead.fit(drawn(100, 5, 4, 4), target[:100], IDS[:100])
    predicted = head(drawn(20, 5, 4, 4, seed=1))
    assert token_cosine(predicted, target[100:]) == pytest.approx(
        token_cosine(mean_token(target[:100], 20), target[100:]), abs=0.02
    )


def test_a_channel_that_never_changes_does_no_harm() -> None:
    maps = torch.cat([drawn(40, 3, 4, 4), torch.full((40, 1, 4, 4), 1e4)], dim=1)
    target = drawn(40, 16, 5, seed=1)
    with_it, without = (RidgeHead.fit(m, target, IDS[:40])(m) for m in (maps, maps[:, :3]))
    torch.testing.assert_close(with_it, without, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_nothing_on_the_grid_is_above_the_best(side: int) -> None:
    target = drawn(6, 16, 5)
    best = token_cosine(best_on_grid(target, side), target)
    pooled = token_cosine(pooled_to_grid(target, side), target)
    assert pooled == pytest.approx(grid_ceiling(target, (4, 4), (side, side)).item(), abs=1e-5)
    assert best >= pooled - 1e-6
    for seed in range(5):  # no step from it leads higher
        codes = drawn(6, 5, side, side, seed=seed)
        up = F.interpolate(codes, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
        assert token_cosine(best_on_grid(target, side) + 0.05 * up, target) < best + 1e-4
    if side == 4:
        assert best == pytest.approx(1, abs=1e-5)


def test_tokens_that_lie_on_the_grid_are_reached() -> None:
    up = F.interpolate(drawn(6, 5, 2, 2), size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    assert token_cosine(best_on_grid(up, 2), up) == pytest.approx(1, abs=1e-4)


@pytest.mark.bits
def test_a_random_trunk_is_its_seeds_alone() -> None:
    unet = small_unet()
    before = torch.get_rng_state()
    first, again, other = (random_trunk(unet, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    names = [name for name, value in unet.named_parameters() if value.ndim > 1]
    values = [dict(one.named_parameters()) for one in (first, again, other, unet)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in names)
    assert not any(torch.equal(values[0][name], values[k][name]) for name in names for k in (2, 3))
