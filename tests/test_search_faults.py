"""Studies whose parents and trainers are killed, suspended and many: nothing is lost, doubled or trained to the end twice."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from library.search.messages import Job, Outcome, Slot, read_outcome
from tests.tools.search import (
    FakeTrainer,
    eight_parents_share_a_study,
    in_a_process,
    ledger,
    parent,
    plan,
    run,
    said,
    settled,
)
from tests.tools.waiting import wait_until

KILLS = int(os.environ.get("SEARCH_KILLS", "12"))


class ChildTrainer(FakeTrainer):
    """Has a process of its own do the training, as the real one does."""

    def run(self, job: Job, on_slot: Callable[[Slot], bool], **more: Any) -> Outcome:
        reading, writing = os.pipe()
        answers, answering = os.pipe()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            (Path(job.folder) / "child").write_text(str(os.getpid()))

            def say(slot: Slot) -> bool:
                os.write(writing, json.dumps([slot.slot, slot.value]).encode() + b"\n")
                return os.read(answers, 1) == b"+"

            super().run(job, say, on_begun=lambda begun: None, on_tick=lambda: None)
            os._exit(0)
        os.close(writing)
        stopped = False
        with open(reading) as lines:
            for line in lines:
                slot, value = json.loads(line)
                stopped = not on_slot(Slot(job.trial, slot, slot, value))
                os.write(answering, b"-" if stopped else b"+")
        os.waitpid(child, 0)
        os.close(answers)
        os.close(answering)
        if stopped:
            return Outcome(job.trial, "stopped")
        return read_outcome(job.folder, job.trial) or Outcome(job.trial, "failed", "The trainer was killed.")


def kill(whom: str, parent: int, out: Path) -> None:
    """SIGKILL to the parent, to the trainer it has at the moment, or to both at once."""
    with suppress(ProcessLookupError, ValueError, IndexError, FileNotFoundError):
        if whom == "both":
            os.killpg(parent, signal.SIGKILL)
        elif whom == "parent":
            os.kill(parent, signal.SIGKILL)
        else:
            newest = max(out.glob("trial_*/child"), key=lambda path: path.parent.name, default=None)
            if newest is not None:
                os.kill(int(newest.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("form", ["sqlite:///{}/study.db", "journal:{}/study.log"])
def test_killed_at_random_moments_a_study_loses_and_doubles_nothing(tmp_path: Path, form: str) -> None:
    storage, n_trials = form.format(tmp_path), 14
    dice = random.Random(f"{form}")
    is_journal = storage.startswith("journal")
    kills = KILLS // 3 if is_journal else KILLS
    ledger(tmp_path, n_trials, storage)
    for number in range(kills):
        victim = in_a_process(
            lambda: run(plan(tmp_path, n_trials, storage=storage), lambda: ChildTrainer(seconds=0.1)) and None
        )
        if number % 2:  # in the midst of a trial, however slow the machine is; else while it may still be starting
            before = len(list((tmp_path / "out").glob("trial_*/trial.json")))
            while os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if len(list((tmp_path / "out").glob("trial_*/trial.json"))) > before:
                    break
                time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.4))
        kill(("parent", "child", "both")[number % 3], victim, tmp_path / "out")
        if number % 3 == 1:
            time.sleep(0.2)
            kill("parent", victim, tmp_path / "out")
        os.waitpid(victim, 0)
        if is_journal:
            # Who was killed while it wrote leaves the lock, which others break after half a minute.
            (tmp_path / "study.log.lock").unlink(missing_ok=True)
    run(plan(tmp_path, n_trials, storage=storage))
    trials = settled(tmp_path, n_trials, storage)
    assert any("retry_of" in one.user_attrs for one in trials), "no kill hit a trial"


@pytest.mark.parametrize("form", ["sqlite:///{}/study.db", "journal:{}/study.log"])
def test_eight_parents_share_a_study_without_a_lost_or_doubled_trial(tmp_path: Path, form: str) -> None:
    storage = form.format(tmp_path)
    ledger(tmp_path, 12, storage)
    eight_parents_share_a_study(tmp_path, storage)


def suspend(process: int, database: Path) -> None:
    """Stop a process while it is not at work on the database, which nobody else could write to then."""
    while True:
        os.kill(process, signal.SIGSTOP)
        connection = sqlite3.connect(database, timeout=0)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            return
        except sqlite3.OperationalError:
            os.kill(process, signal.SIGCONT)
            time.sleep(0.01)
        finally:
            connection.close()


def test_a_suspended_parent_survives_the_loss_of_its_trial(tmp_path: Path) -> None:
    storage, quick = f"sqlite:///{tmp_path}/study.db", {"stale_after": 0.6, "renew_after": 0.1}
    ledger(tmp_path, 3, storage)
    settings = {"storage": storage, "prunes": False, **quick}
    resumed = tmp_path / "resumed"

    def ending(job: Job) -> str:
        wait_until(resumed.exists)
        return "done"

    suspended = parent(tmp_path, 3, seconds=1.0, ending=ending, **settings)
    wait_until((tmp_path / "out" / "trial_0001" / "trial.json").exists)
    suspend(suspended, tmp_path / "study.db")
    time.sleep(0.8)
    run(plan(tmp_path, 2, **settings))  # its budget leaves something to the other
    resumed.touch()
    os.kill(suspended, signal.SIGCONT)
    assert os.waitpid(suspended, 0)[1] == 0
    trials = settled(tmp_path, 3, storage)
    assert trials[0].state == TrialState.FAIL and "has not renewed its lease for" in trials[0].user_attrs["message"]
    assert "trial 1: its lease was lost" in said(tmp_path)
