"""When a study has come to rest, and what else its owner should hear of: CONVERGENCE_ALERT.txt, each alert once.

Levels as measured on simulated studies of 50 trials: after 10 trials without a better one a third of the remaining gain is
still ahead, so that is worth a word; after 15 and at least 20 finished nearly all of it is had.
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
from library.search.study.ledger import WITHDRAWN, Ledger
from library.search.study.storage import insisting
from library.search.study.trial_values import FAILURE, IMPORTED, best_of, by_end, may_win, value_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

ALERT_FILE = "CONVERGENCE_ALERT.txt"
ALERTS = "alerts"
"""User attribute of a study: level -> {at, words}."""

PLATEAU, CONVERGED = "PLATEAU", "CONVERGED"
PLATEAU_AFTER, CONVERGED_AFTER, CONVERGED_SHARE, CONVERGED_LEAST = 10, 15, 0.3, 20
STREAK, WINDOW = 5, 10


@dataclass(frozen=True)
class Alert:
    level: str
    words: str


def alerts(trials: Iterable[FrozenTrial], space: Space, n_trials: int) -> list[Alert]:
    """All that holds of a study now."""
    ended = by_end(
        trial for trial in trials if trial.state.is_finished() and not trial.user_attrs.keys() & {IMPORTED, WITHDRAWN}
    )
    done = [trial for trial in ended if trial.state != TrialState.FAIL]
    found = [*_rest(done, n_trials), *_failures(ended)]
    best = best_of(done)
    if best is not None and len(done) >= PLATEAU_AFTER:
        for words in space.borders(best.params):
            found.append(
                Alert(f"BORDER {words.split()[0]}", f"in the best trial {words}: the range may be too narrow.")
            )
    if len(done) >= n_trials:
        found.append(Alert("BUDGET", f"all {n_trials} trials are done."))
    found += _agreement(done, space)
    return found


def since_best(done: list[FrozenTrial]) -> int:
    """Trials that ended after the best one did."""
    best = best_of(done)
    return 0 if best is None else len(done) - 1 - done.index(best)


def _rest(done: list[FrozenTrial], n_trials: int) -> list[Alert]:
    best, since = best_of(done), since_best(done)
    if best is None:
        return []
    found = []
    words = f"no better trial in {since}, after {len(done)}; the best is trial {best.number + 1}, {value_of(best):.4f}."
    if since >= PLATEAU_AFTER:
        found.append(Alert(PLATEAU, words))
    if since >= max(CONVERGED_AFTER, math.ceil(CONVERGED_SHARE * n_trials)) and len(done) >= CONVERGED_LEAST:
        found.append(Alert(CONVERGED, words))
    return found


def _failures(ended: list[FrozenTrial]) -> list[Alert]:
    failed = [trial.state == TrialState.FAIL or FAILURE in trial.user_attrs for trial in ended]
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
    for one in space.parameters:
        values = {str(trial.params.get(one.name)) for trial in best}
        if one.choices and len(values) == 1:
            found.append(Alert(f"AGREED {one.name}", f"the best five trials all have {one.name} {values.pop()}."))
    return found


def announce(ledger: Ledger, folder: Path) -> list[Alert]:
    """Write what is new into CONVERGENCE_ALERT.txt and the study; returns it. A level is announced once in a study's life.

    Of two parents that announce at the same moment one may undo what the other did, and the next look makes it good.
    """
    known: dict[str, Any] = dict(ledger.study.user_attrs.get(ALERTS, {}))
    new = [one for one in alerts(ledger.trials(), ledger.space, ledger.n_trials) if one.level not in known]
    for one in new:
        known[one.level] = {"at": datetime.now().isoformat(sep=" ", timespec="seconds"), "words": one.words}
    file = folder / ALERT_FILE
    if known and (not file.is_file() or file.read_text(encoding="utf-8") != alert_text(known)):
        write_text(file, alert_text(known))
    if new:
        insisting(lambda: ledger.study.set_user_attr(ALERTS, known))
    return new


def alert_text(known: dict[str, Any]) -> str:
    return "".join(f"[{one['at']}] {level}: {one['words']}\n" for level, one in known.items())


def has_converged(ledger: Ledger) -> bool:
    """Whether a study is at rest now, whatever was said of it before a better trial or with a smaller budget."""
    return any(one.level == CONVERGED for one in alerts(ledger.trials(), ledger.space, ledger.n_trials))
