"""A person's choice of a trial, whatever the objective says of it: `optimize.py pick 7`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.search.best_params import read_best_params, write_best_params
from library.search.results.best_trial import BEST_FILE, Facts, Header, record_of
from library.search.study.trial_values import is_real
from library.search.study.verdict import PICKED, judge

if TYPE_CHECKING:
    from library.search.results.status import Look


def pick_trial(look: Look, number: int, folder: Path) -> None:
    """Store the choice, and write best_params.json anew from it and the trial's own files.

    Raises UserError for a trial without a value of its own, and where the study's folder is not here.
    """
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
    facts = Facts(best.base_model, best.dataset, best.lr_reference.batch, best.objective.scales)
    header = Header(best.study, best.script, best.objective.name, best.search_space, facts)
    verdict = judge(look.trials, look.confirmed, number)
    new = record_of(trial, read_json(details)["options"], header, verdict, folder)
    look.study.set_user_attr(PICKED, number)
    write_best_params(folder / BEST_FILE, new)
