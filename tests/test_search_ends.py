"""How studies end: converged, or with the best trained again; what remains until then; and which adapters are kept."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.search.messages import Job, Outcome
from library.search.results.status import status_text
from library.search.run.driver import Driver
from tests.tools.search import FACTS, FakeTrainer, ledger, plan, run, said, view


def test_convergence_stops_a_study_only_when_asked_to(tmp_path: Path) -> None:
    class Flat(FakeTrainer):
        def run(self, job: Job, on_slot: Any, **more: Any) -> Any:
            return Outcome(job.trial, "done", value=float(job.trial), best_slot=10)

    run(plan(tmp_path / "on", 26), Flat)
    assert len(ledger(tmp_path / "on").trials()) == 26 and "CONVERGED: " in said(tmp_path / "on")
    stops = tmp_path / "stops"
    run(plan(stops, 40, stop_on_convergence=True), Flat)
    run(plan(stops, 40, stop_on_convergence=True), Flat)  # again: nothing is left to do
    assert len(ledger(stops).trials()) == 20 and view(stops).is_done and "left" not in status_text(view(stops))
    assert "trial 20/40" in status_text(view(stops)) and "  ended" in status_text(view(stops))
    run(plan(stops, 80, stop_on_convergence=True), Flat)  # of more trials it is no longer at rest after 20
    assert len(ledger(stops).trials()) == 25


def test_a_trial_under_way_when_a_study_comes_to_rest_may_be_better_and_then_it_goes_on(tmp_path: Path) -> None:
    begun = threading.Event()

    class Late(FakeTrainer):
        def run(self, job: Job, on_slot: Any, **more: Any) -> Any:
            if job.trial == 5:  # ends when all others are at rest
                begun.set()
                while sum(one.state.is_finished() for one in ledger(tmp_path).trials()) < 20:
                    time.sleep(0.01)
                time.sleep(0.3)
                return Outcome(job.trial, "done", value=-9.0, best_slot=10)
            begun.wait(0.2)
            return Outcome(job.trial, "done", value=float(job.trial), best_slot=10)

    run(plan(tmp_path, 60, workers=2, prunes=False, stop_on_convergence=True), Late)
    trials = ledger(tmp_path).trials()
    assert len(trials) >= 21 + 18 and all(one.state.is_finished() for one in trials)


@pytest.mark.parametrize(("n_trials", "count"), [(4, 4), (6, 6)])
def test_what_is_left_of_a_study_is_known_at_each_moment(tmp_path: Path, n_trials: int, count: int) -> None:
    seen: list[str] = []

    def ending(job: Job) -> str:
        assert not view(tmp_path).is_done
        if "confirm" in job.folder:
            seen.append(
                next(line for line in status_text(view(tmp_path)).splitlines() if line.startswith("confirming"))
            )
        else:
            assert view(tmp_path).more == count
        return "done"

    run(plan(tmp_path, n_trials, confirm=3), lambda: FakeTrainer(ending))  # of 4 trials three are the default
    assert seen == [f"confirming {n} of {count} trainings of the best with new seeds" for n in range(count)]
    assert view(tmp_path).is_done and view(tmp_path).more == 0
    count = 0
    run(plan(tmp_path, n_trials + 1), lambda: FakeTrainer(ending))
    assert view(tmp_path).is_done and len(ledger(tmp_path).trials()) == n_trials + 1


class Writing(FakeTrainer):
    def run(self, job: Job, on_slot: Any, **more: Any) -> Any:
        file = Path(job.folder) / f"lora_trial_{job.trial}.safetensors"
        file.write_bytes(b"weights")
        return replace(super().run(job, on_slot, **more), file=str(file))


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_best_adapters_stay_with_those_of_their_trainings_with_new_seeds(tmp_path: Path, keep: int) -> None:
    given = iter(["failed"])

    def make() -> FakeTrainer:
        return Writing(lambda job: next(given, "done") if job.trial == 7 else "done")

    made = plan(tmp_path, 10, keep=keep, confirm=2, facts=FACTS)
    result = Driver(made, lambda number: make()).run()
    out, best = tmp_path / "out", result.verdict.best
    left = {int(path.parent.name[-4:]) for path in out.glob("trial_*/*.safetensors")}
    assert best is not None and best.trial in left and len(left) == keep and 7 not in left
    again = [one for one in view(tmp_path).confirmed if one.user_attrs["of_trial"] in left]
    assert sorted(out.glob("confirm_*/*.safetensors")) == sorted(Path(one.user_attrs["file"]) for one in again)
    assert len(again) == 2 * min(keep, 2)


def test_a_picked_trial_keeps_its_adapter_when_the_study_goes_on(tmp_path: Path) -> None:
    run(plan(tmp_path, 8, prunes=False), Writing)
    worst = max(ledger(tmp_path).trials(), key=lambda one: one.value or 0.0)
    ledger(tmp_path).study.set_user_attr("picked", worst.number + 1)
    run(plan(tmp_path, 9, keep=2, prunes=False), Writing)
    left = {path.parent.name for path in (tmp_path / "out").glob("trial_*/*.safetensors")}
    assert len(left) == 2 and f"trial_{worst.number + 1:04d}" in left
