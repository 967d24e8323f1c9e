"""How long a run still takes: its steps, and the validations, saves and samples that interrupt them."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from library.progress import doing


class Pace:
    """Seconds of a step and of each kind of interruption: as they were measured, and before that as `guesses` has them.

    due: name of a kind -> whether it comes after so many steps. guesses: seconds by name, that of a step as "step".
    """

    def __init__(
        self, first_step: int, last_step: int, due: Mapping[str, Callable[[int], bool]], guesses: Mapping[str, float]
    ) -> None:
        self._last_step = last_step
        self._due = {name: [s for s in range(first_step + 1, last_step + 1) if due[name](s)] for name in due}
        self._seconds = dict(guesses)
        self._reports = 0
        self._since, self._at = time.perf_counter(), first_step

    def stepped(self, seconds: float, steps: int) -> None:
        """So many steps took so long, interruptions apart."""
        self._since, self._at = time.perf_counter(), self._at + steps
        taken, self._reports = seconds / max(steps, 1), self._reports + 1
        # The first steps hold the warm-up (kernels chosen, compilation): they are no measure of what is to come.
        fresh = self._reports <= 2 or "step" not in self._seconds
        self._seconds["step"] = taken if fresh else 0.7 * self._seconds["step"] + 0.3 * taken

    @contextmanager
    def interruption(self, name: str, what: str) -> Iterator[None]:
        """Measure one, showing what is being done."""
        start = time.perf_counter()
        with doing(what):
            yield
        self._seconds[name] = taken = time.perf_counter() - start
        self._since += taken

    def left(self, step: int) -> float | None:
        """Seconds from after so many steps to the end; None while nothing is known of a step."""
        if "step" not in self._seconds:
            return None
        to_come = {name: len(steps) - bisect_right(steps, step) for name, steps in self._due.items()}
        interruptions = sum(count * self._seconds.get(name, 0.0) for name, count in to_come.items())
        # Where the steps since the last report take longer than those before it, that is what is to come.
        lately = (time.perf_counter() - self._since) / (step - self._at + 1)
        return (self._last_step - step) * max(self._seconds["step"], lately) + interruptions
