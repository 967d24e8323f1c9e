"""Which sampler proposes the next trial, with which seed, and when a running one is not worth its time any more."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from library.errors import UserError

if TYPE_CHECKING:
    import optuna

SamplerName = Literal["auto", "gp", "tpe", "random"]

GP_STARTUP, TPE_STARTUP = 8, 10
GP_WORKERS, GP_TRIALS = 4, 200
"""Up to here the Gaussian process finds more than TPE, and its 0.2 s for a proposal are nothing beside a training."""
PROTECTED = 8
"""Trials that have to be finished before the first one is pruned."""


def choose_sampler(name: SamplerName, workers: int, n_trials: int) -> tuple[SamplerName, str]:
    """The sampler that "auto" stands for, and why. Raises UserError where one was named that cannot be had."""
    lacks = [package for package in ("scipy", "torch") if find_spec(package) is None]
    if name == "gp" and lacks:
        raise UserError(
            f"The sampler gp needs {' and '.join(lacks)}: pip install {' '.join(lacks)}. tpe needs neither."
        )
    if name != "auto":
        return name, "as asked for"
    if workers > GP_WORKERS:
        return "tpe", f"more than {GP_WORKERS} workers"
    if n_trials > GP_TRIALS:
        return "tpe", f"more than {GP_TRIALS} trials"
    if lacks:
        return "tpe", f"gp, which finds more in few trials, needs {' and '.join(lacks)}, not installed"
    return "gp", "finds most in few trials"


def make_sampler(name: SamplerName, seed: int, trial: int) -> optuna.samplers.BaseSampler:
    """The sampler for one trial.

    Its seed follows from the study's and the trial's number alone: never the same twice, whoever asks and however often
    the study was interrupted, and with one worker the same in every run.
    """
    from optuna.samplers import GPSampler, RandomSampler, TPESampler

    own = int.from_bytes(hashlib.sha256(f"{seed}/{trial}".encode()).digest()[:4], "big")
    if name == "gp":
        return GPSampler(seed=own, n_startup_trials=GP_STARTUP)
    if name == "tpe":
        # Of one variable at a time: with so few trials and several choices it beats the joint estimate, Optuna 5's default.
        return TPESampler(seed=own, multivariate=False, n_startup_trials=TPE_STARTUP, constant_liar=True)
    return RandomSampler(seed=own)


def make_pruner(prunes: bool) -> optuna.pruners.BasePruner:
    """Successive halving after 20, 40 and 80 % of a trial; never Optuna's default, which prunes by the median from the start."""
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner

    return SuccessiveHalvingPruner(min_resource=2, reduction_factor=2) if prunes else NopPruner()
