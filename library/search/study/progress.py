"""How far a study is and when it will end, in a line; its budget; and optimization.log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from library.search.study.pace import Leases, lease_of, pace_of
from library.search.study.storage import insisting
from library.search.study.trial_values import best_of, counts, value_of

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

LOG_FILE = "optimization.log"
BUDGET = "budget"
"""User attribute of a study: n_trials, workers and command of its last start, how many trainings of the best follow, and
whether it has ended."""


class StudyLog:
    """Prints a line and writes it with its time to the log, from any thread. Errors of writing are ignored.

    printed: prints one.
    """

    def __init__(self, folder: Path, printed: Callable[[str], None] = print, *, quiet: bool = False) -> None:
        self._file = folder / LOG_FILE
        self._printed = printed
        self._quiet = quiet
        self._lock = threading.Lock()

    def __call__(self, words: str) -> None:
        with self._lock:
            if not self._quiet:
                self._printed(words)
            self.keep(words)

    def keep(self, words: str) -> None:
        """Into the file alone."""
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write("".join(f"{stamp} {line}\n" for line in words.splitlines()))
        except OSError:
            return


def set_budget(study: optuna.Study, n_trials: int, workers: int, more: int, command: str = "") -> None:
    """Store the budget of a study that starts or continues.

    more: trainings of the best with new seeds, at most. command: what starts it again, for `status`.
    """
    budget = {"n_trials": n_trials, "workers": workers, "more": more, "ended": False, "command": command}
    insisting(lambda: study.set_user_attr(BUDGET, budget))


def change_budget(study: optuna.Study, n_trials: int, **changes: int) -> None:
    """Store what remains of the budget, unless somebody has started the study again with another n_trials."""
    budget = study.user_attrs.get(BUDGET, {})
    if budget.get("n_trials") == n_trials:
        insisting(lambda: study.set_user_attr(BUDGET, {**budget, **changes}))


@dataclass(frozen=True)
class Progress:
    """Progress of the whole study, including trials of other parents.

    Attributes:
        seconds_left: None before the first step of the first trial is done.
    """

    done: int
    n_trials: int
    running: int
    best: float | None
    best_trial: int | None
    seconds_left: float | None

    def line(self, images_per_second: float = 0.0) -> str:
        words = [f"trial {self.done}/{self.n_trials}", f"running {self.running}"]
        if self.best is not None:
            words.append(f"best {self.best:.4f} (trial {self.best_trial})")
        if images_per_second > 0:
            words.append(f"{images_per_second:.1f} img/s")
        if self.seconds_left is not None:
            words.append(f"left {timedelta(seconds=round(self.seconds_left))}")
        return "  ".join(words)


def progress(
    trials: Iterable[FrozenTrial],
    n_trials: int,
    workers: int = 1,
    more: int = 0,
    *,
    fresh: Leases | None = None,
    now: float | None = None,
) -> Progress:
    """The progress of a study with these trials. more: trainings of the best that follow, each as long as a whole trial.

    Trials take as long as those that are done did; before any is, as long as the running ones will at the pace of their steps.
    """
    now = time.time() if now is None else now
    trials = [trial for trial in trials if counts(trial)]
    done = [trial for trial in trials if trial.state.is_finished()]
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    paces = [pace_of(trial, lease_of(trial, fresh), now) for trial in running]
    wholes = [pace.whole for pace in paces if pace.whole is not None]
    mean = _mean_seconds(done)
    if mean is None and wholes:
        mean = fmean(wholes)
    whole = _mean_seconds(trial for trial in done if trial.state == TrialState.COMPLETE)
    left = None
    if mean is not None:
        at_once = max(workers, len(running))
        remaining = n_trials - len(done) - sum(pace.share for pace in paces)
        left = (max(0.0, remaining) * mean + more * (whole or mean)) / at_once
    best = best_of(done)
    value, number = (None, None) if best is None else (value_of(best), best.number + 1)
    return Progress(len(done), n_trials, len(running), value, number, left)


def _mean_seconds(trials: Iterable[FrozenTrial]) -> float | None:
    found = [seconds for seconds in map(_seconds, trials) if seconds is not None]
    return fmean(found) if found else None


def _seconds(trial: FrozenTrial) -> float | None:
    """Seconds that the trainer measured; else between Optuna's times, which may come from machines in different time zones."""
    if seconds := trial.user_attrs.get("seconds"):
        return float(seconds)
    if trial.datetime_complete is None or trial.datetime_start is None:
        return None
    return max(0.0, (trial.datetime_complete - trial.datetime_start).total_seconds())
