"""A study as it is now, and its text for the terminal: progress, running trials, the best, alerts, the verdict."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from library.errors import UserError
from library.options.search import CONFIRMING, without_password
from library.search.lines import headed
from library.search.study.convergence import ALERTS, since_best
from library.search.study.leases import STALE_AFTER, why_dead
from library.search.study.ledger import RETRY_OF
from library.search.study.pace import Leases, lease_of, pace_of
from library.search.study.presence import parents, was_stopped
from library.search.study.progress import BUDGET, Progress, progress
from library.search.study.running import OF_TRIAL
from library.search.study.storage import storage_file
from library.search.study.study import TERMS, load_study
from library.search.study.trial_values import FAILURE, INTERRUPTED, by_end, counts, has_failed
from library.search.study.verdict import PICKED, Candidate, Verdict, judge
from library.words import plural

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

SHOWN = 5


class StudyView:
    """A study as it is now, read only.

    Attributes:
        confirmed: trainings of the best with new seeds.
        more: trainings of the best that are waiting or running; until they are enqueued, how many there may be at most.
        has_ended: whether it has ended since its last start, perhaps before n_trials.
        command: what starts it again; "" where it is not known.
        fresh: leases that are newer than the stored ones.
    """

    def __init__(self, name: str, url: str, study: optuna.Study | None = None, fresh: Leases | None = None) -> None:
        """study: where it is open already. Raises UserError where there is no such study."""
        file = storage_file(url)
        if file is not None and not file.exists():
            raise UserError(
                f"There is no study {name}: {file} does not exist. Give the --study-name, --output-dir and --storage that it was "
                "started with."
            )
        self.name, self.url = name, without_password(url)
        self.study = load_study(name, url) if study is None else study
        self.fresh = fresh
        self.terms: Mapping[str, Any] = self.study.user_attrs.get(TERMS, {})
        if not self.terms:
            raise UserError(f"The study {name} was not made by this program.")
        self.trials = self.study.get_trials(deepcopy=False)
        self.confirmed = _confirmations(self.study, name)
        budget = self.study.user_attrs.get(BUDGET, {})
        self.n_trials = int(budget.get("n_trials") or max(1, sum(map(counts, self.trials))))
        self.workers = int(budget.get("workers", 1))
        self.more = int(budget.get("more", 0)) + sum(not trial.state.is_finished() for trial in self.confirmed)
        self.has_ended = bool(budget.get("ended"))
        self.command = str(budget.get("command", ""))

    @property
    def verdict(self) -> Verdict:
        return judge(self.trials, self.confirmed, self.study.user_attrs.get(PICKED))

    @property
    def progress(self) -> Progress:
        now = progress(self.trials, self.n_trials, self.workers, self.more, fresh=self.fresh)
        return replace(now, seconds_left=None) if self.has_ended and not self.running else now

    @property
    def alerts(self) -> dict[str, Any]:
        return dict(self.study.user_attrs.get(ALERTS, {}))

    @property
    def running(self) -> list[FrozenTrial]:
        return [trial for trial in (*self.trials, *self.confirmed) if trial.state == TrialState.RUNNING]

    @property
    def is_done(self) -> bool:
        return (self.has_ended or self.progress.done >= self.n_trials) and not self.running and self.more == 0

    def is_worked_on(self, now: float) -> bool:
        """Whether a process that lives trains a trial of it, or is between two."""
        leases = [lease_of(trial, self.fresh) for trial in self.running]
        living = any(lease is None or not why_dead(lease, STALE_AFTER, now) for lease in leases)
        return living or parents(self.study.user_attrs, STALE_AFTER, now) > 0


def _confirmations(study: optuna.Study, name: str) -> list[FrozenTrial]:
    import optuna

    try:
        confirming = optuna.load_study(study_name=f"{name}{CONFIRMING}", storage=study._storage)
    except KeyError:
        return []
    return confirming.get_trials(deepcopy=False)


def status_text(view: StudyView, now: float | None = None) -> str:
    """The lines of `optimize.py status`. now: seconds since the epoch, the clock's by default."""
    now = time.time() if now is None else now
    terms = view.terms
    lines = [
        f"study      {view.name}: {terms['script']}, objective {terms['objective']}, space {terms['space_hash']}",
        f"storage    {view.url}",
        *now_lines(view, now),
        *_idle_lines(view, now),
    ]
    return "\n".join(lines)


def now_lines(view: StudyView, now: float, shown: int = SHOWN) -> list[str]:
    """What changes of a study: progress, running trials, the best, what went wrong, alerts and the verdict.

    shown: at most so many of the best and of those that failed.
    """
    progressed, verdict = view.progress, view.verdict
    if not view.is_done and not view.is_worked_on(now):
        progressed = replace(progressed, seconds_left=None)
    lines = [
        f"progress   {_bar(progressed.done, progressed.n_trials)} {progressed.line(_speed(view, now))}"
        f"{'  ended' if view.is_done else ''}"
    ]
    if view.confirmed or view.more:
        ended = sum(trial.state.is_finished() and counts(trial) for trial in view.confirmed)
        lines.append(f"confirming {ended} of {ended + view.more} trainings of the best with new seeds")
    lines += headed("running", _running_lines(view, now))
    lines += headed("best", map(_candidate_line, verdict.candidates[:shown]))
    if verdict.broke:
        lines.append(f"left out   {broke_words(verdict.broke)}")
    if interrupted := _interrupted(view):
        lines += headed("stopped", [f"interrupted, and trained again from the start: {', '.join(interrupted)}"])
    failed = [trial for trial in view.trials if has_failed(trial)]
    if failed:
        reasons = ", ".join(f"trial {trial.number + 1} ({_reason(trial)})" for trial in failed[-shown:])
        lines.append(
            f"failed     {len(failed)}, the last: {reasons}" if len(failed) > shown else f"failed     {reasons}"
        )
    lines += headed("alerts", _alert_lines(view))
    lines.append(f"verdict    {verdict.words}")
    return lines


def _idle_lines(view: StudyView, now: float) -> list[str]:
    """That nobody works on a study that has not ended, and how to go on."""
    if view.is_done or view.is_worked_on(now):
        return []
    how = f"To go on: {view.command}" if view.command else "To go on, run the command that started it again."
    return headed("nobody", [f"works on this study now. {how}"])


def _interrupted(view: StudyView) -> list[str]:
    """Trials that somebody stopped and whose parameters still wait or run."""
    found = []
    for trials in (view.trials, view.confirmed):
        after = {trial.user_attrs.get(RETRY_OF): trial for trial in trials}
        for trial in trials:
            again = after.get(trial.number + 1)
            if INTERRUPTED in trial.user_attrs and (again is None or not again.state.is_finished()):
                words = f" as trial {again.number + 1}" if again is not None else ""
                found.append(f"trial {trial.number + 1}{words}")
    return found


def broke_words(broke: Sequence[int]) -> str:
    """Which trials broke the constraint, as a sentence without its full stop."""
    trials = plural(len(broke), "trial follows", "trials follow")
    return f"{trials} prompts less than the base does and cannot be the best: {', '.join(map(str, broke))}"


def _candidate_line(candidate: Candidate) -> str:
    seeds = f" over {len(candidate.again) + 1} seeds" if candidate.again else ""
    return f"trial {candidate.trial}  {candidate.mean:+.4f}{seeds}  {shown_params(candidate.params)}"


def _bar(done: int, total: int, width: int = 20) -> str:
    full = min(width, round(width * done / max(1, total)))
    return f"[{'#' * full}{'.' * (width - full)}]"


def _speed(view: StudyView, now: float) -> float:
    """Pictures per second of all running trials whose holder lives."""
    leases = [lease_of(trial, view.fresh) for trial in view.running]
    living = [lease for lease in leases if lease and not why_dead(lease, STALE_AFTER, now)]
    return sum(float(lease.get("images_per_second", 0)) for lease in living)


def _running_lines(view: StudyView, now: float) -> list[str]:
    """For each running trial how far it is, its process, the age of its lease, and the time left."""
    lines = []
    for trial in view.running:
        lease = lease_of(trial, view.fresh)
        pace = pace_of(trial, lease, now)
        what = f"confirms trial {trial.user_attrs[OF_TRIAL]}, " if OF_TRIAL in trial.user_attrs else ""
        words = [f"trial {trial.number + 1}  {what}{pace.share * 100:.0f} %"]
        dead = None if lease is None else why_dead(lease, STALE_AFTER, now)
        if lease is None:
            words.append("being claimed")
        else:
            steps = f"step {lease.get('step', 0)}/{lease['steps']}" if lease.get("steps") else "preparing"
            words += [steps, f"{lease['host']}:{lease['pid']} worker {lease['worker']}"]
            if dead:
                why = "interrupted" if was_stopped(view.study.user_attrs, lease) else "DEAD"
                words.append(f"{why}: {dead}")
            elif trial._trial_id not in (view.fresh or {}):
                words.append(f"lease {max(0, now - float(lease['at'])):.0f} s old")
            if "began" in lease and not dead:
                words.append(f"for {timedelta(seconds=round(max(0.0, now - float(lease['began']))))}")
        if pace.left is not None and not dead:
            words.append(f"left {timedelta(seconds=round(pace.left))}")
        lines.append("  ".join(words))
    return lines


def _alert_lines(view: StudyView) -> list[str]:
    done = by_end(trial for trial in view.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED))
    lines = [f"{level}: {alert['words']} ({alert['at']})" for level, alert in view.alerts.items()]
    since = plural(since_best(done), "trial")
    return lines or [f"none yet; the best trial ended {since} ago"] if done else []


def shown_params(params: Mapping[str, Any], separator: str = "  ") -> str:
    return separator.join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def _reason(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    return str(attrs.get(FAILURE) or attrs.get("message") or "for an unknown reason").split(". ")[0].rstrip(".")
