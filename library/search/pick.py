"""A person's choice of a trial, whatever the objective says of it: `optimize.py pick 7`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.search.best_params import ObjectiveFacts, read_best_params, write_best_params
from library.search.noise import PICKED, judge
from library.search.record import BEST_FILE
from library.search.values import is_real, value_of

if TYPE_CHECKING:
    from library.search.status import Look


def pick_trial(look: Look, number: int, folder: Path) -> None:
    """Store the choice, and write best_params.json anew from it and the trial's own files.

    Raises UserError for a trial without a value of its own, and where the study's folder is not here.
    """
    import dataclasses

    from library.files import read_json

    there = [trial.number + 1 for trial in look.trials if is_real(trial)]
    if number not in there:
        known = ", ".join(map(str, there)) or "none"
        raise UserError(f"Trial {number} cannot be picked: it did not end with a value of its own. These did: {known}.")
    trial = next(one for one in look.trials if one.number + 1 == number)
    details = folder / f"trial_{number:04d}" / "trial.json"
    if not (folder / BEST_FILE).is_file() or not details.is_file():
        raise UserError(f"{folder} does not hold trial {number} and best_params.json. Name the study's --output-dir.")
    best = read_best_params(folder / BEST_FILE)
    content = read_json(details)
    config = {**content["options"], "seed": content["seed"]}
    reference = dataclasses.replace(
        best.lr_reference,
        alpha=float(config.get("network_alpha") or 1.0),
        dim=int(config.get("network_dim") or 4),
        effective_batch=_batch(best.lr_reference.effective_batch, best.train_config, config),
        steps=int(trial.user_attrs.get("steps", 0)),
    )
    verdict = judge(look.trials, look.confirmed, number)
    assert verdict.best is not None
    again = next((one.confirmed for one in best.top5 if one.trial == number), None)
    new = dataclasses.replace(
        best,
        created=datetime.now().isoformat(timespec="seconds"),
        objective=ObjectiveFacts(
            best.objective.name, dict(trial.user_attrs.get("components") or {}), best.objective.scales
        ),
        value=value_of(trial),
        trial=number,
        params=dict(trial.params),
        train_config=config,
        lr_reference=reference,
        confirmed=again,
    )
    look.study.set_user_attr(PICKED, number)
    write_best_params(folder / BEST_FILE, new)


def _batch(before: int, old: dict[str, object], new: dict[str, object]) -> int:
    """Pictures per step of the new options, from those of the old ones."""
    name = "gradient_accumulation_steps"
    return before // int(str(old.get(name) or 1)) * int(str(new.get(name) or 1))
