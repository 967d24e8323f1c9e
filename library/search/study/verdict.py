"""How much two trials differ by chance, and what a study may therefore conclude about its best.

The default configuration is trained with three seeds; the spread of its values is sigma. The best of many noisy values is too
good by chance (by 0.095 at sigma 0.06 and 50 trials), so the best five are trained again with two new seeds each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from library.search.space import Value
from library.search.study.ledger import AGAIN, SEED, WITHDRAWN, Ledger
from library.search.study.running import BASELINE, INITIAL, OF_TRIAL
from library.search.study.trial_values import breaks, is_real, may_win, value_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BASELINES = 3
CONFIRMED, NEW_SEEDS = 5, 2
SIGMAS = 2.0
"""A difference of at most this many sigma may be chance."""
PICKED = "picked"
"""User attribute of a study: the trial that a person has chosen."""


def enqueue_baselines(ledger: Ledger) -> None:
    """Enqueue the default configuration with three seeds, or as many as the budget allows. A call once done does nothing."""
    trials = ledger.trials()
    for number in range(min(BASELINES, ledger.n_trials)):
        same = [trial for trial in trials if trial.user_attrs.get(BASELINE) == number]
        same = [trial for trial in same if WITHDRAWN not in trial.user_attrs]
        if same and (same[-1].state != TrialState.FAIL or AGAIN in same[-1].user_attrs):
            continue
        # Another parent that enqueues it at this moment uses the same ticket.
        ticket = f"baseline-{number + 1}" + (f"-after-{len(same)}" if same else "")
        attrs = {BASELINE: number, SEED: ledger.seed + number}
        ledger.enqueue(ledger.space.defaults, ticket, **attrs)


def enqueue_initial(ledger: Ledger, points: Iterable[dict[str, Value]]) -> None:
    """Enqueue parameters to try right after the baselines, such as those of --init-params."""
    for number, params in enumerate(points, start=1):
        if params != ledger.space.defaults:
            ledger.enqueue(params, f"initial-{number}", **{INITIAL: number})


def top(trials: Iterable[FrozenTrial], count: int | None = CONFIRMED) -> list[FrozenTrial]:
    """The best of the trials that may win, best first, each set of parameters once. count: None for all of them.

    The default configuration was trained several times and counts with its mean: the best of its values would be luck.
    """
    trials = list(trials)
    defaults = _defaults(trials)

    def order(trial: FrozenTrial) -> tuple[float, int]:
        is_default = any(trial.params == default.params for default in defaults)
        return fmean(map(value_of, defaults)) if is_default else value_of(trial), trial.number

    found: list[FrozenTrial] = []
    for trial in sorted(filter(may_win, trials), key=order):
        if all(trial.params != other.params for other in found):
            found.append(trial)
    return found[:count]


def enqueue_confirmations(ledger: Ledger, best: Iterable[FrozenTrial], seeds: int = NEW_SEEDS) -> int:
    """Enqueue each of `best` with new seeds, in a study of their own (see CONFIRMING); the number of these trainings."""
    count = 0
    for trial in best:
        for number in range(seeds):
            seed = ledger.seed + BASELINES + number
            attrs = {OF_TRIAL: trial.number + 1, SEED: seed}
            ledger.enqueue(trial.params, f"confirm-{trial.number + 1}-seed-{seed}", **attrs)
            count += 1
    return count


def most_confirmations(n_trials: int, best: int, seeds: int = NEW_SEEDS) -> int:
    """How many trainings `enqueue_confirmations` makes at most: the default configuration is one of the best only once."""
    return min(best, max(1, n_trials - BASELINES + 1)) * seeds


@dataclass(frozen=True)
class Candidate:
    """One of the best trials, with all values that were measured of its parameters.

    Attributes:
        trial: number, from 1.
        value: in the search. It was chosen because it was low, so it is probably too low.
        again: values with other seeds, by seed; for the default configuration those of all its other trials.
    """

    trial: int
    value: float
    params: dict[str, Value]
    again: dict[int, float]

    @property
    def mean(self) -> float:
        """Over all values. In a simulation of 50 trials it ranks slightly better than the mean of the new seeds alone."""
        return fmean([self.value, *self.again.values()])

    @property
    def fresh_mean(self) -> float | None:
        """Over the new seeds alone: the value to expect."""
        return fmean(self.again.values()) if self.again else None

    @property
    def spread(self) -> float:
        return stdev([self.value, *self.again.values()]) if self.again else math.nan


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a study.

    Attributes:
        best: None where no trial has a value.
        candidates: the best trials, in the order of their means.
        sigma: standard deviation between seeds; None where no parameters have two values.
        default: mean of the default configuration; None where it has no value.
        is_winner: whether `best` beats the default configuration by more than 2 sigma, or a person picked it.
        words: the conclusion, in a sentence or two.
        broke: numbers of trials that have a value but broke a constraint, so that they cannot be the best.
    """

    best: Candidate | None
    candidates: tuple[Candidate, ...]
    sigma: float | None
    default: float | None
    is_winner: bool
    words: str
    broke: tuple[int, ...] = ()


def _defaults(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of the default configuration that have a value."""
    return [trial for trial in trials if BASELINE in trial.user_attrs and is_real(trial)]


def sigma_of(groups: Iterable[Iterable[float]]) -> float | None:
    """Pooled standard deviation of groups of values that differ by their seeds alone; None where no group has two values."""
    squares, freedom = 0.0, 0
    for group in map(list, groups):
        if len(group) > 1:
            squares += (len(group) - 1) * stdev(group) ** 2
            freedom += len(group) - 1
    return math.sqrt(squares / freedom) if freedom else None


def judge(trials: list[FrozenTrial], confirmations: Iterable[FrozenTrial] = (), picked: int | None = None) -> Verdict:
    """The verdict on a study. confirmations: the trials of `enqueue_confirmations`. picked: the trial that a person chose."""
    defaults = [trial.number + 1 for trial in _defaults(trials)]
    stand_in = _stand_in(_defaults(trials), picked)
    runs = _runs(trials, confirmations, stand_in)
    confirmed = {number for number, group in runs.items() if any(OF_TRIAL in run.user_attrs for run in group)}
    broke = tuple(number for number, group in runs.items() if _broke(group))
    allowed = [trial for trial in top(trials, None) if trial.number + 1 not in broke]
    chosen = [trial for place, trial in enumerate(allowed) if place < CONFIRMED or trial.number + 1 in confirmed]
    for trial in trials:
        if trial.number + 1 == picked:
            chosen = [*(other for other in chosen if other.params != trial.params), trial]
    candidates = [_candidate(runs[trial.number + 1]) for trial in chosen]
    # Three values are better evidence than one lucky one, so candidates that were confirmed come first.
    candidates.sort(key=lambda found: (not found.again if confirmed else False, found.mean, found.trial))
    baselines = [] if stand_in is None else [value_of(run) for run in runs[stand_in]]
    sigma = sigma_of([baselines, *(found.again.values() for found in candidates if found.trial != stand_in)])
    default = fmean(baselines) if baselines else None
    if not candidates:
        words = "No trial has a value yet."
        if broke:
            words = f"No trial can be the best: all {len(broke)} with a value follow prompts less than the base does."
        return Verdict(None, (), sigma, default, False, words, broke)
    best = candidates[0]
    if picked is not None:
        best = next(found for found in candidates if found.trial == picked)
        words = f"Trial {picked} was picked by a person: {best.mean:.4f}."
        words += " It follows prompts less than the base does." if picked in broke else ""
        is_winner = True
    elif best.trial in defaults:
        words = f"No winner: no trial is better than the default configuration ({default:.4f})."
        is_winner = False
    else:
        is_winner, words = _compared(best, candidates, sigma, default)
        if not is_winner and defaults and set(defaults) <= set(broke):
            words += " But the default follows prompts less than the base does, so do not use it."
    return Verdict(best, tuple(candidates), sigma, default, is_winner, words, broke)


def _runs(
    trials: list[FrozenTrial], confirmations: Iterable[FrozenTrial], default: int | None
) -> dict[int, list[FrozenTrial]]:
    """Trial number -> all trainings of its parameters, its own first. default: the trial that has all of the default's."""
    runs = {trial.number + 1: [trial] for trial in trials if is_real(trial)}
    same = [trial.number + 1 for trial in _defaults(trials)]
    if default is not None:
        runs[default] += [runs[number][0] for number in same if number != default]
    for trial in filter(is_real, confirmations):
        confirmed = trial.user_attrs[OF_TRIAL]
        runs.setdefault(default if default is not None and confirmed in same else confirmed, []).append(trial)
    return runs


def _stand_in(defaults: list[FrozenTrial], picked: int | None) -> int | None:
    """The trial that stands for all of the default configuration's: the picked one, else the first that may win."""
    order = sorted(defaults, key=lambda trial: (trial.number + 1 != picked, not may_win(trial), trial.number))
    return order[0].number + 1 if order else None


def _candidate(runs: list[FrozenTrial]) -> Candidate:
    trial, *again = runs
    by_seed = {run.user_attrs[SEED]: value_of(run) for run in again}
    return Candidate(trial.number + 1, value_of(trial), dict(trial.params), by_seed)


def _broke(runs: list[FrozenTrial]) -> bool:
    """Whether a trial broke a constraint: in its own training, or in most trainings of its parameters."""
    return breaks(runs[0]) or 2 * sum(map(breaks, runs)) > len(runs)


def _compared(
    best: Candidate, candidates: list[Candidate], sigma: float | None, default: float | None
) -> tuple[bool, str]:
    """Whether `best` wins over the default configuration, and why."""
    value = best.mean if best.again else best.value
    measured = f"trial {best.trial}, {value:.4f}" + (f" over {len(best.again) + 1} seeds" if best.again else "")
    if sigma is None or default is None:
        return (
            False,
            f"The best is {measured}. Its noise is unknown: that takes two values of the default configuration.",
        )
    gain = default - value
    bar = SIGMAS * sigma
    if gain <= bar:
        return False, (
            f"No winner: the best is {measured}, which is {gain:.4f} better than the default configuration ({default:.4f}) and "
            f"within {SIGMAS:g} sigma of the noise ({bar:.4f}). Keep the default, or train more trials."
        )
    close = [found.trial for found in candidates[1:] if (found.mean if found.again else found.value) - value <= bar]
    trials = f"{'trial' if len(close) == 1 else 'trials'} {', '.join(map(str, close))}"
    rest = f" Within the noise of it: {trials}." if close else ""
    return True, (
        f"The winner is {measured}, {gain:.4f} better than the default configuration ({default:.4f}; "
        f"{SIGMAS:g} sigma of the noise are {bar:.4f}).{rest}"
    )
