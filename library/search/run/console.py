"""What a study prints: its lines, and below them, on a terminal, how it stands, drawn anew every two seconds."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Sequence

from library.search.lines import columns, folded

REDRAWN = 2.0
"""Seconds between two looks at the study, on a terminal."""
EARLY, EARLY_EVERY, LATER_EVERY = 120.0, 4.0, 30.0
"""Elsewhere a line says how the study stands: every 4 s in its first two minutes, later every 30 s."""


class Console:
    """Writes to stdout, from any thread. is_live: whether it is a terminal."""

    def __init__(self) -> None:
        self.is_live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._shown: list[str] = []
        self._rows = 0
        """Of the terminal that the shown lines take."""

    @property
    def every(self) -> float:
        """Seconds until the status is to be shown again."""
        if self.is_live:
            return REDRAWN
        return EARLY_EVERY if time.monotonic() - self._began < EARLY else LATER_EVERY

    def print(self, words: str) -> None:
        """A line that stays."""
        with self._lock:
            self._write(f"{folded(words, indent=2)}\n")

    def show(self, lines: Sequence[str]) -> None:
        """On a terminal: lines that stand below all others until the next ones."""
        with self._lock:
            self._shown = list(lines) if self.is_live else []
            self._write("")

    def close(self) -> None:
        """Take away what is shown."""
        self.show([])

    def _write(self, text: str) -> None:
        away = f"\r\033[{self._rows}A\033[J" if self._rows else ""
        rows = folded("\n".join(self._shown), columns() - 1).splitlines()[: shutil.get_terminal_size().lines - 2]
        self._rows = len(rows)
        if away or text or rows:
            # At once: whatever else writes finds the cursor at the beginning of a line.
            sys.stdout.write(away + text + "".join(f"{row}\n" for row in rows))
            sys.stdout.flush()
