"""What a driver is given: the plan of a study and its trainers; and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from library.options.search import SamplerName
from library.search.messages import Begun, Job, Outcome, Slot
from library.search.messages import Progress as JobProgress
from library.search.results.best_trial import Facts
from library.search.space import Value
from library.search.study.leases import RENEW_AFTER, STALE_AFTER
from library.search.study.verdict import CONFIRMED, NEW_SEEDS, Verdict
from library.search.terms import Terms


class Trainer(Protocol):
    """Trains one job after the other, such as `TrainerProcess`, which keeps models loaded between them."""

    def run(
        self,
        job: Job,
        on_slot: Callable[[Slot], bool],
        *,
        on_begun: Callable[[Begun], None],
        on_progress: Callable[[JobProgress], None],
        on_tick: Callable[[], None],
    ) -> Outcome:
        """Train to the end, or to the slot where `on_slot` returns False. Callbacks run in this thread, on_tick often."""

    def stop(self) -> None:
        """Stop the running job, which ends as "stopped", and accept no other; from any thread."""

    def close(self) -> None:
        """End the process."""


@dataclass(frozen=True)
class StudyPlan:
    """Everything that a driver needs to know of its study.

    Attributes:
        n_trials: of the whole study, including those of earlier and other parents.
        initial: points of the space to try right after the default configuration.
        confirm: how many of the best are trained again, with `new_seeds` seeds each; 0 for none.
        keep: how many of the best keep their adapters on the disk. While the study runs, at least `confirm` keep them.
    """

    name: str
    storage: str
    output_dir: Path
    terms: Terms
    n_trials: int
    workers: int = 1
    sampler: SamplerName = "auto"
    initial: tuple[dict[str, Value], ...] = ()
    facts: Facts | None = None
    prunes: bool = True
    confirm: int = CONFIRMED
    new_seeds: int = NEW_SEEDS
    stop_on_convergence: bool = False
    keep: int = 10
    stale_after: float = STALE_AFTER
    renew_after: float = RENEW_AFTER
    poll: float = 2.0
    """Seconds until a worker asks again, when it can start no trial now."""
    quiet: bool = False
    command: str = ""
    """What starts the study again, for `status`."""


@dataclass(frozen=True)
class Result:
    """What a driver has done. done: finished trials of the whole study."""

    verdict: Verdict
    done: int
    interrupted: bool
