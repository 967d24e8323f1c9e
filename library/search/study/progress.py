"""How far a study is and when it will end, in a line; its budget; and optimization.log."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from library.search.messages import SLOTS
from library.search.study.storage import insisting
from library.search.study.trial_values import best_of, counts, value_of

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

LOG_FILE = "optimization.log"
BUDGET = "budget"
"""User attribute of a study: n_trials and workers of its last start, how many trainings of the best follow, and whether it
has ended."""


class StudyLog:
    """Prints a line and writes it with its time to the log, from any thread. Errors of writing are ignored."""

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        self._file = folder / LOG_FILE
        self._quiet = quiet
        self._lock = threading.Lock()

    def __call__(self, words: str) -> None:
        with self._lock:
            if not self._quiet:
                print(words, flush=True)
            self.keep(words)

    def keep(self, words: str) -> None:
        """Into the file alone."""
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write("".join(f"{stamp} {line}\n" for line in words.splitlines()))
        except OSError:
            return


def set_budget(study: optuna.Study, n_trials: int, workers: int, more: int) -> None:
    """Store the budget of a study that starts or continues. more: trainings of the best with new seeds, at most."""
    budget = {"n_trials": n_trials, "workers": workers, "more": more, "ended": False}
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
        seconds_left: None before the first trial is done.
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


def progress(trials: Iterable[FrozenTrial], n_trials: int, workers: int = 1, more: int = 0) -> Progress:
    """The progress of a study with these trials. more: trainings of the best that follow, each as long as a whole trial."""
    trials = [trial for trial in trials if counts(trial)]
    done = [trial for trial in trials if trial.state.is_finished()]
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    share = sum(max(trial.intermediate_values, default=0) / SLOTS for trial in running)
    mean = _mean_seconds(done)
    whole = _mean_seconds(trial for trial in done if trial.state == TrialState.COMPLETE)
    left = None
    if mean is not None:
        at_once = max(workers, len(running))
        left = (max(0.0, n_trials - len(done) - share) * mean + more * (whole or mean)) / at_once
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
