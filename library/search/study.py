"""A study and its terms: what must stay the same for the values of its trials to be comparable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.search.jobs import ObjectiveName, Script
from library.search.space import Space, difference
from library.search.storage import ATTEMPTS, insisting, is_storage_failure, open_storage, storage_failed

if TYPE_CHECKING:
    import optuna

TERMS = "terms"

# Options that change where and how fast a trial runs, and not what it finds.
HARMLESS = frozenset(
    {
        *("device", "output_dir", "output_name", "logging_dir", "log_with", "log_every_n_steps", "cache_dir"),
        *("max_data_loader_n_workers", "persistent_data_loader_workers", "vae_batch_size", "xformers", "sdpa"),
        *("save_every_n_epochs", "save_every_n_steps"),
    }
)


@dataclass(frozen=True)
class Terms:
    """What a study searches, with what, for what.

    Attributes:
        options: of the script, fixed for all trials.
        judging: settings of the objective.
        dataset: fingerprint of pictures and captions; "" where it is not known.
    """

    script: Script
    objective: ObjectiveName
    space: Space
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42
    judging: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""

    def as_dict(self) -> dict[str, Any]:
        # As JSON gives it back, so that a tuple is not taken for a change.
        fixed = {name: value for name, value in {**self.space.options, **self.options}.items() if name not in HARMLESS}
        return json.loads(
            json.dumps(
                {
                    "script": self.script,
                    "objective": self.objective,
                    "space": self.space.as_dict(),
                    "space_hash": self.space.hash,
                    "options": fixed,
                    "judging": dict(self.judging),
                    "seed": self.seed,
                    "dataset": self.dataset,
                },
                default=str,
            )
        )


def open_study(name: str, url: str, terms: Terms, say: Callable[[str], None] = print) -> optuna.Study:
    """The study `name`, new or as it was left.

    Raises UserError where it was made with other terms, and says which; RunFailed where the storage fails.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url, say)
    try:
        study = insisting(
            lambda: optuna.create_study(
                study_name=name,
                storage=storage,
                direction="minimize",
                sampler=optuna.samplers.RandomSampler(),
                pruner=optuna.pruners.NopPruner(),
                load_if_exists=True,
            ),
            ATTEMPTS,
        )
        if TERMS not in study.user_attrs:
            if study.get_trials(deepcopy=False):
                raise UserError(f"The study {name} was not made by this program. Choose another --study-name.")
            insisting(lambda: study.set_user_attr(TERMS, terms.as_dict()))
        _compare(name, study.user_attrs[TERMS], terms.as_dict())
        return study
    except UserError:
        raise
    except Exception as error:
        if not is_storage_failure(error):
            raise
        raise storage_failed(url, error) from error


def load_study(name: str, url: str) -> optuna.Study:
    """A study that must be there, to be looked at. Raises UserError naming those that are."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        there = ", ".join(sorted(optuna.get_all_study_names(storage))) or "none"
        raise UserError(f"There is no study {name} in this storage. There: {there}.") from None


def _compare(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    advice = "Give the study what it was made with, or choose another --study-name."
    for key, words in (("script", "trains with"), ("objective", "is judged by")):
        if old[key] != new[key]:
            raise UserError(f"The study {name} {words} {old[key]}, and {new[key]} is asked for. {advice}")
    for key, words in (
        ("space", "searches another space"),
        ("options", "has other fixed options"),
        ("judging", "is judged otherwise"),
    ):
        if changes := difference(old[key], new[key]):
            raise UserError(f"The study {name} {words}: {'; '.join(changes)}. {advice}")
    if old.get("dataset") and new["dataset"] and old["dataset"] != new["dataset"]:
        raise UserError(f"The study {name} was made with other pictures or captions than there are now. {advice}")
    if old["seed"] != new["seed"]:
        raise UserError(
            f"The study {name} trains with the seed {old['seed']}, and {new['seed']} is asked for. {advice}"
        )
