"""One study as a parent of trainings sees it: which trial comes next, who is at work on it, and what it came to.

Any number of parents share a study, on one machine or several, with no lock between them and no one in charge. What keeps
them from losing or doubling a trial:

- A trial is created with its lease in it, in one transaction; a waiting one is claimed by an atomic change of state.
- A trial may run if fewer than n_trials that count have smaller numbers. Numbers only grow, so that holds for at most
  n_trials whoever asks at once; one too many withdraws.
- What is enqueued carries a ticket that follows from what it is for; of two with the same ticket the later withdraws.
- A dead trial's intent to be tried again is written before it is told as failed; whoever sees a failed trial with that
  intent and no successor enqueues one.
- How a training ended is written into its folder before it is told, and read there by whoever finds its parent dead.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from library.search.constraints import constraints_of
from library.search.messages import SLOTS, Outcome, Slot
from library.search.outcomes import read_outcome
from library.search.space import Space, Value
from library.search.study.leases import LEASE, STALE_AFTER, this_process, why_dead
from library.search.study.proposals import PROTECTED, SamplerName, make_pruner, make_sampler
from library.search.study.storage import first_line, insisting
from library.search.study.trial_values import ENDED, FAILURE, IMPUTED, counts, is_real, penalty, predicted

if TYPE_CHECKING:
    import optuna

TICKET, ATTEMPT, RETRY_OF, AGAIN, WITHDRAWN = "ticket", "attempt", "retry_of", "again", "withdrawn"
SEED, PRUNED_AT, BASELINE, INITIAL, OF_TRIAL = "seed", "pruned_at", "baseline", "initial", "of_trial"
KEPT = (BASELINE, INITIAL, OF_TRIAL, SEED)
"""User attributes that a trial's next attempt inherits."""
RETRIES = 2
CLAIMING = 10.0
"""Seconds after which nobody is taken to be claiming a trial any more."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass
class Running:
    """A trial that this process holds the lease of.

    Attributes:
        number: from 1, of the trial and its folder.
        seed: of the training.
        lost: others took the trial over while this process was suspended.
        prune_at: slot after which it was found not worth going on.
        began: when it was claimed, in seconds since the epoch by this machine's clock.
    """

    trial: Trial
    worker: int
    params: dict[str, Value]
    attrs: Mapping[str, Any]
    seed: int
    lost: bool = False
    prune_at: int | None = None
    slots: dict[int, float] = field(default_factory=dict)
    step: int = 0
    steps: int = 0
    images_per_second: float = 0.0
    began: float = field(default_factory=time.time)

    @property
    def number(self) -> int:
        return self.trial.number + 1

    @property
    def is_protected(self) -> bool:
        """Baselines and initial parameters are not pruned: the study is to end no worse than them."""
        return bool({BASELINE, INITIAL, OF_TRIAL} & self.attrs.keys())


@dataclass
class Ledger:
    """
    Attributes:
        n_trials: of the whole study, with those of earlier and other parents.
        creates: whether new trials are proposed; otherwise there are only those enqueued.
        folder: of trial N, which may not exist here.
        constraints: names of those that each trial is measured by.
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
        """Of this ledger; a process may have several."""
        self.active: dict[int, Running] = {}
        """By the storage's id."""
        self._unleased: dict[int, float] = {}
        """When a running trial was first seen without a lease, by this machine's clock alone: others' may be off by hours."""
        self._lock = threading.RLock()
        self.study.pruner = make_pruner(self.prunes)

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        return self.study._storage

    def trials(self) -> list[FrozenTrial]:
        return insisting(lambda: self.study.get_trials(deepcopy=False))

    # What comes next.

    def enqueue(self, params: Mapping[str, Value], ticket: str, **attrs: Any) -> None:
        """Have `params` tried before anything is proposed, once for each ticket. They must be in the space."""
        if reason := self.space.objection(params):
            raise ValueError(f"{ticket} {reason}")
        if all(trial.user_attrs.get(TICKET) != ticket for trial in self.trials()):
            insisting(lambda: self.study.enqueue_trial(dict(params), user_attrs={TICKET: ticket, **attrs}))

    def ask(self, worker: int = 0) -> Running | None:
        """The next trial, with this process's lease on it; None where there is none to begin now (see `is_done`)."""
        with self._lock:
            self.reap()
            try:
                while (running := self._claim(worker)) is None:
                    if not self._has_waiting():
                        return self._create(worker) if self.creates else None
                return running
            except UpdateFinishedTrialError:  # others took it for dead while this process was suspended
                return None

    def is_done(self) -> bool:
        """Whether all trials of the study are done, here and elsewhere."""
        trials = self.trials()
        done = sum(trial.state in DONE and counts(trial) for trial in trials)
        open_ = any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in trials)
        return done >= self.n_trials or (not self.creates and not open_)

    def is_anyone_at_work(self) -> bool:
        """Whether a trial is under way, here or elsewhere, whose holder lives."""
        self.reap()
        return any(trial.state == TrialState.RUNNING for trial in self.trials())

    def _may_run(self, number: int, trials: list[FrozenTrial]) -> bool:
        return sum(counts(trial) for trial in trials if trial.number < number) < self.n_trials

    def _has_waiting(self) -> bool:
        trials = self.trials()
        return any(trial.state == TrialState.WAITING and self._may_run(trial.number, trials) for trial in trials)

    def _claim(self, worker: int) -> Running | None:
        """The first waiting trial that may run; None where another parent was faster or it had to be withdrawn."""
        trials = self.trials()
        waiting = [one for one in trials if one.state == TrialState.WAITING and self._may_run(one.number, trials)]
        if not waiting:
            return None
        first = min(waiting, key=lambda one: one.number)
        try:
            if not self.storage.set_trial_state_values(first._trial_id, TrialState.RUNNING):
                return None
            self._set(first._trial_id, LEASE, self._lease(worker))
        except UpdateFinishedTrialError:
            return None
        fixed = dict(first.system_attrs.get("fixed_params", {}))
        ticket = first.user_attrs.get(TICKET)
        earlier = [one for one in trials if one.number < first.number and TICKET in one.user_attrs]
        if ticket is not None and any(one.user_attrs[TICKET] == ticket for one in earlier):
            self._withdraw(first._trial_id, f"enqueued twice ({ticket})")
            return None
        if reason := self.space.objection(fixed):
            self.say(
                f"trial {first.number + 1} was enqueued with what is outside the search space and is left out: {reason}"
            )
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
            self._withdraw(trial_id, "one more than n_trials: others asked at the same moment")
            return None
        return self._begin(trial_id, worker)

    def _lease(self, worker: int, began: float | None = None) -> dict[str, Any]:
        now = time.time()
        return {**self.holder.lease(worker, now), "began": now if began is None else began, "ledger": self.token}

    def _withdraw(self, trial_id: int, reason: str) -> None:
        self._set(trial_id, WITHDRAWN, reason)
        self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _begin(self, trial_id: int, worker: int) -> Running:
        # Samplers look at a copy of all trials that is kept for each thread; Study.ask forgets it likewise.
        self.study._thread_local.cached_all_trials = None
        self.study.sampler = make_sampler(self.sampler, self.seed, self.storage.get_trial(trial_id).number)
        trial = Trial(self.study, trial_id)
        params = self.space.suggest(trial)
        attrs = dict(trial.user_attrs)
        running = Running(trial, worker, params, attrs, attrs.get(SEED, self.seed))
        self._set(trial_id, SEED, running.seed)
        self.active[trial_id] = running
        return running

    # The dead.

    def reap(self) -> None:
        """Settle what dead parents left: tell what ended, give up the rest, and enqueue again what is to be tried again."""
        with self._lock:
            for trial in self.trials():
                if trial.state != TrialState.RUNNING or trial._trial_id in self.active:
                    continue
                lease = trial.user_attrs.get(LEASE)
                own = "asking for it failed half-way" if (lease or {}).get("ledger") == self.token else None
                if lease is None and self._may_be_claimed(trial):
                    continue
                if reason := own or why_dead(lease, self.stale_after):
                    self._bury(trial, reason)
            self._requeue()

    def _may_be_claimed(self, trial: FrozenTrial) -> bool:
        """A claimed trial is without a lease for a moment."""
        seen = self._unleased.setdefault(trial._trial_id, time.monotonic())
        return time.monotonic() - seen < min(CLAIMING, self.stale_after)

    def _bury(self, trial: FrozenTrial, reason: str) -> None:
        number = trial.number + 1
        try:
            left = read_outcome(self.folder(number), number)
            if left is not None and left.ending in ("done", "diverged"):
                self.say(f"trial {number}: {reason}, but it had ended; its outcome is taken")
                self._conclude(trial, left)
            elif PRUNED_AT in trial.user_attrs:
                self._conclude(trial, Outcome(number, "stopped"))
            else:
                # Dying before all parameters were there is no attempt.
                began = len(trial.params) == len(self.space.parameters)
                again = self._give_up(trial, reason, is_attempt=began)
                fate = "given up" if began else "it had not begun"
                self.say(f"trial {number}: {reason}; {'its parameters wait to be tried again' if again else fate}")
        except (UpdateFinishedTrialError, ValueError):
            pass  # another parent was faster

    def _give_up(self, trial: FrozenTrial, reason: str, *, is_attempt: bool) -> bool:
        """Tell a trial as failed; returns whether its parameters are going to be tried again."""
        attempt = int(trial.user_attrs.get(ATTEMPT, 0)) + is_attempt
        params = dict(trial.params)
        if len(params) < len(self.space.parameters):
            params = dict(trial.system_attrs.get("fixed_params", {}))
        again = attempt <= RETRIES and bool(params)
        if again:
            self._set(trial._trial_id, AGAIN, {"params": params, ATTEMPT: attempt})
        self._set(trial._trial_id, "message", reason)
        self._set(trial._trial_id, ENDED, time.time())
        self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return again

    def _requeue(self) -> None:
        """Enqueue what failed, is to be tried again, and has no successor."""
        trials = self.trials()
        succeeded = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            again = trial.user_attrs.get(AGAIN)
            if trial.state == TrialState.FAIL and again is not None and trial.number + 1 not in succeeded:
                attrs = {name: trial.user_attrs[name] for name in KEPT if name in trial.user_attrs}
                attrs |= {RETRY_OF: trial.number + 1, ATTEMPT: again[ATTEMPT]}
                attrs[TICKET] = f"retry-{trial.number + 1}"
                insisting(lambda p=again["params"], a=attrs: self.study.enqueue_trial(p, user_attrs=a))  # type: ignore[misc]

    # A trial's life.

    def renew(self, trial_id: int) -> None:
        """Renew the lease on a running trial; finds out here too that it was lost."""
        running = self.active.get(trial_id)
        if running is None:
            return
        try:
            now = {"step": running.step, "steps": running.steps, "images_per_second": running.images_per_second}
            self._set(trial_id, LEASE, {**self._lease(running.worker, running.began), **now})
        except UpdateFinishedTrialError:
            running.lost = True
        except Exception as error:  # the storage may be back at the next beat
            self.say(f"trial {running.number}: its lease could not be renewed: {first_line(error)}")

    def report(self, running: Running, slot: Slot) -> bool:
        """Record a slot's value; returns whether the trial is worth going on."""
        running.step, running.images_per_second = slot.step, slot.images_per_second
        if running.lost or running.prune_at is not None:
            return False
        if not math.isfinite(slot.value):
            return True
        first_time = slot.slot not in running.slots  # not so where a trial runs again with a smaller batch
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
        """Tell how a trial ended; None where it was lost to another parent. A failure is tried again, twice at most."""
        trial_id = running.trial._trial_id
        try:
            trial = self.storage.get_trial(trial_id)
            if running.lost or trial.state != TrialState.RUNNING:
                return None
            if outcome.ending in ("failed", "refused") or (outcome.ending == "stopped" and running.prune_at is None):
                self._give_up(trial, outcome.message or outcome.ending, is_attempt=outcome.ending == "failed")
                self._requeue()
            else:
                self._set(trial_id, "steps", running.steps or running.step)
                self._conclude(trial, outcome)
            return self.storage.get_trial(trial_id)
        except (UpdateFinishedTrialError, ValueError):
            return None
        finally:
            self.active.pop(trial_id, None)

    def give_back(self, running: Running, reason: str) -> None:
        """Return a trial that was stopped through no fault of its own; somebody will begin it anew."""
        self.settle(running, Outcome(running.number, "stopped", reason))

    def _conclude(self, trial: FrozenTrial, outcome: Outcome) -> None:
        """Tell a trial that ended by itself or was pruned, its facts first: afterwards it cannot be changed."""
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
            if self.sampler != "gp":  # TPE ranks pruned trials by itself, a Gaussian process does not see them
                state, value = TrialState.PRUNED, observed
        elif outcome.ending != "done" or value is None or not math.isfinite(value):
            value = penalty(trials)
            attrs |= {FAILURE: outcome.ending if outcome.ending != "done" else "diverged"}
        for name, content in attrs.items():
            self._set(trial._trial_id, name, _finite(content))
        self._constrain(trial._trial_id, outcome, trials)
        insisting(lambda: self.storage.set_trial_state_values(trial._trial_id, state, [value]))

    def _constrain(self, trial_id: int, outcome: Outcome, trials: list[FrozenTrial]) -> None:
        """Tell samplers how a trial kept its constraints; without a measurement as badly as the worst did, as with its value."""
        measured = constraints_of(outcome.components)
        others = [trial.constraints for trial in trials if trial.state == TrialState.COMPLETE]
        for name in self.constraints:
            if any(name not in other for other in others):  # begun before there were any: GPSampler takes all or none
                continue
            value = measured.get(name, max((other[name] for other in others), default=0.0))
            # A Trial would ask the sampler once more before it took it.
            attrs = create_trial(state=TrialState.RUNNING, constraints={name: value}).system_attrs
            for key, content in attrs.items():
                insisting(lambda k=key, c=content: self.storage.set_trial_system_attr(trial_id, k, c))  # type: ignore[misc]

    def _set(self, trial_id: int, name: str, value: Any) -> None:
        insisting(lambda: self.storage.set_trial_user_attr(trial_id, name, value))


def _finite(content: Any) -> Any:
    """JSON of databases has no NaN."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
