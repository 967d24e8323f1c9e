"""Who is at work on a trial: a lease in its user attributes, renewed while its holder lives, on any storage.

Optuna's own heartbeat works neither with ask and tell nor on journals and gRPC, and sees a dead worker only after its
grace period. A lease names its process, so that a restart on the same machine sees a dead one at once.
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
"""Seconds."""
STALE_AFTER = 900.0
"""Seconds without a renewal, after which a holder on another machine counts as dead."""


@dataclass(frozen=True)
class Holder:
    """A process, so named that no other one is taken for it: containers share host names, systems reuse numbers."""

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
    """Why the holder of a lease is dead, in words; None while it may live. No lease: died before it could write one."""
    if lease is None:
        return "its worker died before it began"
    age = (time.time() if now is None else now) - float(lease["at"])
    if (lease["host"], lease["boot_id"], lease["pid_ns"]) == _place():
        start = _start_of(int(lease["pid"]))
        if start is None or start != lease["pid_start"]:
            return f"process {lease['pid']} is gone"
    if age > stale_after:
        return f"process {lease['pid']} on {lease['host']} has not been heard of for {age:.0f} s"
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
    """When the process started, in the system's own words; None where it is dead or only waits to be buried."""
    status = _read(f"/proc/{process}/stat")
    if status:
        # The name, in parentheses, may have spaces in it (proc(5): state is the 3rd field, starttime the 22nd).
        fields = status.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        return f"{psutil.Process(process).create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


class Heartbeat:
    """Renews the leases of this process's trials from a thread of its own. `renew(key)` says whether it still holds it."""

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
