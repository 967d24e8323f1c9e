"""Verdicts: the noise of values, when a trial is a winner, picked trials, and what is enqueued to find out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from library.search.messages import Outcome
from library.search.study.verdict import (
    enqueue_baselines,
    enqueue_confirmations,
    enqueue_initial,
    judge,
    most_confirmations,
    sigma_of,
    top,
)
from tests.tools.search import SPACE, ledger, next_trial, trial


def baselines(*values: float) -> list[FrozenTrial]:
    return [
        trial(n, value, baseline=n - 1, params=dict(SPACE.defaults), seed=6 + n) for n, value in enumerate(values, 1)
    ]


NOISY = baselines(-0.10, -0.12, -0.14)  # mean -0.12, sigma 0.02


def test_sigma_is_pooled_over_groups_of_equals() -> None:
    assert sigma_of([[-0.10, -0.12, -0.14]]) == pytest.approx(0.02)
    assert sigma_of([[0.0, 0.2], [5.0, 5.0]]) == pytest.approx(0.1)
    assert sigma_of([[1.0], []]) is None


@pytest.mark.parametrize(("value", "is_winner"), [(-0.159, False), (-0.161, True)])
def test_no_winner_is_announced_within_two_sigma(value: float, is_winner: bool) -> None:
    verdict = judge([*NOISY, trial(4, value)])
    assert verdict.is_winner == is_winner and verdict.best is not None and verdict.best.trial == 4
    assert verdict.words.startswith("The winner is trial 4" if is_winner else "No winner: the best is trial 4")


def test_without_a_second_value_of_the_default_nothing_is_announced() -> None:
    verdict = judge([*baselines(-0.1), trial(2, -9.0)])
    assert not verdict.is_winner and "Its noise is unknown" in verdict.words
    assert judge([]).best is None


def test_a_lucky_default_is_no_winner_over_itself() -> None:
    verdict = judge([*baselines(-0.1, -0.1, -0.5), trial(4, -0.2)])
    assert not verdict.is_winner and "no trial is better than the default" in verdict.words


def test_the_best_are_ranked_by_the_mean_over_their_seeds() -> None:
    lucky, steady = trial(4, -0.50), trial(5, -0.45)
    again = [
        trial(n, value, of_trial=of, seed=seed)
        for n, (of, seed, value) in enumerate([(4, 10, -0.2), (4, 11, -0.22), (5, 10, -0.44), (5, 11, -0.46)], 1)
    ]
    assert judge([*NOISY, lucky, steady]).best.trial == 4  # type: ignore[union-attr]
    best = judge([*NOISY, lucky, steady], again).best
    assert best is not None and best.trial == 5 and best.mean == pytest.approx(-0.45)
    assert best.fresh_mean == pytest.approx(-0.45) and best.spread == pytest.approx(0.01)


def test_trials_within_the_noise_of_the_winner_are_named() -> None:
    verdict = judge([*NOISY, trial(4, -0.30), trial(5, -0.28), trial(6, -0.20)])
    assert verdict.words.endswith("Within the noise of it: trial 5.")


@pytest.mark.parametrize("attrs", [{"imputed": -9.0}, {"failure": "diverged"}, {"imported": "elsewhere"}])
def test_the_best_is_never_predicted_a_penalty_or_imported(attrs: dict[str, Any]) -> None:
    assert [one.number + 1 for one in top([*NOISY, trial(4, -9.0, **attrs), trial(5, -0.5)])][0] == 5


def test_the_same_parameters_are_among_the_best_once() -> None:
    assert len(top([*NOISY, trial(4, 0.0)])) == 2


@pytest.mark.parametrize("picked", [2, 4])
def test_a_picked_trial_is_the_best_whatever_its_value(picked: int) -> None:
    verdict = judge([*NOISY, *(trial(n, -1.0 * n) for n in range(4, 12))], picked=picked)
    assert verdict.is_winner and verdict.best is not None and verdict.best.trial == picked
    assert len({one.trial for one in verdict.candidates}) == len(verdict.candidates) == 6


def test_the_default_competes_with_the_mean_of_all_its_trials() -> None:
    lucky = baselines(-0.10, -0.20, -0.15)
    verdict = judge([*lucky, trial(4, -0.19)])
    assert verdict.default == pytest.approx(-0.15) and verdict.best is not None and verdict.best.trial == 4
    assert verdict.words.startswith("No winner: the best is trial 4, -0.1900, which is 0.0400 better than the default")
    assert [(one.trial, round(one.mean, 3)) for one in verdict.candidates] == [(4, -0.19), (1, -0.15)]
    worse = judge([*lucky, trial(4, -0.14)])
    assert worse.best is not None and worse.best.trial == 1 and worse.best.again == {8: -0.20, 9: -0.15}
    assert "no trial is better than the default configuration (-0.1500)" in worse.words
    assert [one.number + 1 for one in top([*lucky, trial(4, -0.19)])] == [4, 1]


def test_new_seeds_of_the_default_are_more_of_its_values() -> None:
    again = [trial(1, -0.3, of_trial=2, seed=10), trial(2, -0.4, of_trial=4, seed=10)]  # trial 2 stood for it then
    verdict = judge([*NOISY, trial(4, -0.13)], again)
    assert verdict.default == pytest.approx((-0.10 - 0.12 - 0.14 - 0.3) / 4)
    assert verdict.sigma == pytest.approx(sigma_of([[-0.10, -0.12, -0.14, -0.3]]))


def test_all_that_were_trained_again_are_judged() -> None:
    found = [trial(n, -1.0 + 0.01 * n) for n in range(4, 14)]
    again = [trial(n, -2.0 if n == 11 else 0.0, of_trial=n, seed=10) for n in range(4, 12)]
    verdict = judge([*NOISY, *found], again)
    assert verdict.best is not None and verdict.best.trial == 11
    assert sorted(one.trial for one in verdict.candidates) == list(range(4, 12))


@pytest.mark.parametrize(("n_trials", "best", "most"), [(1, 5, 2), (4, 5, 4), (12, 5, 10), (12, 0, 0)])
def test_the_default_is_trained_again_no_more_often_than_others(n_trials: int, best: int, most: int) -> None:
    assert most_confirmations(n_trials, best, 2) == most


def test_the_default_comes_first_three_times_with_three_seeds(tmp_path: Path) -> None:
    mine, other = ledger(tmp_path), ledger(tmp_path)
    for one in (mine, other, mine):
        enqueue_baselines(one)
        enqueue_initial(one, [{**SPACE.defaults, "learning_rate": 1e-3}, dict(SPACE.defaults)])
    asked = [mine.ask() for _ in range(4)]
    assert [one.seed for one in asked if one] == [7, 8, 9, 7]
    assert all(one and one.params == SPACE.defaults for one in asked[:3])
    assert asked[3] and asked[3].params["learning_rate"] == 1e-3 and asked[3].is_protected
    assert len(mine.trials()) == 4
    small = ledger(tmp_path / "small", 2)
    enqueue_baselines(small)
    assert len(small.trials()) == 2


def test_a_baseline_that_was_given_up_is_enqueued_when_the_study_goes_on(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    enqueue_baselines(mine)
    for _ in range(5):  # 1 2 3, and 1 twice again
        running = next_trial(mine)
        failed = running.attrs.get("baseline") == 0
        mine.settle(running, Outcome(running.number, "failed" if failed else "done", value=0.0))
    assert not [one for one in mine.trials() if one.state == TrialState.WAITING]
    for _ in range(2):
        enqueue_baselines(ledger(tmp_path))
    again = next_trial(mine)
    assert again.attrs["baseline"] == 0 and again.seed == 7 and len(mine.trials()) == 6


def test_confirmations_are_enqueued_once_with_seeds_of_their_own(tmp_path: Path) -> None:
    mine = ledger(tmp_path, 100, creates=False)
    for _ in range(2):
        assert enqueue_confirmations(mine, [trial(4, -1.0), trial(5, -0.9)]) == 4
    asked = [mine.ask() for _ in range(5)]
    assert [(one.attrs["of_trial"], one.seed) for one in asked if one] == [(4, 10), (4, 11), (5, 10), (5, 11)]
    assert asked[4] is None and not mine.is_done()
