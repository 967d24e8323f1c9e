"""Writes best_params.json: of the verdict's best trial, or of the trial that a person picked (`optimize.py pick 7`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.files import read_json
from library.options.kohya.network import DEFAULT_DIM
from library.options.scripts import option_default
from library.options.search import Script
from library.search.best_params import (
    BaseModel,
    BestParams,
    Confirmed,
    ObjectiveFacts,
    RateReference,
    TopTrial,
    read_best_params,
    write_best_params,
)
from library.search.half_batch import ACCUMULATION, BATCH, with_half_batch
from library.search.study.trial_values import is_real
from library.search.study.verdict import PICKED, Candidate, Verdict, judge
from library.search.terms import Terms
from library.search.trial_files import DETAILS_FILE, trial_folder

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from library.search.results.status import StudyView

BEST_FILE = "best_params.json"


@dataclass(frozen=True)
class Facts:
    """What is known of a study's base and data beyond its options.

    Attributes:
        dataset: fingerprint of pictures and captions.
        batch: samples per step and process, where a dataset file gives it; None where the option does.
        scales: weight of each component in the value.
    """

    base: BaseModel
    dataset: str = ""
    batch: int | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


def write_best(
    folder: Path, study: str, terms: Terms, facts: Facts, verdict: Verdict, trials: list[FrozenTrial]
) -> None:
    """Write best_params.json of the best trial, whether it is a winner or not, which the file says. folder: of the study.

    Where no trial may be the best because all broke a constraint, an earlier file is deleted.
    """
    best = verdict.best
    if best is None:
        if verdict.broke:
            (folder / BEST_FILE).unlink(missing_ok=True)
        return
    trial = next(trial for trial in trials if trial.number + 1 == best.trial)
    options = terms.space.resolve(best.params, terms.options)
    new = BestParams(
        study=study,
        base_model=facts.base,
        dataset=facts.dataset,
        objective=ObjectiveFacts(terms.objective, _components(trial), dict(facts.scales)),
        search_space=terms.space.hash,
        script=terms.script,
        **_of_trial(trial, options, terms.script, facts.batch, verdict, folder),
    )
    write_best_params(folder / BEST_FILE, new)


def pick_trial(view: StudyView, number: int, folder: Path) -> None:
    """Store a person's choice of a trial, and write best_params.json of it. folder: of the study.

    Raises UserError for a trial without a value of its own, and where the folder does not have the trial's files.
    """
    pickable = [trial.number + 1 for trial in view.trials if is_real(trial)]
    if number not in pickable:
        numbers = ", ".join(map(str, pickable)) or "none"
        raise UserError(
            f"Trial {number} cannot be picked, because it has no value of its own. Trials that have: {numbers}."
        )
    trial = next(trial for trial in view.trials if trial.number + 1 == number)
    details = trial_folder(folder, number) / DETAILS_FILE
    if not (folder / BEST_FILE).is_file() or not details.is_file():
        raise UserError(f"{folder} does not have trial {number} and {BEST_FILE}. Name the study's --output-dir.")
    old = read_best_params(folder / BEST_FILE)
    verdict, options = judge(view.trials, view.confirmed, number), read_json(details)["options"]
    new = replace(
        old,
        objective=replace(old.objective, components=_components(trial)),
        **_of_trial(trial, options, old.script, old.lr_reference.batch, verdict, folder),
    )
    view.study.set_user_attr(PICKED, number)
    write_best_params(folder / BEST_FILE, new)


def _of_trial(
    trial: FrozenTrial,
    options: Mapping[str, Any],
    script: Script,
    dataset_batch: int | None,
    verdict: Verdict,
    folder: Path,
) -> dict[str, Any]:
    """Fields of best_params.json that depend on `trial`, which is the verdict's best. folder: of the study.

    options: those that the trial started with. If they did not fit into memory, the file has those that were trained.
    """
    best = verdict.best
    assert best is not None and best.trial == trial.number + 1
    config, batch = dict(options), dataset_batch
    if trial.user_attrs.get("half_batch"):
        config = with_half_batch(options, script, trial_folder(folder, best.trial)) or config
        batch = None if batch is None else math.ceil(batch / 2)
    config["seed"] = trial.user_attrs["seed"]
    reference = rate_reference(script, config, int(trial.user_attrs.get("steps", 0)), batch)
    return {
        "created": datetime.now().isoformat(timespec="seconds"),
        "value": best.value,
        "trial": best.trial,
        "params": dict(best.params),
        "train_config": config,
        "lr_reference": replace(reference, batch=dataset_batch),
        "confirmed": _confirmed(best),
        "top5": tuple(
            TopTrial(candidate.trial, candidate.value, dict(candidate.params), _confirmed(candidate))
            for candidate in verdict.candidates[:5]
        ),
        "versions": _versions(),
        "is_winner": verdict.is_winner,
        "verdict": verdict.words,
    }


def _components(trial: FrozenTrial) -> dict[str, float]:
    components = trial.user_attrs.get("components") or {}
    return {name: value for name, value in components.items() if value is not None}


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


def _confirmed(candidate: Candidate) -> Confirmed | None:
    if not candidate.again:
        return None
    return Confirmed(candidate.mean, candidate.spread, tuple(sorted(candidate.again)))


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("optuna", "torch", "diffusers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
