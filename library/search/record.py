"""What a study found, as best_params.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.search.best_params import (
    BaseModel,
    BestParams,
    Confirmed,
    ObjectiveFacts,
    RateReference,
    write_best_params,
)
from library.search.best_params import Candidate as BestCandidate
from library.search.memory import ACCUMULATION, BATCH
from library.search.noise import Candidate, Verdict
from library.search.space_file import option_default
from library.search.study import Terms

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEST_FILE = "best_params.json"


@dataclass(frozen=True)
class Facts:
    """What a study knows of its base and data beyond options.

    Attributes:
        dataset: fingerprint of pictures and captions.
        batch: samples per step and process, where a dataset file says it; None where the option does.
    """

    base: BaseModel
    dataset: str = ""
    batch: int | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


def write_best(
    folder: Path, study: str, terms: Terms, facts: Facts, verdict: Verdict, trials: list[FrozenTrial]
) -> Path | None:
    """Write best_params.json anew; None where no trial has a value yet.

    It has the best trial's parameters whether it is a winner or not; `optimize.py` says which.
    """
    best = verdict.best
    if best is None:
        return None
    trial = next(one for one in trials if one.number + 1 == best.trial)
    config = {**terms.space.resolve(best.params, terms.options), "seed": trial.user_attrs["seed"]}
    batch = facts.batch or int(config.get(BATCH) or option_default(terms.script, BATCH))
    record = BestParams(
        created=datetime.now().isoformat(timespec="seconds"),
        study=study,
        base_model=facts.base,
        dataset=facts.dataset,
        objective=ObjectiveFacts(terms.objective, dict(trial.user_attrs.get("components") or {}), dict(facts.scales)),
        value=best.value,
        trial=best.trial,
        params=dict(best.params),
        train_config=config,
        lr_reference=RateReference(
            alpha=float(config.get("network_alpha") or 1.0),
            dim=int(config.get("network_dim") or 4),
            effective_batch=batch * int(config.get(ACCUMULATION) or 1),
            steps=int(trial.user_attrs.get("steps", 0)),
        ),
        search_space=terms.space.hash,
        script=terms.script,
        confirmed=_confirmed(best),
        top5=tuple(
            BestCandidate(one.trial, one.value, dict(one.params), _confirmed(one)) for one in verdict.candidates[:5]
        ),
        versions=_versions(),
    )
    write_best_params(folder / BEST_FILE, record)
    return folder / BEST_FILE


def _confirmed(one: Candidate) -> Confirmed | None:
    return Confirmed(one.mean, one.spread, tuple(sorted(one.again))) if one.again else None


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {}
    for package in ("optuna", "torch", "diffusers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
