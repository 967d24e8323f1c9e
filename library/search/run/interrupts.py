"""Ctrl-C once: no new trial starts, and running ones end. Twice, or SIGTERM: running ones are stopped and enqueued again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from library.signals import caught


class Interrupts:
    """Counts the signals of a study. say: prints a message. stop_now: stops running trials. tell: somebody has stopped it."""

    def __init__(
        self, say: Callable[[str], None], stop_now: Callable[[], None], tell: Callable[[], None] = lambda: None
    ) -> None:
        self._say = say
        self._stop_now = stop_now
        self._tell = tell
        self._count = 0
        self.is_now = False
        """Whether running trials must stop."""

    @property
    def is_asked(self) -> bool:
        """Whether no new trial may start."""
        return self._count > 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch signals within the context. Only the main thread gets signals; in another one this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with caught(self._on_signal):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._count >= 2:
            raise KeyboardInterrupt  # a third time: end this process, and the trainers with it
        self._count += 1 if number == signal.SIGINT else 2
        # A handler may interrupt the main thread while it holds a lock, so another thread does what needs locks.
        threading.Thread(target=self._act, args=(self._count,), daemon=True).start()

    def _act(self, count: int) -> None:
        self._tell()
        if count == 1:
            self._say(
                "Interrupted: no new trials are started; running trials finish. Press Ctrl-C again to stop them too."
            )
            return
        self.is_now = True
        self._say("Interrupted: running trials are stopped. They start again when the study is continued.")
        self._stop_now()
