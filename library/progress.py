"""What is being done now: a live bar on a terminal; elsewhere a plain line whenever nothing was said for five seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

SILENCE = 5.0
"""Seconds after which a plain line says what is being done."""
REDRAWN = 0.5
"""Seconds between two looks at what has changed; an activity that ends within one never shows."""

_activities: list[Activity] = []
_lock = threading.RLock()


def _forget() -> None:
    """In a forked process: what its parent does is not shown there."""
    _activities.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)


class Activity:
    """One thing that takes time. what: in words such as "encoding pictures", or nothing where it shows itself; total: how many
    `done` are all of it.

    words: gives what stands behind the count, at most so many characters; by default the time since the beginning, and the
    time left at the pace so far.
    """

    def __init__(self, what: str, total: int | None, done: int) -> None:
        self.what, self.total, self.done, self.first = what, total, done, done
        self.words: Callable[[int], str] = self._times
        self.began = self.advanced = time.monotonic()
        self.portion = 1
        self.bar: Any = None

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.portion = count
        self.advanced = time.monotonic()

    def line(self, width: int = 120) -> str:
        start = f"{self.what} {self.done}/{self.total}" if self.total else self.what
        return f"{start}  {self.words(width - len(start) - 2)}"

    def _times(self, width: int) -> str:
        now, made = time.monotonic(), self.done - self.first
        left = ""
        if self.total and made:
            each = (self.advanced - self.began) / made
            # What is being made now is not finished; where it takes longer than those before, the time left stands still.
            seconds = max(
                each * (self.total - self.done) - (now - self.advanced),
                each * (self.total - self.done - self.portion),
                0.0,
            )
            left = f", {clock_text(seconds)} left"
        return clock_text(now - self.began) + left

    @property
    def live(self) -> bool:
        """Whether a bar shows it, so that no lines are needed."""
        return self.bar is not None

    def hide(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def draw(self, stream: TextIO) -> None:
        """On a terminal."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, file=stream, leave=False, dynamic_ncols=True, bar_format="{desc}")
        columns = self.bar.ncols
        length = 6 if columns is not None and columns < 100 else 12
        shape = f"{{desc}} {{percentage:3.0f}}%|{{bar:{length}}}| {{n_fmt}}/{{total_fmt}}{{postfix}}"
        self.bar.bar_format = shape if self.total else "{desc}{postfix}"
        self.bar.n, self.bar.desc = self.done, self.what
        self.bar.postfix = self.words((columns or 80) - len(self.what) - len(str(self.total)) * 2 - length - 12)
        self.bar.refresh()


@contextmanager
def doing(what: str, total: int | None = None, *, done: int = 0) -> Iterator[Activity]:
    """Show, while the context lasts, what is being done, and how much of it; the innermost is what a plain line names.

    A script as a whole is the outermost activity: nothing is silent for long, whether or not it has a name here. Of several
    processes only the first shows anything.
    """
    activity = Activity(what, total, done)
    with _lock:
        _activities.append(activity)
        outermost = len(_activities) == 1
    if not outermost or os.environ.get("RANK", "0") != "0":
        try:
            yield activity
        finally:
            _end(activity)
        return
    kept = sys.stdout, sys.stderr
    screen = _Screen(sys.stderr)
    sys.stdout, sys.stderr = _Beside(kept[0], screen), _Beside(kept[1], screen)  # type: ignore[assignment]
    try:
        yield activity
    finally:
        _end(activity)
        screen.close()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = kept


def _end(activity: Activity) -> None:
    with _lock:
        if activity in _activities:
            _activities.remove(activity)
        activity.hide()


def clock_text(seconds: float) -> str:
    """0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Screen:
    """The thread that shows the activities."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live = stream, stream.isatty()
        self.spoken = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(REDRAWN):
            with _lock:
                if self._ended.is_set() or not _activities:
                    continue
                now = time.monotonic()
                if self._live:
                    # The script as a whole has a line only while nothing in it has a name.
                    if len(_activities) > 1:
                        _activities[0].hide()
                    for activity in _activities[1:] or _activities:
                        if activity.what and now - activity.began >= REDRAWN:
                            activity.draw(self._stream)
                elif now - self.spoken >= SILENCE and _activities[-1].what:
                    self.spoken = now
                    print(_activities[-1].line(), file=self._stream, flush=True)

    def hide(self) -> None:
        """Make room for other output; the bars come back with the next look."""
        for activity in _activities:
            if activity.bar is not None:
                activity.bar.clear()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class _Beside:
    """A stream of text whose lines are written above the bars, and count as something said."""

    def __init__(self, stream: TextIO, screen: _Screen) -> None:
        self._stream, self._screen, self._begun = stream, screen, ""

    def write(self, text: str) -> int:
        with _lock:
            whole, end, self._begun = (self._begun + text).rpartition("\n")
            if end:
                self._screen.hide()
                self._stream.write(whole + end)
                self._screen.spoken = time.monotonic()
        return len(text)

    def flush(self) -> None:
        with _lock:
            if self._begun:
                self._screen.hide()
                self._stream.write(self._begun)
                self._begun = ""
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
