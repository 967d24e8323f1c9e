"""A study as a parent process uses it: it asks for the next trial, holds a lease on it and stores its result.

Any number of parents share a study, on one machine or several, with no lock between them and none in charge. No trial is lost
or trained twice, because:

- A new trial is created together with its lease, in one transaction; a waiting trial is claimed by an atomic change of state.
- A trial may run if fewer than n_trials trials that count have smaller numbers. Numbers only grow, so at most n_trials may
  run, however many parents ask at once; a trial beyond them is withdrawn.
- An enqueued trial has a ticket that names its purpose; of two with the same ticket the later is withdrawn.
- Before a dead trial is stored as failed, its parameters are stored for another attempt; any parent that sees a failed trial
  with such parameters and without a successor enqueues it.
- The outcome of a training is written into its folder before it is stored; a parent that finds another one dead reads it there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from library.options.search import SamplerName
from library.search.constraints import constraints_of
from library.search.messages import SLOTS, Outcome, Slot, read_outcome
from library.search.space import Space, Value
from library.search.study.leases import LEASE, STALE_AFTER, this_process, why_dead
from library.search.study.presence import was_stopped
from library.search.study.proposals import PROTECTED, make_pruner, make_sampler
from library.search.study.running import BASELINE, INITIAL, OF_TRIAL, Running
from library.search.study.storage import first_line, insisting
from library.search.study.trial_values import (
    ENDED,
    FAILURE,
    IMPUTED,
    INTERRUPTED,
    WITHDRAWN,
    counts,
    is_real,
    penalty,
    predicted,
)

if TYPE_CHECKING:
    import optuna

TICKET, ATTEMPT, RETRY_OF, AGAIN = "ticket", "attempt", "retry_of", "again"
SEED, PRUNED_AT = "seed", "pruned_at"
KEPT = (BASELINE, INITIAL, OF_TRIAL, SEED)
"""User attributes that the next attempt at a trial inherits."""
RETRIES = 2
CLAIMING = 10.0
"""A running trial without a lease for so many seconds is not being claimed: its parent died."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass
class Ledger:
    """A parent's access to one study; any number of threads may use it.

    Attributes:
        n_trials: of the whole study, including those of earlier and other parents.
        creates: whether new trials are proposed; otherwise only enqueued ones are trained.
        folder: trial number -> its folder, which may be on another machine.
        constraints: names of the constraints that each trial is measured by.
    """

    study: optuna.Study
    space: Space
    n_trials: int
    sampler: SamplerName
    seed: int
    folder: Callable[[int], Path]
    prunes: bool = True
    creates: bool = True
    stale_after: float = STALE_AFTER
    say: Callable[[str], None] = print
    constraints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.holder = this_process()
        self.token = uuid4().hex
        """Identifies this ledger in leases: a process may have several ledgers."""
        self.active: dict[int, Running] = {}
        """By the id in the storage."""
        self._unleased: dict[int, float] = {}
        """When a running trial was first seen without a lease, by this machine's clock: others may be wrong by hours."""
        self._lock = threading.RLock()
        self.study.pruner = make_pruner(self.prunes)

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        return self.study._storage

    def trials(self) -> list[FrozenTrial]:
        return insisting(lambda: self.study.get_trials(deepcopy=False))

    # The next trial.

    def enqueue(self, params: Mapping[str, Value], ticket: str, **attrs: Any) -> None:
        """Have `params`, a point of the space, trained before new ones are proposed; once for each ticket."""
        if reason := self.space.objection(params):
            raise ValueError(f"{ticket} {reason}")
        if all(trial.user_attrs.get(TICKET) != ticket for trial in self.trials()):
            insisting(lambda: self.study.enqueue_trial(dict(params), user_attrs={TICKET: ticket, **attrs}))

    def ask(self, worker: int = 0) -> Running | None:
        """The next trial, with this process's lease on it; None where none can start now (see `is_done`)."""
        with self._lock:
            self.reap()
            try:
                while (running := self._claim(worker)) is None:
                    if not self._waiting(self.trials()):
                        return self._create(worker) if self.creates else None
                return running
            except UpdateFinishedTrialError:  # another parent took it for dead while this process was suspended
                return None

    def is_done(self) -> bool:
        """Whether all trials of the study are done, also those of other parents."""
        trials = self.trials()
        done = sum(trial.state in DONE and counts(trial) for trial in trials)
        open_ = any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in trials)
        return done >= self.n_trials or (not self.creates and not open_)

    def is_training(self) -> bool:
        """Whether a trial is running, here or elsewhere, whose holder lives."""
        self.reap()
        return any(trial.state == TrialState.RUNNING for trial in self.trials())

    def _may_run(self, number: int, trials: list[FrozenTrial]) -> bool:
        return sum(counts(trial) for trial in trials if trial.number < number) < self.n_trials

    def _waiting(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """The waiting trials that may run."""
        return [trial for trial in trials if trial.state == TrialState.WAITING and self._may_run(trial.number, trials)]

    def _claim(self, worker: int) -> Running | None:
        """The first waiting trial that may run; None where another parent was faster or the trial was withdrawn."""
        trials = self.trials()
        waiting = self._waiting(trials)
        if not waiting:
            return None
        first = min(waiting, key=lambda trial: trial.number)
        try:
            if not self.storage.set_trial_state_values(first._trial_id, TrialState.RUNNING):
                return None
            self._set(first._trial_id, LEASE, self._lease(worker))
        except UpdateFinishedTrialError:
            return None
        fixed = dict(first.system_attrs.get("fixed_params", {}))
        ticket = first.user_attrs.get(TICKET)
        earlier = [trial for trial in trials if trial.number < first.number]
        if ticket is not None and any(trial.user_attrs.get(TICKET) == ticket for trial in earlier):
            self._withdraw(first._trial_id, f"enqueued twice ({ticket})")
            return None
        if reason := self.space.objection(fixed):
            self.say(f"trial {first.number + 1} was enqueued outside the search space and is left out: {reason}")
            self._withdraw(first._trial_id, reason)
            return None
        return self._begin(first._trial_id, worker)

    def _create(self, worker: int) -> Running | None:
        trials = self.trials()
        if not self._may_run(len(trials), trials):
            return None
        empty = create_trial(state=TrialState.RUNNING, user_attrs={LEASE: self._lease(worker)})
        trial_id = self.storage.create_new_trial(self.study._study_id, template_trial=empty)
        if not self._may_run(self.storage.get_trial(trial_id).number, self.trials()):
            self._withdraw(trial_id, "one more than n_trials: another parent asked at the same moment")
            return None
        return self._begin(trial_id, worker)

    def _lease(self, worker: int, began: float | None = None) -> dict[str, Any]:
        now = time.time()
        return {**self.holder.lease(worker, now), "began": now if began is None else began, "ledger": self.token}

    def _withdraw(self, trial_id: int, reason: str) -> None:
        self._set(trial_id, WITHDRAWN, reason)
        self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _begin(self, trial_id: int, worker: int) -> Running:
        # Samplers read a copy of all trials that Optuna keeps for each thread. Study.ask drops it in the same way.
        self.study._thread_local.cached_all_trials = None
        self.study.sampler = make_sampler(self.sampler, self.seed, self.storage.get_trial(trial_id).number)
        trial = Trial(self.study, trial_id)
        params = self.space.suggest(trial)
        attrs = dict(trial.user_attrs)
        running = Running(trial, worker, params, attrs, attrs.get(SEED, self.seed))
        self._set(trial_id, SEED, running.seed)
        self.active[trial_id] = running
        return running

    # Trials of dead parents.

    def reap(self) -> None:
        """Settle trials of dead parents: store those that ended, give up the others and enqueue them for another attempt."""
        with self._lock:
            for trial in self.trials():
                if trial.state != TrialState.RUNNING or trial._trial_id in self.active:
                    continue
                lease = trial.user_attrs.get(LEASE)
                own = "it could not be started" if (lease or {}).get("ledger") == self.token else None
                if lease is None and self._may_be_claimed(trial):
                    continue
                if reason := own or why_dead(lease, self.stale_after):
                    self._bury(trial, reason)
            self._requeue()

    def _may_be_claimed(self, trial: FrozenTrial) -> bool:
        """Whether a trial may be just being claimed: it has no lease for a moment then."""
        seen = self._unleased.setdefault(trial._trial_id, time.monotonic())
        return time.monotonic() - seen < min(CLAIMING, self.stale_after)

    def _bury(self, trial: FrozenTrial, reason: str) -> None:
        number = trial.number + 1
        try:
            left = read_outcome(self.folder(number), number)
            if left is not None and left.ending in ("done", "diverged"):
                self.say(f"trial {number}: {reason}, but its training had ended; its outcome is used")
                self._conclude(trial, left)
            elif PRUNED_AT in trial.user_attrs:
                self._conclude(trial, Outcome(number, "stopped"))
            else:
                # Without all of its parameters it had not started, which is not an attempt.
                began = len(trial.params) == len(self.space.parameters)
                stopped = was_stopped(self.study.user_attrs, trial.user_attrs.get(LEASE))
                again = self._give_up(trial, reason, is_attempt=began and not stopped, interrupted=stopped)
                fate = "it is given up" if began else "it had not started"
                what = f"interrupted ({reason})" if stopped else reason
                self.say(f"trial {number}: {what}; {'its parameters are enqueued again' if again else fate}")
        except (UpdateFinishedTrialError, ValueError):
            pass  # another parent was faster

    def _give_up(self, trial: FrozenTrial, reason: str, *, is_attempt: bool, interrupted: bool = False) -> bool:
        """Store a trial as failed or interrupted; returns whether its parameters get another attempt."""
        attempt = int(trial.user_attrs.get(ATTEMPT, 0)) + is_attempt
        params = dict(trial.params)
        if len(params) < len(self.space.parameters):
            params = dict(trial.system_attrs.get("fixed_params", {}))
        again = attempt <= RETRIES and bool(params)
        if again:
            self._set(trial._trial_id, AGAIN, {"params": params, ATTEMPT: attempt})
        if interrupted:
            self._set(trial._trial_id, INTERRUPTED, True)
        self._set(trial._trial_id, "message", reason)
        self._set(trial._trial_id, ENDED, time.time())
        self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return again

    def _requeue(self) -> None:
        """Enqueue failed trials that get another attempt and have no successor yet."""
        trials = self.trials()
        succeeded = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            again = trial.user_attrs.get(AGAIN)
            if trial.state == TrialState.FAIL and again is not None and trial.number + 1 not in succeeded:
                attrs = {name: trial.user_attrs[name] for name in KEPT if name in trial.user_attrs}
                attrs |= {RETRY_OF: trial.number + 1, ATTEMPT: again[ATTEMPT]}
                attrs[TICKET] = f"retry-{trial.number + 1}"
                insisting(lambda p=again["params"], a=attrs: self.study.enqueue_trial(p, user_attrs=a))  # type: ignore[misc]

    # A trial of this process.

    def renew(self, trial_id: int) -> None:
        """Renew the lease on a running trial, or notice that it was lost."""
        running = self.active.get(trial_id)
        if running is None:
            return
        try:
            self._set(trial_id, LEASE, self._lease_of(running))
        except UpdateFinishedTrialError:
            running.lost = True
        except Exception as error:  # the storage may work again at the next renewal
            self.say(f"trial {running.number}: its lease could not be renewed: {first_line(error)}")

    def _lease_of(self, running: Running) -> dict[str, Any]:
        return {**self._lease(running.worker, running.began), **running.progress}

    def fresh_leases(self) -> dict[int, dict[str, Any]]:
        """Of this parent's trials, as they are now and not only as they were stored."""
        return {trial_id: self._lease_of(running) for trial_id, running in tuple(self.active.items())}

    def begin_steps(self, running: Running, steps: int) -> None:
        """The trial is prepared, and its first step begins."""
        running.steps, running.since = steps, time.time()
        self.renew(running.trial._trial_id)

    def report(self, running: Running, slot: Slot) -> bool:
        """Store a slot's value; returns whether the trial goes on."""
        running.reached(slot.step, slot.images_per_second)
        self.renew(running.trial._trial_id)
        if running.lost or running.prune_at is not None:
            return False
        if not math.isfinite(slot.value):
            return True
        first_time = slot.slot not in running.slots  # else the trial is trained again with a smaller batch
        running.slots[slot.slot] = slot.value
        try:
            if first_time:
                insisting(lambda: running.trial.report(slot.value, slot.slot))
            if not insisting(running.trial.should_prune) or running.is_protected or slot.slot == SLOTS:
                return True
            if sum(is_real(trial) for trial in self.trials()) < PROTECTED:
                return True
            running.prune_at = slot.slot
            self._set(running.trial._trial_id, PRUNED_AT, slot.slot)
        except UpdateFinishedTrialError:
            running.lost = True
        return False

    def settle(self, running: Running, outcome: Outcome) -> FrozenTrial | None:
        """Store how a trial ended; None where it was lost to another parent. A failed trial gets at most two more attempts."""
        trial_id = running.trial._trial_id
        try:
            trial = self.storage.get_trial(trial_id)
            if running.lost or trial.state != TrialState.RUNNING:
                return None
            if outcome.ending in ("failed", "refused") or (outcome.ending == "stopped" and running.prune_at is None):
                interrupted = outcome.ending == "stopped"
                reason = outcome.message or ("interrupted" if interrupted else outcome.ending)
                self._give_up(trial, reason, is_attempt=outcome.ending == "failed", interrupted=interrupted)
                self._requeue()
            else:
                self._set(trial_id, "steps", running.steps or running.step)
                self._conclude(trial, outcome)
            return self.storage.get_trial(trial_id)
        except (UpdateFinishedTrialError, ValueError):
            return None
        finally:
            self.active.pop(trial_id, None)

    def _conclude(self, trial: FrozenTrial, outcome: Outcome) -> None:
        """Store a trial that ended or was pruned: its attributes before its state, after which Optuna lets nothing change."""
        trials = self.trials()
        attrs: dict[str, Any] = {"outcome": {k: v for k, v in asdict(outcome).items() if k != "components"}}
        attrs |= {"components": outcome.components, "seconds": outcome.seconds, ENDED: time.time()}
        attrs |= {name: getattr(outcome, name) for name in ("best_slot", "file", "message") if getattr(outcome, name)}
        state, value = TrialState.COMPLETE, outcome.value
        slot = trial.user_attrs.get(PRUNED_AT)
        if outcome.ending == "stopped" and slot is not None and slot in trial.intermediate_values:
            observed = trial.intermediate_values[slot]
            value = predicted(trials, slot, observed)
            attrs |= {"observed": observed, IMPUTED: value}
            if self.sampler != "gp":  # TPE ranks pruned trials itself; a Gaussian process ignores them
                state, value = TrialState.PRUNED, observed
        elif outcome.ending != "done" or value is None or not math.isfinite(value):
            value = penalty(trials)
            attrs |= {FAILURE: outcome.ending if outcome.ending != "done" else "diverged"}
        for name, content in attrs.items():
            self._set(trial._trial_id, name, _finite(content))
        self._constrain(trial._trial_id, outcome, trials)
        insisting(lambda: self.storage.set_trial_state_values(trial._trial_id, state, [value]))

    def _constrain(self, trial_id: int, outcome: Outcome, trials: list[FrozenTrial]) -> None:
        """Store the trial's constraints for samplers; without a measurement those of the worst trial, as with its value."""
        measured = constraints_of(outcome.components)
        others = [trial.constraints for trial in trials if trial.state == TrialState.COMPLETE]
        for name in self.constraints:
            if any(
                name not in other for other in others
            ):  # an older study: GPSampler needs them of all trials or of none
                continue
            value = measured.get(name, max((other[name] for other in others), default=0.0))
            # Setting it on a Trial would call the sampler again.
            attrs = create_trial(state=TrialState.RUNNING, constraints={name: value}).system_attrs
            for key, content in attrs.items():
                insisting(lambda k=key, c=content: self.storage.set_trial_system_attr(trial_id, k, c))  # type: ignore[misc]

    def _set(self, trial_id: int, name: str, value: Any) -> None:
        insisting(lambda: self.storage.set_trial_user_attr(trial_id, name, value))


def _finite(content: Any) -> Any:
    """`content` with None in place of NaN and infinity, which JSON in databases does not have."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
