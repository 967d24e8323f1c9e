"""When a run validates, and when validations have shown enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Patience:
    """Whether so many validations in a row brought no better loss: --early_stop."""

    limit: int
    say: Callable[[str], None]
    best: float | None = None
    waited: int = 0

    def __call__(self, results: Mapping[str, float]) -> bool:
        loss = results["val/loss"]
        if self.best is None or loss < self.best:
            self.best, self.waited = loss, 0
            return False
        self.waited += 1
        if self.waited < self.limit:
            return False
        self.say(f"early stop: {self.waited} validations without a better loss than {self.best:.4f}")
        return True

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def validation_due(step: int, every_n_steps: int | None, every_n_epochs: int | None, steps_per_epoch: int) -> bool:
    """Whether to validate after so many steps: by steps, by epochs, by both; by neither, after each epoch."""
    if every_n_steps is not None and step % every_n_steps == 0:
        return True
    if every_n_epochs is None and every_n_steps is not None:
        return False
    return step % ((every_n_epochs or 1) * steps_per_epoch) == 0
