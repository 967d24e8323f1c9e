"""Convergence and other alerts, and how far a study is."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial

from library.search.study.convergence import ALERTS, alerts, announce, has_converged, since_best
from library.search.study.progress import progress
from tests.tools.search import SPACE, ledger, trial


def levels(trials: list[FrozenTrial], n_trials: int = 50) -> set[str]:
    return {one.level for one in alerts(trials, SPACE, n_trials)}


def flat(count: int, best_at: int = 1) -> list[FrozenTrial]:
    return [trial(n, -1.0 if n == best_at else 0.01 * n) for n in range(1, count + 1)]


@pytest.mark.parametrize(
    ("count", "n_trials", "wanted"),
    [
        (10, 50, set()),
        (11, 50, {"PLATEAU"}),
        (19, 50, {"PLATEAU"}),
        (20, 50, {"PLATEAU", "CONVERGED"}),
        (20, 100, {"PLATEAU"}),
        (31, 100, {"PLATEAU", "CONVERGED"}),
        (20, 20, {"PLATEAU", "CONVERGED", "BUDGET"}),
    ],
)
def test_plateau_and_convergence(count: int, n_trials: int, wanted: set[str]) -> None:
    found = {one for one in levels(flat(count), n_trials) if not one.startswith("AGREED")}
    assert found == wanted


def test_a_better_trial_starts_the_count_anew_and_a_predicted_one_does_not() -> None:
    done = flat(12)
    assert since_best(done) == 11
    assert since_best([*done, trial(13, -2.0)]) == 0
    assert since_best([*done, trial(13, -2.0, imputed=-2.0)]) == 12


def test_the_order_of_trials_is_that_of_their_ends_in_all_time_zones() -> None:
    done = [trial(n, -1.0 if n == 11 else 0.0, ended=1000.0 * n) for n in range(1, 13)]
    for one in done[6:]:  # of a machine nine hours behind
        assert one.datetime_complete is not None
        one.datetime_complete -= timedelta(hours=9)
    assert "PLATEAU" not in levels(done)
    assert "PLATEAU" in levels([*done, *(trial(n, 0.0, ended=1000.0 * n) for n in range(13, 22))])


def test_whether_a_study_is_at_rest_is_a_matter_of_its_trials_and_not_of_what_was_said(tmp_path: Path) -> None:
    mine = ledger(tmp_path, 50)
    for done in flat(20):
        mine.study.add_trial(done)
    announce(mine, tmp_path)
    assert has_converged(mine) and not has_converged(ledger(tmp_path, 100))
    mine.study.add_trial(trial(21, -2.0))
    assert not has_converged(mine) and "CONVERGED" in mine.study.user_attrs[ALERTS]


def test_failures_are_reported_and_withdrawn_trials_are_none() -> None:
    failed = [trial(n, None, "FAIL") for n in range(2, 5)]
    diverged = [trial(n, 0.5, failure="diverged") for n in range(5, 7)]
    assert "FAILURES" in levels([*flat(1), *failed, *diverged])
    assert "FAILURES" not in levels([*flat(1), *failed, *diverged, trial(9, 0.1)])
    withdrawn = [trial(n, None, "FAIL", withdrawn="enqueued twice") for n in range(2, 9)]
    assert not levels([*flat(1), *withdrawn])
    half = [trial(n, None if n % 2 else 0.1 * n, "FAIL" if n % 2 else "COMPLETE") for n in range(1, 11)]
    assert "HALF FAILED" in levels(half)


def test_a_best_value_at_a_border_is_reported() -> None:
    done = [trial(n, 0.1 * n) for n in range(2, 12)]
    assert not [one for one in levels(done) if one.startswith("BORDER")]
    assert "BORDER learning_rate" in levels([*done, trial(12, -1.0, rate=9.8e-3)])


def test_an_alert_is_written_once_whoever_looks_and_the_file_keeps_all(tmp_path: Path) -> None:
    one, other = ledger(tmp_path), ledger(tmp_path)
    for done in flat(11):
        one.study.add_trial(done)
    assert [alert.level for alert in announce(one, tmp_path)] == ["PLATEAU"]
    first = (tmp_path / "CONVERGENCE_ALERT.txt").read_text()
    assert announce(one, tmp_path) == announce(other, tmp_path) == []
    for number in range(12, 14):
        one.study.add_trial(trial(number, None, "FAIL"))
    one.study.add_trial(trial(14, 9.0))
    assert [alert.level for alert in announce(ledger(tmp_path), tmp_path)] == ["BUDGET"]
    text = (tmp_path / "CONVERGENCE_ALERT.txt").read_text()
    assert (
        text.startswith(first)
        and len(text.splitlines()) == 2
        and "PLATEAU: no better trial in the last 10 of 11" in text
    )
    assert not list(tmp_path.glob(".CONVERGENCE*"))
    (tmp_path / "CONVERGENCE_ALERT.txt").write_text(first)  # by a parent that did not know of the second yet
    announce(one, tmp_path)
    assert (tmp_path / "CONVERGENCE_ALERT.txt").read_text() == text


# Progress.


def test_progress_is_of_the_whole_study() -> None:
    running = trial(5, None, "RUNNING")
    running.intermediate_values = dict.fromkeys(range(1, 6), 0.0)
    now = progress([*flat(4), running, trial(6, None, "FAIL")], 10, workers=1, more=2)
    assert (now.done, now.running, now.best_trial) == (4, 1, 1)
    assert now.seconds_left == pytest.approx((10 - 4 - 0.5) * 60 + 2 * 60)
    assert now.line(3.25) == "trial 4/10  running 1  best -1.0000 (trial 1)  3.2 img/s  left 0:07:30"
    assert progress([], 10).line() == "trial 0/10  running 0"


def test_the_time_left_is_by_what_trainings_took_and_not_by_clocks() -> None:
    done = [trial(n, 0.0, seconds=30.0) for n in range(1, 4)]
    for one in done:  # told by a machine in another time zone
        assert one.datetime_complete is not None
        one.datetime_complete -= timedelta(hours=9)
    assert progress(done, 5).seconds_left == pytest.approx(60)
    for one in done:
        one.user_attrs.clear()
    assert progress(done, 5).seconds_left == 0
