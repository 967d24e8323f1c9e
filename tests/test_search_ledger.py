"""The ledger: budget, leases, retries, penalties and predictions, with any number of parents."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from library.search.messages import Outcome, Slot, write_outcome
from library.search.study.leases import LEASE
from library.search.study.ledger import RETRIES, Ledger
from library.search.study.running import Running
from library.search.study.trial_values import best_of, is_real
from tests.tools.search import DISTRIBUTIONS, SPACE, dead_lease, ledger, next_trial, params_key


def report(mine: Ledger, running: Running, values: list[float]) -> int:
    """Report values slot by slot until the ledger has enough; the last slot."""
    for slot, value in enumerate(values, start=1):
        if not mine.report(running, Slot(running.number, slot, slot, value)):
            return slot
    return len(values)


def finish(mine: Ledger, value: float = 0.0, ending: str = "done") -> Running:
    running = next_trial(mine)
    report(mine, running, [value] * 10)
    outcome = Outcome(running.number, ending, value=value if ending == "done" else None)  # type: ignore[arg-type]
    mine.settle(running, outcome)
    return running


def abandon(mine: Ledger, running: Running, **lease: object) -> None:
    """Make a trial look as if its parent had died."""
    mine._set(running.trial._trial_id, LEASE, dead_lease(**lease))
    mine.active.clear()


def states(mine: Ledger) -> list[str]:
    return [trial.state.name for trial in mine.trials()]


def test_the_budget_is_of_the_whole_study_whoever_asks(tmp_path: Path) -> None:
    one, other = ledger(tmp_path, 5), ledger(tmp_path, 5)
    for mine in (one, other, one, other):
        finish(mine)
    running = next_trial(one)
    assert other.ask() is None and not other.is_done()
    one.settle(running, Outcome(running.number, "done", value=0.0))
    assert one.ask() is None and other.is_done() and len(other.trials()) == 5
    assert ledger(tmp_path, 6).ask() is not None


def test_two_parents_that_ask_at_the_same_moment_do_not_overshoot(tmp_path: Path) -> None:
    parents = [ledger(tmp_path, 3) for _ in range(4)]
    asked: list[Running] = []

    def ask(mine: Ledger) -> None:
        while (running := mine.ask()) is not None:
            asked.append(running)

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in parents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 3 and len({running.number for running in asked}) == 3
    assert states(parents[0]).count("RUNNING") == 3


def test_one_too_many_withdraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ledger(tmp_path, 1), ledger(tmp_path, 1)
    before = other.trials()
    assert one.ask() is not None
    views = [before]  # the other one has looked before the first trial was there
    monkeypatch.setattr(other, "trials", lambda: views.pop() if views else Ledger.trials(other))
    assert other._create(0) is None
    assert states(one) == ["RUNNING", "FAIL"] and other.trials()[1].user_attrs["withdrawn"].startswith("one more")


def test_imported_trials_are_outside_the_budget(tmp_path: Path) -> None:
    mine = ledger(tmp_path, 1)
    for _ in range(3):
        mine.study.add_trial(
            create_trial(
                params=SPACE.defaults, distributions=DISTRIBUTIONS, value=-9.0, user_attrs={"imported": "elsewhere"}
            )
        )
    running = finish(mine, 1.0)
    assert mine.is_done() and running.number == 4
    best = best_of(mine.trials())
    assert best is not None and best.number == 3


# What is enqueued.


def test_enqueued_parameters_come_first_and_once_for_each_ticket(tmp_path: Path) -> None:
    one, other = ledger(tmp_path), ledger(tmp_path)
    one.enqueue({**SPACE.defaults, "learning_rate": 5e-4}, "a")
    other.enqueue({**SPACE.defaults, "learning_rate": 5e-4}, "a")
    assert states(one) == ["WAITING"]
    running = next_trial(other)
    assert running.params["learning_rate"] == 5e-4


def test_of_two_with_one_ticket_the_later_withdraws(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    for _ in range(2):  # as two parents do at the same moment
        mine.study.enqueue_trial(SPACE.defaults, user_attrs={"ticket": "baseline-1"})
    finish(mine)
    running = next_trial(mine)
    assert running.number == 3
    assert mine.trials()[1].user_attrs["withdrawn"] == "enqueued twice (baseline-1)"


@pytest.mark.parametrize("bad", [{"network_dim": 12}, {"learning_rate": 5.0}, {"rank": 3}])
def test_what_somebody_enqueued_outside_the_space_is_left_out(tmp_path: Path, bad: dict[str, object]) -> None:
    said: list[str] = []
    mine = ledger(tmp_path, say=said.append)
    mine.study.enqueue_trial({**SPACE.defaults, **bad})
    running = next_trial(mine)
    assert running.number == 2 and next(iter(bad)) in said[0]
    with pytest.raises(ValueError, match=next(iter(bad))):
        mine.enqueue({**SPACE.defaults, **bad}, "b")  # type: ignore[dict-item]


# Leases.


def test_a_dead_trial_is_tried_again_with_its_parameters_at_once(tmp_path: Path) -> None:
    one = ledger(tmp_path)
    first = next_trial(one)
    abandon(one, first)
    again = next_trial(ledger(tmp_path))
    assert again.params == first.params and again.number == 2
    assert again.attrs["retry_of"] == 1 and again.attrs["attempt"] == 1


def test_a_trial_that_dies_each_time_is_given_up_after_two_retries(tmp_path: Path) -> None:
    mine = ledger(tmp_path, 2)
    seen = []
    for _ in range(RETRIES + 2):
        running = next_trial(mine)
        seen.append(params_key(running.params))
        abandon(mine, running)
    assert seen[0] == seen[1] == seen[2] != seen[3]


def test_a_living_trial_of_another_parent_is_left_alone(tmp_path: Path) -> None:
    one, other = ledger(tmp_path), ledger(tmp_path)
    next_trial(one)
    other.reap()
    assert states(one) == ["RUNNING"]


def test_a_suspended_parent_that_comes_back_has_lost_its_trial_and_survives(tmp_path: Path) -> None:
    one, other = ledger(tmp_path), ledger(tmp_path)
    running = next_trial(one)
    one._set(running.trial._trial_id, LEASE, dead_lease(host="elsewhere", at=time.time() - 1000))
    taken = next_trial(other)
    assert taken.params == running.params
    one.renew(running.trial._trial_id)
    assert running.lost and not one.report(running, Slot(1, 1, 1, 0.0))
    assert one.settle(running, Outcome(1, "done", value=-1.0)) is None
    assert states(other) == ["FAIL", "RUNNING"] and one.ask() is not None


def test_a_trial_whose_parameters_were_not_all_there_has_not_begun(tmp_path: Path) -> None:
    mine = ledger(tmp_path, 1)
    half = create_trial(
        state=TrialState.RUNNING,
        params={"network_dim": 8},
        distributions={"network_dim": DISTRIBUTIONS["network_dim"]},
        user_attrs={LEASE: dead_lease()},
    )
    mine.study.add_trial(half)
    running = next_trial(mine)
    assert running.number == 2 and "retry_of" not in running.attrs


def test_a_parent_that_dies_between_giving_up_and_enqueueing_loses_nothing(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    running = next_trial(mine)
    abandon(mine, running)
    mine._requeue = lambda: None  # type: ignore[method-assign]
    mine.reap()
    assert states(mine) == ["FAIL"]
    again = next_trial(ledger(tmp_path))
    assert again.params == running.params


def test_what_had_ended_when_its_parent_died_is_not_trained_again(tmp_path: Path) -> None:
    one = ledger(tmp_path, 1)
    running = next_trial(one)
    write_outcome(one.folder(1), Outcome(1, "done", value=-0.25, best_slot=9))
    abandon(one, running)
    other = ledger(tmp_path, 1)
    assert other.ask() is None and other.is_done()
    assert other.trials()[0].value == -0.25 and is_real(other.trials()[0])


@pytest.mark.parametrize("content", ["", "{", '{"trial": 1}', '{"trial": 2, "ending": "done", "value": -1.0}'])
def test_an_outcome_that_says_nothing_of_this_trial_is_not_taken(tmp_path: Path, content: str) -> None:
    one = ledger(tmp_path, 1)
    running = next_trial(one)
    one.folder(1).mkdir(parents=True)
    (one.folder(1) / "outcome.json").write_text(content)
    abandon(one, running)
    again = next_trial(ledger(tmp_path, 1))
    assert again.params == running.params


def test_a_trial_stopped_through_no_fault_of_its_own_loses_no_attempt(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    running = next_trial(mine)
    for _ in range(RETRIES + 2):
        mine.settle(running, Outcome(running.number, "stopped", "interrupted"))
        again = next_trial(mine)
        assert again.params == running.params and again.attrs["attempt"] == 0
        running = again


# What a trial comes to.


@pytest.mark.parametrize("outcome", [("diverged", None), ("memory", None), ("done", math.nan), ("done", math.inf)])
def test_what_diverges_is_told_as_the_worst_finite_value(tmp_path: Path, outcome: tuple[str, float]) -> None:
    mine = ledger(tmp_path)
    for value in (-0.2, 0.4, 0.1):
        finish(mine, value)
    running = next_trial(mine)
    told = mine.settle(running, Outcome(running.number, outcome[0], value=outcome[1]))  # type: ignore[arg-type]
    assert told is not None and told.state == TrialState.COMPLETE and told.value == 0.4
    assert told.user_attrs["failure"] == ("diverged" if outcome[0] == "done" else outcome[0])


def test_a_first_trial_that_diverges_has_a_finite_value_and_is_never_the_best(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    finish(mine, ending="diverged")
    assert mine.trials()[0].value == 1.0 and best_of(mine.trials()) is None
    finish(mine, 2.0)
    best = best_of(mine.trials())
    assert best is not None and best.number == 1


def test_values_that_are_no_numbers_are_not_reported(tmp_path: Path) -> None:
    mine = ledger(tmp_path)
    running = next_trial(mine)
    assert mine.report(running, Slot(1, 1, 1, math.nan)) and mine.report(running, Slot(1, 2, 2, 0.5))
    assert mine.trials()[0].intermediate_values == {2: 0.5}


def prune_one(mine: Ledger, finished: int = 10) -> tuple[Running, int]:
    for number in range(finished):
        finish(mine, 0.1 * number)
    running = next_trial(mine)
    return running, report(mine, running, [5.0 - 0.1 * slot for slot in range(10)])


@pytest.mark.parametrize(("sampler", "state"), [("gp", "COMPLETE"), ("random", "PRUNED"), ("tpe", "PRUNED")])
def test_a_pruned_trial_is_told_as_its_sampler_can_use_it(tmp_path: Path, sampler: str, state: str) -> None:
    mine = ledger(tmp_path, 20)
    running, slot = prune_one(mine)
    mine.sampler = sampler  # type: ignore[assignment]
    told = mine.settle(running, Outcome(running.number, "stopped", value=4.9))
    assert told is not None and told.state.name == state and slot == 2
    assert told.user_attrs["observed"] == 4.9 and told.user_attrs["pruned_at"] == 2 and not is_real(told)
    assert told.value == pytest.approx(4.9)


def test_a_predicted_value_moves_by_what_others_gained_and_is_never_the_best(tmp_path: Path) -> None:
    from library.search.study.trial_values import EPSILON, predicted

    mine = ledger(tmp_path, 20)
    for number in range(3):
        running = next_trial(mine)
        report(mine, running, [1.0 + number - 0.1 * slot for slot in range(1, 11)])
        mine.settle(running, Outcome(running.number, "done", value=number - 0.1 * number))
    trials = mine.trials()
    # Gains from slot 4 to the end: 0 - 0.6, 0.9 - 1.6, 1.8 - 2.6.
    assert predicted(trials, 4, 2.0) == pytest.approx(2.0 - 0.7)
    assert predicted(trials, 4, -9.0) == 0.0 + EPSILON
    assert predicted([], 4, 2.0) == 2.0


def test_the_first_eight_and_the_baselines_are_never_pruned(tmp_path: Path) -> None:
    mine = ledger(tmp_path / "few", 20)
    assert prune_one(mine, 7)[1] == 10
    mine = ledger(tmp_path / "enqueued", 20)
    for _ in range(10):
        finish(mine, 0.0)
    mine.enqueue(SPACE.defaults, "baseline-1", baseline=0)
    assert prune_one(mine, 0)[1] == 10


def test_a_trial_that_ends_before_it_could_be_stopped_keeps_its_own_value(tmp_path: Path) -> None:
    mine = ledger(tmp_path, 20)
    running, _ = prune_one(mine)
    told = mine.settle(running, Outcome(running.number, "done", value=4.0))
    assert told is not None and told.value == 4.0 and is_real(told)


def test_a_parent_that_dies_after_pruning_has_pruned(tmp_path: Path) -> None:
    mine = ledger(tmp_path, 11)
    running, _ = prune_one(mine)
    abandon(mine, running)
    mine.reap()
    assert mine.trials()[-1].state == TrialState.PRUNED and mine.is_done()


# Proposals.


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_resumed_study_does_not_repeat_its_first_proposals(tmp_path: Path, sampler: str) -> None:
    seen = []
    for _ in range(6):  # a new parent for each trial
        seen.append(params_key(finish(ledger(tmp_path, sampler=sampler)).params))
    assert len(set(seen)) == 6


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_an_interrupted_study_proposes_what_an_undisturbed_one_does(tmp_path: Path, sampler: str) -> None:
    whole = ledger(tmp_path / "whole", 14, sampler=sampler)
    undisturbed = [finish(whole, 0.01 * n).params for n in range(14)]
    parts = [finish(ledger(tmp_path / "parts", 14, sampler=sampler), 0.01 * n).params for n in range(14)]
    assert parts == undisturbed


def test_the_gaussian_process_proposes_and_sees_predicted_values(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="GPSampler needs scipy, which is not installed")
    mine = ledger(tmp_path, 14, sampler="gp")
    for number in range(12):
        finish(mine, 0.1 * number)
    running = next_trial(mine)
    assert SPACE.objection(running.params) is None


def test_the_sampler_follows_from_the_workers_and_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from library.errors import UserError
    from library.search.study import proposals

    there: set[str] = {"scipy", "torch"}
    monkeypatch.setattr(proposals, "find_spec", lambda name: object() if name in there else None)
    assert proposals.choose_sampler("auto", 4, 200)[0] == "gp"
    assert proposals.choose_sampler("auto", 5, 50)[0] == proposals.choose_sampler("auto", 1, 201)[0] == "tpe"
    there.remove("scipy")
    name, why = proposals.choose_sampler("auto", 1, 50)
    assert name == "tpe" and "needs scipy, not installed" in why
    with pytest.raises(UserError, match="pip install scipy"):
        proposals.choose_sampler("gp", 1, 50)
