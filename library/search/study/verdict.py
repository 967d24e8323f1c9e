"""How much of a difference between two trials is chance, and what may be said about the best of them in spite of it.

The default configuration is trained with three seeds; their spread is sigma. The best of many noisy values is too good by
itself (at sigma 0.06 and 50 trials by 0.095), so the best five are trained again with two new seeds each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from library.search.space import Value
from library.search.study.ledger import AGAIN, BASELINE, INITIAL, OF_TRIAL, SEED, WITHDRAWN, Ledger
from library.search.study.trial_values import breaks, is_real, may_win, value_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BASELINES = 3
CONFIRMED, NEW_SEEDS = 5, 2
SIGMAS = 2.0
"""No difference below so many sigma is called one."""
PICKED = "picked"
"""User attribute of a study: the trial a person has chosen."""


def enqueue_baselines(ledger: Ledger) -> None:
    """The default configuration with three seeds, first of all; with a smaller budget as often as that allows."""
    trials = ledger.trials()
    for number in range(min(BASELINES, ledger.n_trials)):
        same = [trial for trial in trials if trial.user_attrs.get(BASELINE) == number]
        same = [trial for trial in same if WITHDRAWN not in trial.user_attrs]
        if same and (same[-1].state != TrialState.FAIL or AGAIN in same[-1].user_attrs):
            continue
        # Whoever else enqueues it at this moment arrives at the same ticket.
        ticket = f"baseline-{number + 1}" + (f"-after-{len(same)}" if same else "")
        attrs = {BASELINE: number, SEED: ledger.seed + number}
        ledger.enqueue(ledger.space.defaults, ticket, **attrs)


def enqueue_initial(ledger: Ledger, points: Iterable[dict[str, Value]]) -> None:
    """Parameters to try right after the baselines, such as those of --init-params."""
    for number, params in enumerate(points, start=1):
        if params != ledger.space.defaults:
            ledger.enqueue(params, f"initial-{number}", **{INITIAL: number})


def top(trials: Iterable[FrozenTrial], count: int | None = CONFIRMED) -> list[FrozenTrial]:
    """The best of the trials that may win, the best first, each set of parameters once. count: None for all of them.

    The default configuration was trained several times: its mean counts, as the best of three would be luck.
    """
    trials = list(trials)
    defaults = _defaults(trials)

    def order(trial: FrozenTrial) -> tuple[float, int]:
        is_default = any(trial.params == one.params for one in defaults)
        return fmean(map(value_of, defaults)) if is_default else value_of(trial), trial.number

    found: list[FrozenTrial] = []
    for trial in sorted(filter(may_win, trials), key=order):
        if all(trial.params != other.params for other in found):
            found.append(trial)
    return found[:count]


def enqueue_confirmations(ledger: Ledger, best: Iterable[FrozenTrial], seeds: int = NEW_SEEDS) -> int:
    """Have each of `best` trained again with new seeds, in a study of its own; returns how many trials that makes."""
    count = 0
    for trial in best:
        for number in range(seeds):
            seed = ledger.seed + BASELINES + number
            attrs = {OF_TRIAL: trial.number + 1, SEED: seed}
            ledger.enqueue(trial.params, f"confirm-{trial.number + 1}-seed-{seed}", **attrs)
            count += 1
    return count


def most_confirmations(n_trials: int, best: int, seeds: int = NEW_SEEDS) -> int:
    """So many trainings `enqueue_confirmations` makes at most: the default is one of the best once."""
    return min(best, max(1, n_trials - BASELINES + 1)) * seeds


@dataclass(frozen=True)
class Candidate:
    """One of the best trials with all that was measured of its parameters.

    Attributes:
        trial: number, from 1.
        value: in the search; chosen because it was low, so it is likely lower than deserved.
        again: values with other seeds, by seed; those of the default configuration are all of its trials'.
    """

    trial: int
    value: float
    params: dict[str, Value]
    again: dict[int, float]

    @property
    def mean(self) -> float:
        """With the value of the search: in a simulation of 50 trials that ranks a little better than the new seeds alone."""
        return fmean([self.value, *self.again.values()])

    @property
    def fresh_mean(self) -> float | None:
        """Of the new seeds alone, which is what to expect."""
        return fmean(self.again.values()) if self.again else None

    @property
    def spread(self) -> float:
        return stdev([self.value, *self.again.values()]) if self.again else math.nan


@dataclass(frozen=True)
class Verdict:
    """What may be said of a study.

    Attributes:
        best: None where no trial has a value.
        candidates: the best trials, in order of their means.
        sigma: None where fewer than two values are there to tell.
        default: mean of the default configuration.
        is_winner: whether `best` beats the default configuration by more than 2 sigma, or a person picked it.
        words: in a sentence or two.
        broke: numbers of trials that ended with a value and broke a constraint, so that they cannot be the best.
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
    """Standard deviation of one value, from groups of values that should be equal; None where no group has two."""
    squares, freedom = 0.0, 0
    for group in map(list, groups):
        if len(group) > 1:
            squares += (len(group) - 1) * stdev(group) ** 2
            freedom += len(group) - 1
    return math.sqrt(squares / freedom) if freedom else None


def judge(trials: list[FrozenTrial], confirmations: Iterable[FrozenTrial] = (), picked: int | None = None) -> Verdict:
    """The verdict on a study. Confirmations are the trials of `enqueue_confirmations`; picked: a person's choice."""
    defaults = [trial.number + 1 for trial in _defaults(trials)]
    stand_in = _stand_in(_defaults(trials), picked)
    runs = _runs(trials, confirmations, stand_in)
    confirmed = {number for number, of in runs.items() if any(OF_TRIAL in one.user_attrs for one in of)}
    broke = tuple(number for number, of in runs.items() if _broke(of))
    allowed = [trial for trial in top(trials, None) if trial.number + 1 not in broke]
    chosen = [trial for place, trial in enumerate(allowed) if place < CONFIRMED or trial.number + 1 in confirmed]
    for trial in trials:
        if trial.number + 1 == picked:
            chosen = [*(one for one in chosen if one.params != trial.params), trial]
    candidates = [_candidate(runs[trial.number + 1]) for trial in chosen]
    # A value that was seen three times goes before one that was lucky once.
    candidates.sort(key=lambda one: (not one.again if confirmed else False, one.mean, one.trial))
    baselines = [] if stand_in is None else [value_of(one) for one in runs[stand_in]]
    sigma = sigma_of([baselines, *(one.again.values() for one in candidates if one.trial != stand_in)])
    default = fmean(baselines) if baselines else None
    if not candidates:
        words = "No trial has a value yet."
        if broke:
            words = f"No trial can be the best: all {len(broke)} that have a value no longer follow prompts as the base does."
        return Verdict(None, (), sigma, default, False, words, broke)
    if picked is not None:
        best = next(one for one in candidates if one.trial == picked)
        words = f"Trial {picked} was picked by a person: {best.mean:.4f}."
        words += " It follows prompts less than the base does." if picked in broke else ""
        return Verdict(best, tuple(candidates), sigma, default, True, words, broke)
    best = candidates[0]
    if best.trial in defaults:
        words = f"No winner: nothing that was tried is better than the default configuration ({default:.4f})."
        return Verdict(best, tuple(candidates), sigma, default, False, words, broke)
    is_winner, words = _words(best, candidates, sigma, default)
    if not is_winner and defaults and set(defaults) <= set(broke):
        words += " But the default follows prompts less than the base does, so it is no choice."
    return Verdict(best, tuple(candidates), sigma, default, is_winner, words, broke)


def _runs(
    trials: list[FrozenTrial], confirmations: Iterable[FrozenTrial], default: int | None
) -> dict[int, list[FrozenTrial]]:
    """By a trial's number all that was measured of its parameters, itself first. default: stands for those of the default."""
    runs = {trial.number + 1: [trial] for trial in trials if is_real(trial)}
    same = [trial.number + 1 for trial in _defaults(trials)]
    if default is not None:
        runs[default] += [runs[number][0] for number in same if number != default]
    for trial in filter(is_real, confirmations):
        of = trial.user_attrs[OF_TRIAL]
        runs.setdefault(default if default is not None and of in same else of, []).append(trial)
    return runs


def _stand_in(defaults: list[FrozenTrial], picked: int | None) -> int | None:
    """The one that stands for all of the default's trials: that which was picked, or the first that may win."""
    order = sorted(defaults, key=lambda trial: (trial.number + 1 != picked, not may_win(trial), trial.number))
    return order[0].number + 1 if order else None


def _candidate(runs: list[FrozenTrial]) -> Candidate:
    trial, *again = runs
    by_seed = {one.user_attrs[SEED]: value_of(one) for one in again}
    return Candidate(trial.number + 1, value_of(trial), dict(trial.params), by_seed)


def _broke(runs: list[FrozenTrial]) -> bool:
    """Whether a trial broke a constraint: itself, or most of it with those of its parameters with new seeds."""
    return breaks(runs[0]) or 2 * sum(map(breaks, runs)) > len(runs)


def _words(
    best: Candidate, candidates: list[Candidate], sigma: float | None, default: float | None
) -> tuple[bool, str]:
    value = best.mean if best.again else best.value
    measured = f"trial {best.trial}, {value:.4f}" + (f" over {len(best.again) + 1} seeds" if best.again else "")
    if sigma is None or default is None:
        return False, f"The best is {measured}; without a second value of the default its noise is not known."
    gain = default - value
    bar = SIGMAS * sigma
    if gain <= bar:
        return False, (
            f"No winner: the best is {measured}, and that is {gain:.4f} better than the default configuration "
            f"({default:.4f}), within {SIGMAS:g} sigma of the noise ({bar:.4f}). Keep the default, or train more trials."
        )
    close = [one.trial for one in candidates[1:] if (one.mean if one.again else one.value) - value <= bar]
    rest = f" Not told apart from it: trial {', '.join(map(str, close))}." if close else ""
    return True, (
        f"The winner is {measured}, {gain:.4f} better than the default configuration ({default:.4f}; "
        f"{SIGMAS:g} sigma of the noise are {bar:.4f}).{rest}"
    )
