"""What the benchmark of optimize.py reads from trials: steps truly taken, the best value after them, regret."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from library.options.toml_file import PROJECT_ROOT
from tests.tools.search import plan


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(PROJECT_ROOT / "benchmarks"), *sys.path])
    import study_curves

    return study_curves


def trial(value: float, slots: int = 10, **attrs: Any) -> FrozenTrial:
    return create_trial(
        value=value, user_attrs={"steps": 40, **attrs}, intermediate_values=dict.fromkeys(range(1, slots + 1), value)
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


@pytest.mark.parametrize("full", [False, True])
def test_regret_is_told_only_where_both_sides_spent_the_same(
    curves: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full: bool
) -> None:
    spec = spec_from_file_location("benchmark_of_optimize", PROJECT_ROOT / "benchmarks" / "optimize.py")
    assert spec is not None and spec.loader is not None
    benchmark = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)  # its dataclasses look themselves up there
    spec.loader.exec_module(benchmark)
    values = {"random": [-0.1, -0.2, -0.3, -0.2], "gp": [-0.1, -0.4, -0.5, -0.2]}

    def search(made: Any, trainer: Any, is_over: Callable[[list[Any]], bool]) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = []
        while not is_over(curves.curve(trials)):
            trials.append(trial(values[made.sampler][len(trials)]))
        return trials

    monkeypatch.setattr(benchmark, "search", search)
    monkeypatch.setattr(benchmark, "small_study", lambda _, folder, sampler, *more: plan(folder, sampler=sampler))
    arguments = argparse.Namespace(trials=4, steps=40, full=full)
    record = benchmark.compare_one(arguments, tmp_path, 1, None)
    assert record["gp_trials"] == (4 if full else 2) and record["share"] == pytest.approx(0.5)
    assert [name for name in record if "regret" in name] == (["random_regret", "gp_regret"] if full else [])
    if full:
        assert record["random_regret"]["100%"] == pytest.approx(0.2) and record["gp_regret"]["100%"] == 0


@pytest.mark.parametrize("full", [False, True])
def test_the_page_shows_no_regret_of_a_search_that_stopped_early(curves: Any, tmp_path: Path, full: bool) -> None:
    """Also of results that were written when they still had it."""
    import page

    measured = {"median_share_of_steps": 0.3, "mean_gp_regret_at_100%": 0.05, "seeds": []}
    result = {"device": "CPU", "versions": {"torch": "2"}, "date": "2026-11-21T00:00:00", "targets": {}}
    (tmp_path / "a.json").write_text(json.dumps({**result, "settings": {"full": full}, "measured": measured}))
    section = page.section(tmp_path / "a.json")
    assert "median share of steps" in section and ("regret" in section) == full
