"""How far a running trial is and how long it will take, from what its lease says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.search.messages import SLOTS
from library.search.study.leases import LEASE

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

Leases = Mapping[int, Mapping[str, Any]]
"""Id of a trial in the storage -> its lease, newer than the one that is stored."""


def lease_of(trial: FrozenTrial, fresh: Leases | None = None) -> Mapping[str, Any] | None:
    return (fresh or {}).get(trial._trial_id) or trial.user_attrs.get(LEASE)


@dataclass(frozen=True)
class Pace:
    """Of one running trial.

    Attributes:
        share: of its steps that are done; by slots where its lease does not tell steps.
        whole, left: seconds of all of it and until its end; None while nothing is known.
    """

    share: float
    whole: float | None = None
    left: float | None = None


def pace_of(trial: FrozenTrial, lease: Mapping[str, Any] | None, now: float) -> Pace:
    """now: seconds since the epoch. The steps' own pace counts, without the time of preparing, which comes once."""
    slot = max(trial.intermediate_values, default=0)
    if lease is None:
        return Pace(slot / SLOTS)
    step, steps = int(lease.get("step") or 0), int(lease.get("steps") or 0)
    began, since, at = lease.get("began"), lease.get("since"), float(lease.get("stepped") or lease["at"])
    if step and steps and since is not None and at > since:
        each = (at - float(since)) / step
        left = max(0.0, (steps - step) * each - max(0.0, now - at))
        before = 0.0 if began is None else max(0.0, float(since) - float(began))
        return Pace(step / steps, before + steps * each, left)
    if slot and began is not None:
        taken = max(0.0, now - float(began))
        return Pace(slot / SLOTS, taken * SLOTS / slot, taken * (SLOTS - slot) / slot)
    return Pace(slot / SLOTS)
