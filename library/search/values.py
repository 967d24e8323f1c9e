"""What a trial that did not simply end well is worth: predictions for pruned ones, penalties for those that diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING

from optuna.trial import TrialState

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FAILURE, IMPUTED, IMPORTED = "failure", "imputed", "imported"
"""User attributes: what a penalty was told for (diverged, memory), a predicted value, and values of another study."""

FIRST_PENALTY = 1.0
"""Of a trial that diverges before any has a value; the objective is a log-ratio, so this is e times the base's loss."""
EPSILON = 1e-6


def is_real(trial: FrozenTrial) -> bool:
    """Whether a trial's value was measured at its own end: neither predicted nor a penalty nor imported."""
    attrs = trial.user_attrs
    return trial.state == TrialState.COMPLETE and not attrs.keys() & {FAILURE, IMPUTED, IMPORTED}


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the study's budget: done, under way or waiting."""
    return trial.state != TrialState.FAIL and IMPORTED not in trial.user_attrs


def value_of(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The real trial with the least value; the earlier of equals."""
    real = [trial for trial in trials if is_real(trial)]
    return min(real, key=lambda trial: (value_of(trial), trial.number)) if real else None


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
    best = min((value_of(trial) for trial in real), default=-math.inf)
    return max(value, best + EPSILON)
