"""How trials ended, in words for the log; and failures in a row, which are probably the machine's fault."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.search.messages import SLOTS, Outcome
from library.search.study.ledger import AGAIN, PRUNED_AT
from library.search.study.trial_values import FAILURE, INTERRUPTED, breaks

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass
class FailuresInARow:
    """Trainings that failed one after the other.

    Attributes:
        count: without further attempts at the same parameters, which may be what fails.
    """

    count: int = 0
    _numbers: list[int] = field(default_factory=list)
    _last: str = ""

    def add(self, number: int, outcome: Outcome, retry_of: int | None) -> None:
        """Trial `number` has ended. retry_of: the failed trial that had the same parameters before; None for new parameters."""
        if outcome.ending != "failed":
            self.count, self._numbers = 0, []
            return
        self.count += retry_of not in self._numbers
        self._numbers.append(number)
        self._last = outcome.message or "there is no message."

    def words(self) -> str:
        numbers = ", ".join(map(str, self._numbers))
        return (
            f"{self.count} trainings in a row failed, not counting retries (trials {numbers}), so the cause is probably not their "
            f"parameters. The last one: {self._last}"
        )


def ending_words(trial: FrozenTrial, outcome: Outcome) -> str:
    """How a trial ended, and the value that was stored for it."""
    attrs, value = trial.user_attrs, trial.value
    if FAILURE in attrs:
        return f"{attrs[FAILURE]}; it counts as {value:.4f}. {outcome.message}".strip()
    if PRUNED_AT in attrs and outcome.ending == "stopped":
        return f"pruned after slot {attrs[PRUNED_AT]} of {SLOTS} at {attrs['observed']:.4f}"
    if value is None:
        again = "Its parameters are enqueued again." if AGAIN in attrs else "It is given up."
        how = "interrupted" if INTERRUPTED in attrs else outcome.ending
        return " ".join(filter(None, [f"{how}.", outcome.message, again]))
    broke = "; it follows prompts less than the base does and cannot be the best" if breaks(trial) else ""
    return f"value {value:.4f} at slot {attrs.get('best_slot')} of {SLOTS}, {outcome.seconds:.0f} s{broke}"
