"""Leases: who counts as dead, renewals that fail, and the moment in which a claimed trial has none yet."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from library.search.study import ledger as ledger_module
from library.search.study.leases import LEASE, Heartbeat, this_process, why_dead
from tests.tools.search import SPACE, dead_lease, ledger, next_trial
from tests.tools.waiting import wait_until

NOW = 2e9


@pytest.mark.parametrize(
    ("changes", "stale", "dead"),
    [
        ({}, 900, True),  # this machine, no such process
        ({"host": "elsewhere"}, 900, False),
        ({"boot_id": "before"}, 900, False),
        ({"pid_ns": "pid:[1]"}, 900, False),  # a container of the same name
        ({"host": "elsewhere", "at": NOW - 1000}, 900, True),
        ({"host": "elsewhere", "at": NOW - 1000}, 2000, False),
        ({"pid": this_process().pid}, 900, False),
        ({"pid": this_process().pid, "pid_start": "1"}, 900, True),  # the number was used again
        ({"pid": this_process().pid, "at": NOW - 1000}, 900, True),  # suspended, or hung
    ],
)
def test_who_counts_as_dead(changes: dict[str, object], stale: float, dead: bool) -> None:
    assert (why_dead(dead_lease(**{"at": NOW, **changes}), stale, now=NOW) is not None) == dead


def test_a_renewal_that_fails_without_a_word_is_tried_again_at_the_next_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    mine = ledger(tmp_path, say=said.append)
    running = next_trial(mine)
    before = mine.trials()[0].user_attrs[LEASE]["at"]
    broken = [TimeoutError(), RuntimeError(" \n")]

    def renew(trial_id: int) -> None:
        if not broken:
            monkeypatch.undo()
        mine.renew(trial_id)

    monkeypatch.setattr(mine, "_set", lambda *_: (_ for _ in ()).throw(broken.pop(0)))
    heart = Heartbeat(renew, 0.01)
    heart.add(running.trial._trial_id)
    wait_until(lambda: mine.trials()[0].user_attrs[LEASE]["at"] > before)
    heart.close()
    assert said == [f"trial 1: its lease could not be renewed: {name}." for name in ("TimeoutError", "RuntimeError")]


@pytest.mark.parametrize("hours", [-9, 0, 9])
def test_a_trial_that_is_being_claimed_is_left_alone_in_whatever_time_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    mine = ledger(tmp_path, 2)
    claimed = create_trial(state=TrialState.RUNNING, system_attrs={"fixed_params": SPACE.defaults})
    claimed.datetime_start = datetime.now() + timedelta(hours=hours)
    mine.study.add_trial(claimed)
    mine.reap()
    mine.reap()
    assert [one.state.name for one in mine.trials()] == ["RUNNING"]
    monkeypatch.setattr(ledger_module, "CLAIMING", 0.0)
    mine.reap()
    assert [one.state.name for one in mine.trials()] == ["FAIL", "WAITING"], (
        "whoever claimed it died before it said who it is"
    )
