"""Who works on a study: each parent says so in an attribute of the study, from its start to its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.search.study.leases import Holder, why_dead
from library.search.study.storage import insisting, is_storage_failure

if TYPE_CHECKING:
    import optuna

PARENT = "parent "
"""The user attribute of a study is called by this and the process."""


def _key(lease: Mapping[str, Any]) -> str:
    return f"{PARENT}{lease['host']} {lease['boot_id']} {lease['pid']} {lease['pid_start']}"


class Presence:
    """One parent's."""

    def __init__(self, study: optuna.Study, holder: Holder) -> None:
        self._study, self._holder = study, holder
        self._stopping = False
        self.tell()

    def tell(self) -> None:
        """Renew it."""
        self._write(left=False)

    def stopping(self) -> None:
        """Somebody has stopped this parent: trials that it leaves behind are interrupted, and have not failed."""
        self._stopping = True
        self.tell()

    def leave(self) -> None:
        self._write(left=True)

    def _write(self, *, left: bool) -> None:
        content = {**self._holder.lease(-1, time.time()), "left": left, "stopping": self._stopping}
        try:
            insisting(lambda: self._study.set_user_attr(_key(content), content))
        except Exception as error:
            if not is_storage_failure(error):  # whether trials can be stored is said elsewhere
                raise


def was_stopped(attrs: Mapping[str, Any], lease: Mapping[str, Any] | None) -> bool:
    """Whether somebody stopped the parent that held the lease. attrs: of the study."""
    return lease is not None and bool(attrs.get(_key(lease), {}).get("stopping"))


def parents(attrs: Mapping[str, Any], stale_after: float, now: float) -> int:
    """How many parents work on the study now."""
    told = [content for name, content in attrs.items() if name.startswith(PARENT)]
    return sum(not content["left"] and why_dead(content, stale_after, now) is None for content in told)
