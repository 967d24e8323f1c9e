"""What the benchmark of optimize.py reads from trials: steps truly taken, the best value after them, regret."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from library.options.toml_file import PROJECT_ROOT


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(PROJECT_ROOT / "benchmarks"), *sys.path])
    import study_curves

    return study_curves


def trial(value: float, slots: int = 10, **attrs: Any) -> FrozenTrial:
    return create_trial(
        value=value,
        user_attrs={"steps": 40, **attrs},
        intermediate_values=dict.fromkeys(range(1, slots + 1), value),
    )


PRUNED = trial(-9.0, 2, pruned_at=2, imputed=-9.0)
DIVERGED = trial(-9.0, 3, failure="diverged")
FAILED = create_trial(state=TrialState.FAIL, user_attrs={"steps": 40})


def test_only_steps_that_were_taken_count(curves: Any) -> None:
    assert [curves.spent(one) for one in (trial(-0.1), PRUNED, DIVERGED)] == [40, 8, 16]
    assert curves.spent(trial(-0.1, 10, failure="diverged")) == 40, "diverged in its last slot"


def test_neither_a_prediction_nor_a_penalty_is_ever_the_best(curves: Any) -> None:
    points = curves.curve([PRUNED, trial(-0.1), FAILED, DIVERGED, trial(-0.3), trial(-0.2)])
    assert [(one.steps, one.best) for one in points] == [(8, None), (48, -0.1), (64, -0.1), (104, -0.3), (144, -0.3)]
    assert curves.steps_to(points, -0.1) == 48 and curves.steps_to(points, -0.25) == 104
    assert curves.steps_to(points, -0.31) is None


def test_regret_is_of_the_last_trial_that_fits_the_budget(curves: Any) -> None:
    points = curves.curve([PRUNED, trial(-0.1), trial(-0.3)])
    found = curves.regrets(points, 88, -0.5)
    assert found == {"10%": None, "25%": None, "50%": None, "100%": pytest.approx(0.2)}
    assert curves.regrets(points, 100, -0.5)["50%"] == pytest.approx(0.4)
    assert curves.regrets(points, 80, -0.5)["100%"] == pytest.approx(0.4), "the last trial went beyond the budget"


def test_a_seed_that_never_reached_it_counts_as_the_worst_in_the_median(curves: Any) -> None:
    assert curves.middle([0.1, None, 0.3]) == 0.3 and curves.middle([None, 0.2, None]) is None
