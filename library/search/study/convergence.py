"""Whether a study has converged, and other alerts for its owner, each written once to CONVERGENCE_ALERT.txt.

The thresholds were measured on simulated studies of 50 trials: after 10 trials without a better one, a third of the remaining
gain is still to come, which is worth an alert; after 15, with at least 20 finished, nearly all of it has been found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from library.files import write_text
from library.search.space import Space
from library.search.study.ledger import Ledger
from library.search.study.storage import insisting
from library.search.study.trial_values import (
    IMPORTED,
    INTERRUPTED,
    WITHDRAWN,
    best_of,
    by_end,
    has_failed,
    may_win,
    value_of,
)
from library.words import plural

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

ALERT_FILE = "CONVERGENCE_ALERT.txt"
ALERTS = "alerts"
"""User attribute of a study: level -> {at, words}."""

PLATEAU, CONVERGED = "PLATEAU", "CONVERGED"
PLATEAU_AFTER, CONVERGED_AFTER, CONVERGED_SHARE, CONVERGED_LEAST = 10, 15, 0.3, 20
STREAK, WINDOW = 5, 10
"""An alert after STREAK failures in a row, or where half of the last WINDOW trials failed."""


@dataclass(frozen=True)
class Alert:
    level: str
    words: str


def alerts(trials: Iterable[FrozenTrial], space: Space, n_trials: int) -> list[Alert]:
    """All alerts that hold for a study now."""
    ended = by_end(
        trial
        for trial in trials
        if trial.state.is_finished() and not trial.user_attrs.keys() & {IMPORTED, WITHDRAWN, INTERRUPTED}
    )
    done = [trial for trial in ended if trial.state != TrialState.FAIL]
    found = [*_without_better(done, n_trials), *_failures(ended)]
    best = best_of(done)
    if best is not None and len(done) >= PLATEAU_AFTER:
        for words in space.borders(best.params):
            level = f"BORDER {words.split()[0]}"
            found.append(Alert(level, f"in the best trial {words}: the range may be too narrow."))
    if len(done) >= n_trials:
        found.append(Alert("BUDGET", f"{plural(n_trials, 'trial is', 'trials are')} done, the whole budget."))
    found += _agreement(done, space)
    return found


def since_best(done: list[FrozenTrial]) -> int:
    """How many trials ended after the best one."""
    best = best_of(done)
    return 0 if best is None else len(done) - 1 - done.index(best)


def _without_better(done: list[FrozenTrial], n_trials: int) -> list[Alert]:
    best, since = best_of(done), since_best(done)
    if best is None:
        return []
    found = []
    words = f"no better trial in the last {since} of {len(done)}; the best is trial {best.number + 1}, {value_of(best):.4f}."
    if since >= PLATEAU_AFTER:
        found.append(Alert(PLATEAU, words))
    if since >= max(CONVERGED_AFTER, math.ceil(CONVERGED_SHARE * n_trials)) and len(done) >= CONVERGED_LEAST:
        found.append(Alert(CONVERGED, words))
    return found


def _failures(ended: list[FrozenTrial]) -> list[Alert]:
    failed = list(map(has_failed, ended))
    found = []
    if len(failed) >= STREAK and all(failed[-STREAK:]):
        found.append(Alert("FAILURES", f"the last {STREAK} trials failed or diverged."))
    if len(failed) >= WINDOW and sum(failed[-WINDOW:]) >= WINDOW / 2:
        found.append(Alert("HALF FAILED", f"{sum(failed[-WINDOW:])} of the last {WINDOW} trials failed or diverged."))
    return found


def _agreement(done: list[FrozenTrial], space: Space) -> list[Alert]:
    best = sorted(filter(may_win, done), key=value_of)[:5]
    if len(best) < 5 or len(done) < CONVERGED_LEAST:
        return []
    found = []
    for parameter in space.parameters:
        values = {str(trial.params.get(parameter.name)) for trial in best}
        if parameter.choices and len(values) == 1:
            words = f"the best five trials all have {parameter.name} {values.pop()}."
            found.append(Alert(f"AGREED {parameter.name}", words))
    return found


def announce(ledger: Ledger, folder: Path) -> list[Alert]:
    """Write new alerts into CONVERGENCE_ALERT.txt and the study, and return them. Each level is announced once per study.

    Where two parents announce at the same moment, one may overwrite the other's alert; the next call writes it again.
    """
    known: dict[str, Any] = dict(ledger.study.user_attrs.get(ALERTS, {}))
    new = [alert for alert in alerts(ledger.trials(), ledger.space, ledger.n_trials) if alert.level not in known]
    for alert in new:
        known[alert.level] = {"at": datetime.now().isoformat(sep=" ", timespec="seconds"), "words": alert.words}
    file = folder / ALERT_FILE
    if known and (not file.is_file() or file.read_text(encoding="utf-8") != alert_text(known)):
        write_text(file, alert_text(known))
    if new:
        insisting(lambda: ledger.study.set_user_attr(ALERTS, known))
    return new


def alert_text(known: dict[str, Any]) -> str:
    return "".join(f"[{alert['at']}] {level}: {alert['words']}\n" for level, alert in known.items())


def has_converged(ledger: Ledger) -> bool:
    """Whether a study has converged now: an earlier alert may have been before a better trial, or for a smaller budget."""
    return any(alert.level == CONVERGED for alert in alerts(ledger.trials(), ledger.space, ledger.n_trials))
