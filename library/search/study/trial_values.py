"""Values of trials: measured ones, predictions for pruned trials, penalties for diverged ones; and which of them count."""

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
"""User attributes of a trial: why its value is a penalty (diverged, memory), its predicted value, and that its value comes
from another study."""
INTERRUPTED, WITHDRAWN = "interrupted", "withdrawn"
"""User attributes of a trial that has no value and has not failed: somebody stopped it, and it is trained again under another
number; or it was one too many."""
ENDED = "ended"
"""User attribute: when a trial ended, in seconds since the epoch. Optuna's own times are local and have no zone."""

FIRST_PENALTY = 1.0
"""Value of a trial that diverges before any other has a value. The objective is a log-ratio: this is e times the base's loss."""
EPSILON = 1e-6
"""A predicted value is at least this much worse than the best."""


def is_real(trial: FrozenTrial) -> bool:
    """Whether a trial's value was measured in its own training: neither predicted nor a penalty nor imported."""
    attrs = trial.user_attrs
    return trial.state == TrialState.COMPLETE and not attrs.keys() & {FAILURE, IMPUTED, IMPORTED}


def breaks(trial: FrozenTrial) -> bool:
    """Whether a trial broke a constraint (see `library.search.constraints`)."""
    return is_broken(trial.user_attrs.get("components"))


def may_win(trial: FrozenTrial) -> bool:
    """Whether a trial can be the best: its value is real and it kept its constraints."""
    return is_real(trial) and not breaks(trial)


def has_failed(trial: FrozenTrial) -> bool:
    """Whether a trial failed, diverged or did not fit into memory. One that somebody stopped, or a superfluous one, has not."""
    attrs = trial.user_attrs
    return FAILURE in attrs or (trial.state == TrialState.FAIL and not attrs.keys() & {INTERRUPTED, WITHDRAWN})


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the study's budget: it is done, running or waiting."""
    return trial.state != TrialState.FAIL and IMPORTED not in trial.user_attrs


def by_end(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials in the order in which they ended, on any machine."""
    return sorted(trials, key=lambda trial: (_ended(trial), trial.number))


def _ended(trial: FrozenTrial) -> float:
    complete = trial.datetime_complete  # where another program ended the trial
    return float(trial.user_attrs.get(ENDED) or (complete.timestamp() if complete is not None else 0.0))


def value_of(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The trial with the lowest value among those that may win; of equal ones the first."""
    found = filter(may_win, trials)
    return min(found, key=lambda trial: (value_of(trial), trial.number), default=None)


def penalty(trials: Iterable[FrozenTrial]) -> float:
    """The value that Optuna gets for a diverged trial: the worst finite value so far.

    Samplers ignore failed trials and would go on proposing parameters that diverge; a huge value would spoil their model.
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
    """The final value to expect of a trial that had the value `observed` when it was pruned at `slot`.

    `observed` plus the median change of finished trials from that slot to their end, but worse than the best trial, so that no
    prediction is ever the best.
    """
    real = [trial for trial in trials if is_real(trial)]
    gains = [value_of(trial) - trial.intermediate_values[slot] for trial in real if slot in trial.intermediate_values]
    value = observed + (median(gains) if gains else 0.0)
    best = best_of(real)
    return value if best is None else max(value, value_of(best) + EPSILON)
