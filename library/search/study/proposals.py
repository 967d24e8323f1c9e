"""Which sampler proposes the next trial, with which seed, and which pruner stops trials early."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from library.errors import UserError
from library.options.search import SamplerName

if TYPE_CHECKING:
    import optuna

GP_STARTUP, TPE_STARTUP = 8, 10
GP_WORKERS, GP_TRIALS = 4, 200
"""Up to these numbers the Gaussian process finds better trials than TPE, and its 0.2 s a proposal do not matter."""
PROTECTED = 8
"""So many trials must be finished before one is pruned."""


def choose_sampler(name: SamplerName, workers: int, n_trials: int) -> tuple[SamplerName, str]:
    """The sampler to use for `name`, and why. Raises UserError where packages that it needs are not installed."""
    lacks = [package for package in ("scipy", "torch") if find_spec(package) is None]
    if name == "gp" and lacks:
        raise UserError(
            f"The sampler gp needs {' and '.join(lacks)}: pip install {' '.join(lacks)}. tpe needs neither."
        )
    if name != "auto":
        return name, "as requested"
    if workers > GP_WORKERS:
        return "tpe", f"more than {GP_WORKERS} workers"
    if n_trials > GP_TRIALS:
        return "tpe", f"more than {GP_TRIALS} trials"
    if lacks:
        return "tpe", f"gp, the best for few trials, needs {' and '.join(lacks)}, not installed"
    return "gp", "the best for few trials"


def make_sampler(name: SamplerName, seed: int, trial: int) -> optuna.samplers.BaseSampler:
    """The sampler for one trial.

    Its seed depends on the study's seed and the trial's number alone: it differs between trials whichever process asks and
    however often the study is interrupted, and with one worker a study proposes the same trials each time it is run.
    """
    from optuna.samplers import GPSampler, RandomSampler, TPESampler

    own = int.from_bytes(hashlib.sha256(f"{seed}/{trial}".encode()).digest()[:4], "big")
    if name == "gp":
        return GPSampler(seed=own, n_startup_trials=GP_STARTUP)
    if name == "tpe":
        # One variable at a time: with few trials and several choices it beats the joint estimate, Optuna 5's default.
        return TPESampler(seed=own, multivariate=False, n_startup_trials=TPE_STARTUP, constant_liar=True)
    return RandomSampler(seed=own)


def make_pruner(prunes: bool) -> optuna.pruners.BasePruner:
    """Successive halving after 20, 40 and 80 % of a trial; not Optuna's default, which prunes by the median from the start."""
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner

    return SuccessiveHalvingPruner(min_resource=2, reduction_factor=2) if prunes else NopPruner()
