"""What a study found, as best_params.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.options.kohya_network import DEFAULT_DIM
from library.search.best_params import (
    BaseModel,
    BestParams,
    Confirmed,
    ObjectiveFacts,
    RateReference,
    write_best_params,
)
from library.search.best_params import Candidate as BestCandidate
from library.search.half_batch import ACCUMULATION, BATCH, with_half_batch
from library.search.messages import Script
from library.search.space_file import option_default
from library.search.study.study import Terms
from library.search.study.verdict import Candidate, Verdict

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEST_FILE = "best_params.json"


@dataclass(frozen=True)
class Facts:
    """What a study knows of its base and data beyond options.

    Attributes:
        dataset: fingerprint of pictures and captions.
        batch: samples per step and process, where a dataset file says it; None where the option does.
        scales: of each component that the value is a sum of.
    """

    base: BaseModel
    dataset: str = ""
    batch: int | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """What all trials of a study have in common, for `record_of`.

    Attributes:
        search_space: its hash.
    """

    study: str
    script: Script
    objective: str
    search_space: str
    facts: Facts


def write_best(
    folder: Path, study: str, terms: Terms, facts: Facts, verdict: Verdict, trials: list[FrozenTrial]
) -> Path | None:
    """Write best_params.json anew; None where no trial has a value yet.

    It has the best trial's parameters whether it is a winner or not, and says which. What it had of one that turned out to
    break a constraint goes.
    """
    best = verdict.best
    if best is None:
        if verdict.broke:
            (folder / BEST_FILE).unlink(missing_ok=True)
        return None
    trial = next(one for one in trials if one.number + 1 == best.trial)
    header = Header(study, terms.script, terms.objective, terms.space.hash, facts)
    options = terms.space.resolve(best.params, terms.options)
    write_best_params(folder / BEST_FILE, record_of(trial, options, header, verdict, folder))
    return folder / BEST_FILE


def record_of(
    trial: FrozenTrial, options: Mapping[str, Any], header: Header, verdict: Verdict, folder: Path
) -> BestParams:
    """What best_params.json says of `trial`, which is the verdict's best.

    options: that it was begun with; where these did not fit into memory, the record has those that were trained.
    folder: of the study.
    """
    best, facts = verdict.best, header.facts
    assert best is not None and best.trial == trial.number + 1
    config, batch = dict(options), facts.batch
    if trial.user_attrs.get("half_batch"):
        config = with_half_batch(options, header.script, folder / f"trial_{best.trial:04d}") or config
        batch = None if batch is None else math.ceil(batch / 2)
    config["seed"] = trial.user_attrs["seed"]
    reference = rate_reference(header.script, config, int(trial.user_attrs.get("steps", 0)), batch)
    components = {
        name: value for name, value in (trial.user_attrs.get("components") or {}).items() if value is not None
    }
    return BestParams(
        created=datetime.now().isoformat(timespec="seconds"),
        study=header.study,
        base_model=facts.base,
        dataset=facts.dataset,
        objective=ObjectiveFacts(header.objective, components, dict(facts.scales)),
        value=best.value,
        trial=best.trial,
        params=dict(best.params),
        train_config=config,
        lr_reference=replace(reference, batch=facts.batch),
        search_space=header.search_space,
        script=header.script,
        confirmed=_confirmed(best),
        top5=tuple(
            BestCandidate(one.trial, one.value, dict(one.params), _confirmed(one)) for one in verdict.candidates[:5]
        ),
        versions=_versions(),
        is_winner=verdict.is_winner,
        verdict=verdict.words,
    )


def rate_reference(script: Script, config: Mapping[str, Any], steps: int, batch: int | None = None) -> RateReference:
    """What the learning rate of `config` was found with. batch: see `Facts`."""

    def value(name: str) -> Any:
        given = config.get(name)
        return option_default(script, name) if given is None else given

    dim = int(value("network_dim") or DEFAULT_DIM)
    return RateReference(
        alpha=float(value("network_alpha") or dim),  # 0 is the rank
        dim=dim,
        effective_batch=(batch or int(value(BATCH))) * int(value(ACCUMULATION)),
        steps=steps,
    )


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
