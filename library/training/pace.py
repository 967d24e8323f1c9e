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
        self._is_due = due
        self._due = {name: [s for s in range(first_step + 1, last_step + 1) if due[name](s)] for name in due}
        self._seconds = dict(guesses)
        self._reports = self._counted = 0
        self._since, self._at = time.perf_counter(), first_step
        self._seen, self._seen_at = first_step, self._since
        self._waiting: set[str] = set()
        self._interrupted: tuple[str, float] | None = None

    def arrive(self, step: int) -> None:
        """So many steps are done, and what interrupts after them comes now."""
        self._seen, self._seen_at = step, time.perf_counter()
        self._waiting = {name for name, due in self._is_due.items() if due(step)}

    def stepped(self, seconds: float, steps: int) -> None:
        """So many steps took so long, interruptions apart."""
        self._since, self._at = time.perf_counter(), self._at + steps
        taken, self._reports = seconds / max(steps, 1), self._reports + 1
        # The first steps hold the warm-up (kernels chosen, compilation): they are no measure of what is to come.
        self._counted = steps if self._reports <= 2 else self._counted + steps
        weight = max(steps / max(self._counted, 1), 1 - 0.7 ** (steps / 10))
        self._seconds["step"] = (1 - weight) * self._seconds.get("step", taken) + weight * taken

    @contextmanager
    def interruption(self, name: str, what: str) -> Iterator[None]:
        """Measure one, showing what is being done."""
        start = time.perf_counter()
        self._interrupted = (name, start)
        try:
            with doing(what):
                yield
        finally:
            self._interrupted = None
            self._waiting.discard(name)
            self._seconds[name] = taken = time.perf_counter() - start
            self._since += taken
            self._seen_at += taken

    def left(self, step: int) -> float | None:
        """Seconds from after so many steps to the end; None while nothing is known of a step."""
        if "step" not in self._seconds:
            return None
        to_come = {name: len(steps) - bisect_right(steps, step) for name, steps in self._due.items()}
        interruptions = sum(count * self._seconds.get(name, 0.0) for name, count in to_come.items())
        interruptions += sum(self._seconds.get(name, 0.0) for name in self._waiting)
        now = time.perf_counter()
        if self._interrupted is not None:
            name, start = self._interrupted
            interruptions -= min(now - start, self._seconds.get(name, 0.0))
            now = start
        return (self._last_step - step) * self._per_step(step, now) + interruptions

    def _per_step(self, step: int, now: float) -> float:
        """Seconds, of the steps reported and of those since."""
        known = self._seconds["step"]
        if not self._reports and self._seen > self._at:
            # The guess counts as one step.
            done = self._seen - self._at
            return max((known + self._seen_at - self._since) / (done + 1), (now - self._since) / (done + 1))
        # Where many steps since the last report take longer than those before it, that is what is to come; one is chance.
        lately = (now - self._since) / (step - self._at + 1)
        return known + max(lately - known, 0.0) * min((step - self._at) / 9, 1.0)
