"""report.html of a study that is running."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from library.search.results.status import StudyView

REPORT = "report.html"
EVERY = 60.0
"""Seconds between two reports."""


class RunningReport:
    """Writes the report of a running study when a trial has ended, at most once a minute. What goes wrong with it is said once, and
    the study goes on."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self._written, self._failed = time.monotonic(), False

    def __call__(self, view: Callable[[], StudyView]) -> None:
        if time.monotonic() - self._written < EVERY:
            return
        self._written = time.monotonic()
        try:
            from library.search.results.study_report import build_report  # plotly takes a second to load

            build_report(view(), self.folder, is_running=True).write(self.folder / REPORT)
        except Exception as error:  # whatever it is, the study is worth more
            if not self._failed:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.say(f"{REPORT} could not be written, and the study goes on: {reason}")
            self._failed = True
