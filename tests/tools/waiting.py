"""Waiting for what another thread or process does, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 600.0) -> None:
    """Look every hundredth of a second; fails where it does not come within `seconds`, which nothing that works needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come about in {seconds:.0f} s"
        time.sleep(0.01)
