"""Requests from outside: Ctrl-C, SIGTERM, and files named `stop`, `save` or `sample` in the output folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from library.signals import caught

NOTHING, SAMPLE, SAVE, STOP = 0, 1, 2, 3  # the stronger, the larger
LOOKED_EVERY = 1.0
"""Seconds between two looks into the folder."""
FILES = {STOP: "stop", SAVE: "save", SAMPLE: "sample"}


class Requests:
    """The strongest request since the last call. The folder is read at most once in LOOKED_EVERY."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._signalled = NOTHING
        self._looked = 0.0
        self._changed: int | None = None
        """When the folder of samples changed, as last seen; nanoseconds."""
        self.reason = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch signals within the context. A second Ctrl-C ends the program at once."""
        with caught(self._on_signal):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signalled == STOP:
            raise KeyboardInterrupt
        self._signalled = STOP
        self.reason = signal.Signals(number).name

    def look(self) -> int:
        if self._signalled == NOTHING and time.monotonic() - self._looked >= LOOKED_EVERY:
            self._looked = time.monotonic()
            for request, name in FILES.items():
                path = self.folder / name
                if path.is_file() or (request == SAMPLE and self._is_touched(path)):
                    self.reason = f"the file {self.folder / name}"
                    return request
        return self._signalled

    def _is_touched(self, samples: Path) -> bool:
        """Whether somebody touched the folder of samples, which bears the request's name. That sets both of its times to the same
        moment; pictures that come and go change one of them."""
        try:
            times = samples.stat()
        except OSError:
            return False
        before, self._changed = self._changed, times.st_mtime_ns
        return before not in (None, times.st_mtime_ns) and times.st_atime_ns == times.st_mtime_ns

    def done(self, request: int) -> None:
        """`request` is or was carried out: remove its file. What came in meanwhile stays to be looked at."""
        path = self.folder / FILES[request]
        if not path.is_dir():
            path.unlink(missing_ok=True)
        if request == STOP:
            self._signalled = NOTHING
