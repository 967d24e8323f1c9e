"""What a study has found after how many training steps, read from its trials."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from optuna.trial import FrozenTrial

from library.search.messages import SLOTS
from library.search.study.ledger import DONE, PRUNED_AT
from library.search.study.trial_values import FAILURE, is_real, value_of

FRACTIONS = (0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Point:
    """After a trial: the training steps of the study so far, and the best value; None where no trial came to its end."""

    steps: int
    best: float | None


def spent(trial: FrozenTrial) -> int:
    """Training steps that a trial took: to the slot where it was pruned, or to the one in which it diverged."""
    slot = trial.user_attrs.get(PRUNED_AT)
    if slot is None and FAILURE in trial.user_attrs:
        slot = min(SLOTS, max(trial.intermediate_values, default=0) + 1)
    return math.ceil(trial.user_attrs["steps"] * (SLOTS if slot is None else slot) / SLOTS)


def curve(trials: Iterable[FrozenTrial]) -> list[Point]:
    """After each trial. What was predicted of a pruned trial, or told of a diverged one, is never the best."""
    points: list[Point] = []
    steps, best = 0, None
    for trial in trials:
        if trial.state in DONE:
            steps += spent(trial)
            if is_real(trial) and (best is None or value_of(trial) < best):
                best = value_of(trial)
            points.append(Point(steps, best))
    return points


def steps_to(points: Iterable[Point], value: float) -> int | None:
    return next((point.steps for point in points if point.best is not None and point.best <= value), None)


def regrets(points: list[Point], budget: int, best: float) -> dict[str, float | None]:
    """At fractions of the budget; where a search had stopped by then, the regret that it stopped with."""
    found: dict[str, float | None] = {}
    for fraction in FRACTIONS:
        value = next((one.best for one in reversed(points) if one.steps <= fraction * budget), None)
        found[f"{fraction:.0%}"] = None if value is None else value - best
    return found


def mean_regrets(records: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for name in ("random_regret", "gp_regret"):
        for fraction in records[0][name]:
            values = [one[name][fraction] for one in records if one[name][fraction] is not None]
            if values:
                found[f"mean_{name}_at_{fraction}"] = sum(values) / len(values)
    return found


def middle(values: list[Any]) -> float | None:
    """Median, with None for a number beyond all others."""
    found = median(math.inf if value is None else value for value in values)
    return found if math.isfinite(found) else None
