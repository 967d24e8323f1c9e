"""What a trial that did not simply end well is worth: predictions for pruned ones, penalties for those that diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from library.search.constraints import is_broken

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FAILURE, IMPUTED, IMPORTED = "failure", "imputed", "imported"
"""User attributes: what a penalty was told for (diverged, memory), a predicted value, and values of another study."""
ENDED = "ended"
"""User attribute: when a trial was told, in seconds since the epoch; Optuna's times are local and without a zone."""

FIRST_PENALTY = 1.0
"""Of a trial that diverges before any has a value; the objective is a log-ratio, so this is e times the base's loss."""
EPSILON = 1e-6


def is_real(trial: FrozenTrial) -> bool:
    """Whether a trial's value was measured at its own end: neither predicted nor a penalty nor imported."""
    attrs = trial.user_attrs
    return trial.state == TrialState.COMPLETE and not attrs.keys() & {FAILURE, IMPUTED, IMPORTED}


def breaks(trial: FrozenTrial) -> bool:
    """Whether a trial broke a constraint (see `library.search.constraints`)."""
    return is_broken(trial.user_attrs.get("components"))


def may_win(trial: FrozenTrial) -> bool:
    """Whether a trial's value is real and it kept its constraints: what can be the best, and be exported."""
    return is_real(trial) and not breaks(trial)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the study's budget: done, under way or waiting."""
    return trial.state != TrialState.FAIL and IMPORTED not in trial.user_attrs


def by_end(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """In the order in which they ended, on whatever machines."""
    return sorted(trials, key=lambda trial: (_ended(trial), trial.number))


def _ended(trial: FrozenTrial) -> float:
    complete = trial.datetime_complete  # of trials that this program did not tell
    return float(trial.user_attrs.get(ENDED) or (complete.timestamp() if complete is not None else 0.0))


def value_of(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The trial with the least value among those that may win; the earlier of equals."""
    found = filter(may_win, trials)
    return min(found, key=lambda trial: (value_of(trial), trial.number), default=None)


def penalty(trials: Iterable[FrozenTrial]) -> float:
    """What a diverged trial is told as: the worst finite value so far.

    Failed trials are invisible to samplers, which would go on proposing where it fails; a huge value spoils the model.
    """
    finite = [
        trial.value
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        and trial.value is not None
        and math.isfinite(trial.value)
    ]
    return max(finite, default=FIRST_PENALTY)


def predicted(trials: Iterable[FrozenTrial], slot: int, observed: float) -> float:
    """The end value of a trial that was at `observed` when it was pruned at `slot`.

    It is moved by the median of what finished trials went on to gain from that slot; and never better than the best, so
    that no prediction is ever the best trial.
    """
    real = [trial for trial in trials if is_real(trial)]
    gains = [value_of(trial) - trial.intermediate_values[slot] for trial in real if slot in trial.intermediate_values]
    value = observed + (median(gains) if gains else 0.0)
    best = best_of(real)
    return value if best is None else max(value, value_of(best) + EPSILON)
