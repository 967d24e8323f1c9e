"""A study as it is now, and its text for the terminal: progress, running trials, the best, alerts, the verdict."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from library.errors import UserError
from library.options.search import CONFIRMING, without_password
from library.search.messages import SLOTS
from library.search.study.convergence import ALERTS, since_best
from library.search.study.leases import LEASE, STALE_AFTER, why_dead
from library.search.study.ledger import OF_TRIAL, WITHDRAWN
from library.search.study.progress import BUDGET, Progress, progress
from library.search.study.storage import storage_file
from library.search.study.study import TERMS, load_study
from library.search.study.trial_values import FAILURE, by_end, counts
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
    """

    def __init__(self, name: str, url: str) -> None:
        """Raises UserError where there is no such study."""
        file = storage_file(url)
        if file is not None and not file.exists():
            raise UserError(
                f"There is no study {name}: {file} does not exist. Give the --study-name, --output-dir and --storage that it was "
                "started with."
            )
        self.name, self.url = name, without_password(url)
        self.study = load_study(name, url)
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

    @property
    def verdict(self) -> Verdict:
        return judge(self.trials, self.confirmed, self.study.user_attrs.get(PICKED))

    @property
    def progress(self) -> Progress:
        now = progress(self.trials, self.n_trials, self.workers, self.more)
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
    terms, progressed = view.terms, view.progress
    lines = [
        f"study      {view.name}: {terms['script']}, objective {terms['objective']}, space {terms['space_hash']}",
        f"storage    {view.url}",
        f"progress   {_bar(progressed.done, progressed.n_trials)} {progressed.line(_speed(view, now))}"
        f"{'  ended' if view.is_done else ''}",
    ]
    if view.confirmed or view.more:
        ended = sum(trial.state.is_finished() and counts(trial) for trial in view.confirmed)
        lines.append(f"confirming {ended} of {ended + view.more} trainings of the best with new seeds")
    lines += _headed("running", _running_lines(view, now))
    verdict = view.verdict
    lines += _headed("best", map(_candidate_line, verdict.candidates[:SHOWN]))
    if verdict.broke:
        lines.append(f"left out   {broke_words(verdict.broke)}")
    failed = [trial for trial in view.trials if trial.state == TrialState.FAIL or FAILURE in trial.user_attrs]
    if failed:
        reasons = ", ".join(f"trial {trial.number + 1} ({_reason(trial)})" for trial in failed[-SHOWN:])
        lines.append(
            f"failed     {len(failed)}, the last: {reasons}" if len(failed) > SHOWN else f"failed     {reasons}"
        )
    lines += _headed("alerts", _alert_lines(view))
    lines.append(f"verdict    {verdict.words}")
    return "\n".join(lines)


def broke_words(broke: Sequence[int]) -> str:
    """Which trials broke the constraint, as a sentence without its full stop."""
    trials = plural(len(broke), "trial follows", "trials follow")
    return f"{trials} prompts less than the base does and cannot be the best: {', '.join(map(str, broke))}"


def _headed(heading: str, lines: Iterable[str]) -> list[str]:
    return [f"{heading if not place else '':10} {line}" for place, line in enumerate(lines)]


def _candidate_line(candidate: Candidate) -> str:
    seeds = f" over {len(candidate.again) + 1} seeds" if candidate.again else ""
    return f"trial {candidate.trial}  {candidate.mean:+.4f}{seeds}  {shown_params(candidate.params)}"


def _bar(done: int, total: int, width: int = 20) -> str:
    full = min(width, round(width * done / max(1, total)))
    return f"[{'#' * full}{'.' * (width - full)}]"


def _speed(view: StudyView, now: float) -> float:
    """Pictures per second of all running trials whose holder lives."""
    leases = [trial.user_attrs.get(LEASE) for trial in view.running]
    living = [lease for lease in leases if lease and not why_dead(lease, STALE_AFTER, now)]
    return sum(float(lease.get("images_per_second", 0)) for lease in living)


def _running_lines(view: StudyView, now: float) -> list[str]:
    """For each running trial how far it is, its process, the age of its lease, and the time left."""
    lines = []
    for trial in view.running:
        lease = trial.user_attrs.get(LEASE)
        slot = max(trial.intermediate_values, default=0)
        what = f"confirms trial {trial.user_attrs[OF_TRIAL]}, " if OF_TRIAL in trial.user_attrs else ""
        words = [f"trial {trial.number + 1}  {what}{slot * 100 // SLOTS} %"]
        if lease is None:
            words.append("being claimed")
        else:
            if lease.get("steps"):
                words.append(f"step {lease.get('step', 0)}/{lease['steps']}")
            words.append(f"{lease['host']}:{lease['pid']} worker {lease['worker']}")
            dead = why_dead(lease, STALE_AFTER, now)
            words.append(f"DEAD: {dead}" if dead else f"lease {max(0, now - float(lease['at'])):.0f} s old")
        if slot and lease is not None and "began" in lease:
            taken = max(0.0, now - float(lease["began"]))
            words.append(f"left {timedelta(seconds=max(0, round(taken * (SLOTS - slot) / slot)))}")
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
    return str(attrs.get(FAILURE) or attrs.get("message") or attrs.get(WITHDRAWN) or "stopped").split(".")[0]
