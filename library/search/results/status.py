"""What a study is doing, for the terminal: progress, the best, who is at work on what, convergence."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from library.errors import UserError
from library.search.messages import SLOTS
from library.search.study.convergence import ALERTS, since_best
from library.search.study.leases import LEASE, STALE_AFTER, why_dead
from library.search.study.ledger import SEED
from library.search.study.progress import BUDGET, Progress, progress
from library.search.study.storage import storage_file, without_password
from library.search.study.study import CONFIRMING, TERMS, load_study
from library.search.study.trial_values import FAILURE, by_end, counts
from library.search.study.verdict import PICKED, Verdict, judge

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

SHOWN = 5


class Look:
    """A study as it is now, read only.

    Attributes:
        confirmed: trials of the best with new seeds.
        more: trainings of the best that are still to come or under way; until they are enqueued, at most so many.
        has_ended: whether it ended by itself since it was last begun, be it before n_trials.
    """

    def __init__(self, name: str, url: str) -> None:
        """Raises UserError where there is no such study."""
        file = storage_file(url)
        if file is not None and not file.exists():
            raise UserError(
                f"There is no study {name}: {file} does not exist. Give the --study-name, --output-dir and --storage that it was "
                "begun with."
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
        self.judging = dict(self.terms["judging"])

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
        return [one for one in (*self.trials, *self.confirmed) if one.state == TrialState.RUNNING]

    @property
    def is_done(self) -> bool:
        return (self.has_ended or self.progress.done >= self.n_trials) and not self.running and self.more == 0


def _confirmations(study: optuna.Study, name: str) -> list[FrozenTrial]:
    import optuna

    try:
        again = optuna.load_study(study_name=f"{name}{CONFIRMING}", storage=study._storage)
    except KeyError:
        return []
    return again.get_trials(deepcopy=False)


def status_text(look: Look, now: float | None = None) -> str:
    """Everything worth a line."""
    now = time.time() if now is None else now
    terms, progressed = look.terms, look.progress
    lines = [
        f"study      {look.name}: {terms['script']}, objective {terms['objective']}, space {terms['space_hash']}",
        f"storage    {look.url}",
        f"progress   {bar(progressed.done, progressed.n_trials)} {progressed.line(speed(look, now))}"
        f"{'  ended' if look.is_done else ''}",
    ]
    if look.confirmed or look.more:
        ended = sum(trial.state.is_finished() and counts(trial) for trial in look.confirmed)
        lines.append(f"again      {ended} of {ended + look.more} trainings of the best with new seeds")
    lines += [f"{'running' if not place else '':10} {line}" for place, line in enumerate(running_lines(look, now))]
    verdict = look.verdict
    lines += [
        f"{'best' if not place else '':10} trial {one.trial}  {one.mean:+.4f}"
        f"{f' over {len(one.again) + 1} seeds' if one.again else ''}  {shown_params(one.params)}"
        for place, one in enumerate(verdict.candidates[:SHOWN])
    ]
    if verdict.broke:
        lines.append(f"left out   {broke_words(verdict.broke)}")
    failed = [trial for trial in look.trials if trial.state == TrialState.FAIL or FAILURE in trial.user_attrs]
    if failed:
        reasons = ", ".join(f"{one.number + 1} ({_reason(one)})" for one in failed[-SHOWN:])
        lines.append(f"failed     {len(failed)}, the last: trial {reasons}")
    lines += [f"{'told' if not n else '':10} {line}" for n, line in enumerate(convergence_lines(look))]
    lines.append(f"verdict    {verdict.words}")
    return "\n".join(lines)


def broke_words(broke: Sequence[int]) -> str:
    """Which trials broke the constraint, in a sentence."""
    numbers = ", ".join(map(str, broke))
    if len(broke) == 1:
        return f"1 trial follows prompts less than the base does and cannot be the best: {numbers}"
    return f"{len(broke)} trials follow prompts less than the base does and cannot be the best: {numbers}"


def bar(done: int, total: int, width: int = 20) -> str:
    full = min(width, round(width * done / max(1, total)))
    return f"[{'#' * full}{'.' * (width - full)}]"


def speed(look: Look, now: float) -> float:
    """Pictures per second of all running trials whose holder lives."""
    leases = [trial.user_attrs.get(LEASE) for trial in look.running]
    return sum(float(one.get("images_per_second", 0)) for one in leases if one and not why_dead(one, STALE_AFTER, now))


def running_lines(look: Look, now: float) -> list[str]:
    """Each running trial: how far, on which machine, when its holder was last heard of, and when it will end."""
    lines = []
    for trial in look.running:
        lease = trial.user_attrs.get(LEASE)
        slot = max(trial.intermediate_values, default=0)
        what = "again, " if trial in look.confirmed else ""
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


def convergence_lines(look: Look) -> list[str]:
    done = by_end(trial for trial in look.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED))
    lines = [f"{level}: {one['words']} ({one['at']})" for level, one in look.alerts.items()]
    return lines or [f"nothing yet; the best came {since_best(done)} trials ago"] if done else []


def shown_params(params: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def _reason(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    return str(attrs.get(FAILURE) or attrs.get("message") or attrs.get("withdrawn") or "stopped").split(".")[0]


def folder_of(trial: FrozenTrial, look: Look, output_dir: Path) -> Path:
    kind = "confirm" if trial in look.confirmed else "trial"
    return output_dir / f"{kind}_{trial.number + 1:04d}"


def seed_of(trial: FrozenTrial) -> int | None:
    return trial.user_attrs.get(SEED)
