"""Ctrl-C once: no trial begins any more, those running end. Twice, or SIGTERM: they are stopped and go back to the queue."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from library.signals import caught


class Interrupts:
    def __init__(self, say: Callable[[str], None], stop_now: Callable[[], None]) -> None:
        self._say = say
        self._stop_now = stop_now
        self._count = 0
        self.is_now = False
        """Whether running trials are to stop."""

    @property
    def is_asked(self) -> bool:
        """Whether nothing is to begin any more."""
        return self._count > 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch signals within the context; outside the main thread there are none to catch."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with caught(self._on_signal):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._count >= 2:
            raise KeyboardInterrupt  # trainers end with this process
        self._count += 1 if number == signal.SIGINT else 2
        # A handler runs in the main thread between any two of its instructions; what takes locks is another thread's work.
        threading.Thread(target=self._act, args=(self._count,), daemon=True).start()

    def _act(self, count: int) -> None:
        if count == 1:
            self._say("Interrupted: running trials end, none begins. Once more to stop them too.")
            return
        self.is_now = True
        self._say("Interrupted: running trials are stopped; they begin anew when the study goes on.")
        self._stop_now()
