"""A trial that this process trains."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import Trial

from library.search.space import Value

BASELINE, INITIAL, OF_TRIAL = "baseline", "initial", "of_trial"
"""User attributes of a trial: the default configuration, parameters to begin with, one of the best with a new seed."""


@dataclass
class Running:
    """A trial that this process holds the lease of.

    Attributes:
        seed: of the training.
        lost: whether another process took the trial over while this one was suspended.
        prune_at: the slot after which it was pruned; None while it is not.
        began: when it was claimed, in seconds since the epoch by this machine's clock.
    """

    trial: Trial
    worker: int
    params: dict[str, Value]
    attrs: Mapping[str, Any]
    seed: int
    lost: bool = False
    prune_at: int | None = None
    slots: dict[int, float] = field(default_factory=dict)
    step: int = 0
    steps: int = 0
    images_per_second: float = 0.0
    began: float = field(default_factory=time.time)
    since: float | None = None
    """When its first step began; None while it prepares."""
    stepped: float | None = None
    """When `step` was reached."""

    @property
    def number(self) -> int:
        """Of the trial and its folder, from 1."""
        return self.trial.number + 1

    def reached(self, step: int, images_per_second: float) -> None:
        if step != self.step:
            self.step, self.stepped = step, time.time()
        self.images_per_second = images_per_second

    @property
    def progress(self) -> dict[str, Any]:
        """What its lease tells of it."""
        names = ("step", "steps", "images_per_second", "since", "stepped")
        return {name: getattr(self, name) for name in names}

    @property
    def is_protected(self) -> bool:
        """Baselines and initial parameters are never pruned: the study must not end worse than they are."""
        return bool({BASELINE, INITIAL, OF_TRIAL} & self.attrs.keys())
