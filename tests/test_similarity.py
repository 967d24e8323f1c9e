"""Measures between representations: each against slow arithmetic of its own, self against chance, and what they ignore."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.evaluation.retrieval import cknna, mutual_knn, nearest, neighbour_recall, retrieval_recall
from library.evaluation.similarity import (
    centred_token_cosine,
    clamp_outliers,
    linear_cka,
    pool_tokens,
    sample_similarity_mae,
    token_cosine,
    unbiased_hsic,
)
from library.evaluation.standard_errors import Spread, paired_difference, transposed


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def related(n: int = 40, width: int = 12, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Features of two widths that share a part."""
    a = drawn(n, width)
    return a, a @ drawn(width, 7, seed=1) + noise * drawn(n, 7, seed=2)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(drawn(width, width, seed=5)).Q


def cosine(a: Tensor, b: Tensor) -> float:
    return float(np.dot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def slow_neighbours(features: Tensor, k: int) -> list[set[int]]:
    rows = range(len(features))
    return [set(sorted((j for j in rows if j != i), key=lambda j: -cosine(features[i], features[j]))[:k]) for i in rows]


def slow_hsic(k: np.ndarray, j: np.ndarray) -> float:
    """Song et al. 2012, as U-statistics of index tuples: sums over unlike i, q, r, s."""
    n = len(k)
    pairs = sum(k[i, q] * j[i, q] for i in range(n) for q in range(n) if i != q) / (n * (n - 1))
    triples = quadruples = 0.0
    for i in range(n):
        for q in range(n):
            for r in range(n):
                if len({i, q, r}) == 3:
                    triples += k[i, q] * j[i, r]
                    quadruples += sum(k[i, q] * j[r, s] for s in range(n) if s not in (i, q, r))
    triples /= n * (n - 1) * (n - 2)
    quadruples /= n * (n - 1) * (n - 2) * (n - 3)
    return pairs + quadruples - 2 * triples


# ------------------------------------------------------------------------------------------------ tokens


def test_token_cosine_is_the_mean_over_tokens() -> None:
    a, b = drawn(3, 4, 5), drawn(3, 4, 5, seed=1)
    slow = np.mean([cosine(a[i, j], b[i, j]) for i in range(3) for j in range(4)])
    assert token_cosine(a, b) == pytest.approx(slow, abs=1e-6)


@pytest.mark.parametrize("mean", ["set", "position", "image"])
def test_centred_token_cosine_takes_the_named_mean_away(mean: str) -> None:
    a, b = drawn(3, 4, 5) + 1, drawn(3, 4, 5, seed=1) + 2
    units = [(x / x.norm(dim=-1, keepdim=True)).numpy() for x in (a, b)]
    slow = []
    for i in range(3):
        for j in range(4):
            means = [{"set": u.mean((0, 1)), "position": u[:, j].mean(0), "image": u[i].mean(0)}[mean] for u in units]
            slow.append(cosine(*(torch.from_numpy(u[i, j] - m) for u, m in zip(units, means, strict=True))))
    assert centred_token_cosine(a, b, mean) == pytest.approx(np.mean(slow), abs=1e-5)  # type: ignore[arg-type]


def test_tokens_are_1_with_themselves_and_0_with_unrelated_ones() -> None:
    a, b = drawn(50, 16, 32), drawn(50, 16, 32, seed=1)
    for measure in (
        token_cosine,
        *(lambda a, b, m=m: centred_token_cosine(a, b, m) for m in ("set", "position", "image")),
    ):  # type: ignore[misc]
        assert measure(a, 3 * a) == pytest.approx(1, abs=1e-5)
        assert abs(measure(a, b)) < 0.03


def test_a_constant_predictor_is_praised_by_the_plain_cosine_only() -> None:
    target = drawn(50, 16, 32) + 1  # tokens that share a mean, as DINOv2's do
    constant = target.mean(dim=(0, 1)).expand(50, 16, 32)
    by_position = target.mean(dim=0).expand(50, 16, 32)
    assert token_cosine(constant, target) > 0.6
    assert centred_token_cosine(constant, target, "set") == 0
    assert centred_token_cosine(constant, target, "image") == 0
    assert token_cosine(by_position, target) > 0.6
    assert centred_token_cosine(by_position, target, "position") == 0


# ------------------------------------------------------------------------------------------------ between pictures


def test_pooling_weighs_every_token_alike() -> None:
    tokens = drawn(2, 3, 4)
    pooled = pool_tokens(tokens * torch.tensor([1.0, 100.0, 0.1])[:, None])
    torch.testing.assert_close(pooled, pool_tokens(tokens))
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(2))


def test_sample_similarity_error_is_the_mean_over_pairs() -> None:
    a, b = related(8)
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    slow = np.mean([abs(cosine(a[i], a[j]) - cosine(b[i], b[j])) for i, j in pairs])
    assert sample_similarity_mae(a, b) == pytest.approx(slow, abs=1e-6)
    a_, b_ = a - a.mean(0), b - b.mean(0)
    assert sample_similarity_mae(a, b, centred=True) == pytest.approx(sample_similarity_mae(a_, b_), abs=1e-6)


def test_sample_similarity_error_of_equal_features_is_0_and_of_unrelated_ones_is_that_of_their_cosines() -> None:
    a = drawn(200, 64)
    assert sample_similarity_mae(a, 2 * a @ rotation(64)) == pytest.approx(0, abs=1e-6)
    # Cosines of unrelated directions have deviation 1/8 here, the mean of |their difference| is 2/sqrt(pi) of that.
    assert sample_similarity_mae(a, drawn(200, 64, seed=1)) == pytest.approx(2 / math.sqrt(math.pi) / 8, rel=0.05)


@pytest.mark.bits
def test_unbiased_hsic_is_the_u_statistic() -> None:
    k, j = (x.double() @ x.double().T for x in related(7))  # in float32 no product is symmetric to 1e-9
    assert unbiased_hsic(k, j).item() == pytest.approx(slow_hsic(k.numpy(), j.numpy()), rel=1e-9)


def test_cka_is_the_normalised_cross_covariance() -> None:
    a, b = related(30)
    a_, b_ = a - a.mean(0), b - b.mean(0)
    slow = (a_.T @ b_).norm() ** 2 / ((a_.T @ a_).norm() * (b_.T @ b_).norm())
    assert linear_cka(a, b, debiased=False) == pytest.approx(slow.item(), abs=1e-5)
    kernels = [(x @ x.T).double().numpy() for x in (a[:7], b[:7])]
    values = [slow_hsic(*pair) for pair in (kernels, kernels[:1] * 2, kernels[1:] * 2)]
    assert linear_cka(a[:7], b[:7]) == pytest.approx(values[0] / math.sqrt(values[1] * values[2]), rel=1e-5)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_rotation_scale_and_shift(debiased: bool) -> None:
    a, b = related(60)
    moved = 30 * (b @ rotation(7)) + drawn(7, seed=9)
    assert linear_cka(a, a, debiased=debiased) == pytest.approx(1)
    assert linear_cka(a, moved, debiased=debiased) == pytest.approx(linear_cka(a, b, debiased=debiased), abs=1e-4)


def test_only_debiased_cka_of_unrelated_wide_features_is_near_0() -> None:
    pairs = [(drawn(50, 500, seed=2 * s), drawn(50, 500, seed=2 * s + 1)) for s in range(8)]
    assert abs(np.mean([linear_cka(a, b) for a, b in pairs])) < 0.02
    assert np.mean([linear_cka(a, b, debiased=False) for a, b in pairs]) > 0.85


def test_features_that_are_one_vector_have_no_cka() -> None:
    assert math.isnan(linear_cka(drawn(1, 9).expand(20, 9), drawn(20, 5)))
    assert math.isnan(linear_cka(drawn(20, 5), drawn(1, 9).expand(20, 9) * 1e4, debiased=False))


# ------------------------------------------------------------------------------------------------ neighbours


def test_neighbours_are_the_nearest_by_angle_without_oneself() -> None:
    a = drawn(20, 4) * torch.linspace(0.1, 9, 20)[:, None]
    assert [set(row) for row in nearest(a, 3).tolist()] == slow_neighbours(a, 3)


def test_mutual_neighbours_are_counted() -> None:
    a, b = related(25)
    shared = [len(x & y) / 5 for x, y in zip(slow_neighbours(a, 5), slow_neighbours(b, 5), strict=True)]
    assert mutual_knn(a, b, 5) == pytest.approx(np.mean(shared))


def test_neighbour_recall_looks_for_the_teachers_nearest() -> None:
    a, b = related(25)
    found = [y <= x for x, y in zip(slow_neighbours(a, 5), slow_neighbours(b, 1), strict=True)]
    assert neighbour_recall(a, b, 5) == pytest.approx(np.mean(found))


def test_retrieval_looks_for_the_picture_itself() -> None:
    target = drawn(25, 6)
    predicted = target + 1.5 * drawn(25, 6, seed=3)
    ranks = [sum(cosine(predicted[i], t) > cosine(predicted[i], target[i]) for t in target) for i in range(25)]
    assert 0 < np.mean([rank < 3 for rank in ranks]) < 1
    assert retrieval_recall(predicted, target, 3) == pytest.approx(np.mean([rank < 3 for rank in ranks]))


@pytest.mark.bits
def test_equal_teacher_vectors_are_not_retrieved_by_luck() -> None:
    """Nor are those that differ by their rounding."""
    for rounding in (0.0, 1e-7):
        assert retrieval_recall(drawn(10, 4), drawn(1, 4) * (1 + rounding * drawn(10, 4, seed=1)), 3) == 0


def test_cknna_is_hsic_on_mutual_neighbours() -> None:
    a, b = related(9)
    kernels, near = [], []
    for side in (a, b):
        kernels.append(np.array([[cosine(x, y) for y in side] for x in side]))
        near.append(np.array([[j in one for j in range(9)] for one in slow_neighbours(side, 4)]))

    def hsic(k: np.ndarray, j: np.ndarray) -> float:
        """platonic-rep's formula, written out."""
        n, k, j = 9, k * (1 - np.eye(9)), j * (1 - np.eye(9))
        total = np.trace(k @ j) + k.sum() * j.sum() / ((n - 1) * (n - 2)) - 2 * (k @ j).sum() / (n - 2)
        return total / (n * (n - 3))

    across = hsic(near[0] * near[1] * kernels[0], near[0] * near[1] * kernels[1])
    own = [hsic(mask * kernel, mask * kernel) for mask, kernel in zip(near, kernels, strict=True)]
    assert cknna(a, b, 4) == pytest.approx(across / math.sqrt(own[0] * own[1]), rel=1e-5)


def test_neighbour_measures_are_1_with_oneself_whatever_the_rotation_and_scale() -> None:
    a = drawn(60, 8)
    moved = 7 * a @ rotation(8)
    assert cknna(a, moved, 10) == pytest.approx(1, abs=1e-5)
    assert mutual_knn(a, moved, 10) == neighbour_recall(a, moved, 1) == retrieval_recall(a, 7 * a, 1) == 1


def test_neighbour_measures_of_unrelated_features_are_at_their_stated_chance() -> None:
    n, k = 400, 10
    a, b = drawn(n, 16), drawn(n, 16, seed=1)
    assert mutual_knn(a, b, k) == pytest.approx(k / (n - 1), abs=0.01)
    assert cknna(a, b, k) == pytest.approx(k / n, abs=0.02)
    assert neighbour_recall(a, b, k) == pytest.approx(k / (n - 1), abs=0.02)
    assert retrieval_recall(a, b, k) == pytest.approx(k / n, abs=0.02)


def test_clamping_takes_the_word_from_one_huge_channel() -> None:
    a = drawn(60, 64)
    b = torch.cat([a, 1000 * drawn(60, 1, seed=8)], dim=1)
    assert mutual_knn(a, b, 5) < 0.3
    assert mutual_knn(clamp_outliers(a), clamp_outliers(b), 5) > 0.6


# ------------------------------------------------------------------------------------------------ bad input, spread


def test_too_few_pictures_are_named() -> None:
    one, three = drawn(1, 4), drawn(3, 4)
    with pytest.raises(UserError, match="at least 2 pictures are needed, got 1"):
        sample_similarity_mae(one, one)
    with pytest.raises(UserError, match="CKA: at least 4 pictures are needed, got 3"):
        linear_cka(three, three)
    with pytest.raises(UserError, match="3 neighbours of each of 3 pictures are impossible"):
        mutual_knn(three, three, 3)
    with pytest.raises(UserError, match="CKNNA needs 2 neighbours or more, got 1"):
        cknna(drawn(9, 4), drawn(9, 4), 1)
    with pytest.raises(UserError, match="got 3 and 1"):
        linear_cka(three, one)


def test_a_difference_counts_beyond_the_spread_of_its_pairs_only() -> None:
    narrow, wide = Spread((0.50, 0.51, 0.49)), Spread((0.3, 0.9, 0.6))
    assert narrow.mean == pytest.approx(0.5) and narrow.deviation == pytest.approx(0.01)
    assert not paired_difference(narrow, wide).is_significant and not paired_difference(narrow, narrow).is_significant
    moved = Spread(tuple(value + 0.05 + wobble for value, wobble in zip(wide.values, (0.001, 0, -0.001), strict=True)))
    found = paired_difference(moved, wide)
    assert found.value == pytest.approx(0.05) and found.error == pytest.approx(0.001 / 3**0.5) and found.freedom == 2
    assert found.is_significant, "what a seed does to both cancels"
    assert paired_difference(narrow, Spread((0.7,))).is_significant
    assert not paired_difference(Spread((0.1,)), Spread((0.9,))).is_significant


def test_spreads_are_plain_numbers_in_json() -> None:
    made = transposed([{"x": 1.0, "y": math.nan}, {"x": 3.0, "y": 2.0}])
    assert made["x"].to_json() == {"mean": 2.0, "deviation": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert made["y"].to_json() == {"mean": None, "deviation": None, "values": [None, 2.0]}
    assert (str(made["x"]), str(made["y"]), str(Spread((0.25,)))) == ("2.000 ±1.414", "-", "0.250")
