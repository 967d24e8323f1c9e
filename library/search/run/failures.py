"""What the endings of trials come to: words for the log, and failures in a row that speak against the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.search.messages import Outcome
from library.search.study.trial_values import breaks

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass
class FailuresInARow:
    """Failed trainings with none between them that ended otherwise.

    Attributes:
        count: without retries; what cannot be trained with its own parameters says nothing of the next ones.
    """

    count: int = 0
    _numbers: list[int] = field(default_factory=list)
    _last: str = ""

    def add(self, number: int, outcome: Outcome, retry_of: int | None) -> None:
        """Trial `number` has ended; retry_of: the trial that had its parameters before and failed, if there is one."""
        if outcome.ending != "failed":
            self.count, self._numbers = 0, []
            return
        self.count += retry_of not in self._numbers
        self._numbers.append(number)
        self._last = outcome.message or "no reason was given."

    def words(self) -> str:
        numbers = ", ".join(map(str, self._numbers))
        return (
            f"{self.count} trainings in a row failed, besides retries (trials {numbers}), so it is hardly their parameters; "
            f"the last one: {self._last}"
        )


def ending_words(trial: FrozenTrial, outcome: Outcome) -> str:
    """How a trial was told, which may be otherwise than it ended."""
    attrs, value = trial.user_attrs, trial.value
    if "failure" in attrs:
        return f"{attrs['failure']}, told as {value:.4f}. {outcome.message}".strip()
    if "pruned_at" in attrs and outcome.ending == "stopped":
        return f"pruned after slot {attrs['pruned_at']} of 10 at {attrs['observed']:.4f}"
    if value is None:
        again = " It is going to be tried again." if "again" in attrs else " It is given up."
        return f"{outcome.ending}. {outcome.message}{again}"
    broke = "; it follows prompts less than the base does and cannot be the best" if breaks(trial) else ""
    return f"value {value:.4f} at slot {attrs.get('best_slot')} of 10, {outcome.seconds:.0f} s{broke}"
