"""Which process trains a trial: a lease in the trial's user attributes, which its holder renews while it lives.

It works on any storage. Optuna's own heartbeat works neither with ask and tell nor on journals and gRPC, and notices a
dead worker only after its grace period. A lease names its process, so a restart on the same machine notices at once.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEASE = "lease"
RENEW_AFTER = 60.0
"""Seconds between renewals."""
STALE_AFTER = 900.0
"""Seconds without a renewal after which a holder counts as dead, also on another machine."""


@dataclass(frozen=True)
class Holder:
    """A process, identified beyond its number: containers share host names, and systems reuse process numbers."""

    host: str
    boot_id: str
    pid_ns: str
    pid: int
    pid_start: str

    def lease(self, worker: int, now: float | None = None) -> dict[str, Any]:
        return {**asdict(self), "worker": worker, "at": time.time() if now is None else now}


def this_process() -> Holder:
    host, boot_id, pid_ns = _place()
    return Holder(host, boot_id, pid_ns, os.getpid(), _start_of(os.getpid()) or "")


def why_dead(lease: Mapping[str, Any] | None, stale_after: float, now: float | None = None) -> str | None:
    """Why the holder of a lease counts as dead, in words; None while it may live. None as lease: it died before it wrote one."""
    if lease is None:
        return "its worker died before it started"
    age = (time.time() if now is None else now) - float(lease["at"])
    if (lease["host"], lease["boot_id"], lease["pid_ns"]) == _place():
        start = _start_of(int(lease["pid"]))
        if start is None or start != lease["pid_start"]:
            return f"process {lease['pid']} has ended"
    if age > stale_after:
        return f"process {lease['pid']} on {lease['host']} has not renewed its lease for {age:.0f} s"
    return None


def _place() -> tuple[str, str, str]:
    return socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _start_of(process: int) -> str | None:
    """When the process started, as the system writes it; None where it has ended (a zombie has)."""
    status = _read(f"/proc/{process}/stat")
    if status:
        # The name, in parentheses, may contain spaces (proc(5): state is the 3rd field, starttime the 22nd).
        fields = status.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        return f"{psutil.Process(process).create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


class Heartbeat:
    """Renews the leases of this process's trials, by `renew(key)` from its own thread."""

    def __init__(self, renew: Callable[[int], None], every: float = RENEW_AFTER) -> None:
        self._renew = renew
        self._every = every
        self._keys: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def add(self, key: int) -> None:
        self._keys.add(key)

    def remove(self, key: int) -> None:
        self._keys.discard(key)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._every):
            for key in tuple(self._keys):
                self._renew(key)
