"""A study and its terms: what must stay the same for the values of its trials to be comparable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.search.messages import OWN, ObjectiveName, Script
from library.search.space import Space, difference
from library.search.study.storage import (
    ATTEMPTS,
    insisting,
    is_storage_failure,
    open_storage,
    storage_failed,
    storage_file,
)

if TYPE_CHECKING:
    import optuna

TERMS = "terms"
CONFIRMING = "-confirm"
"""Name of the study that trains the best of another one again: that one's name, and this."""

# Options that change where and how fast a trial runs, and not what it finds; and those that trials decide themselves.
HARMLESS = OWN | {
    *("device", "log_with", "log_every_n_steps", "cache_dir"),
    *("max_data_loader_n_workers", "persistent_data_loader_workers", "vae_batch_size", "xformers", "sdpa"),
}


@dataclass(frozen=True)
class Terms:
    """What a study searches, with what, for what.

    Attributes:
        options: of the script, fixed for all trials.
        judging: settings of the objective.
        dataset: fingerprint of pictures and captions.
        settings: fingerprint of what dataset files say of them; where it is known, the file's path does not count.
        base: hash of the base's weights. These three are "" where they are not known, and then not compared.
    """

    script: Script
    objective: ObjectiveName
    space: Space
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42
    judging: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""
    settings: str = ""
    base: str = ""

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
                    "settings": self.settings,
                    "base": self.base,
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
        _compare(name, study.user_attrs[TERMS], terms)
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


def compare_with_stored(name: str, url: str, terms: Terms) -> None:
    """Raises UserError where the study `name` is there already and was made with other terms, as `open_study` would."""
    import optuna

    file = storage_file(url)
    if file is not None and not file.exists():
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url)
    try:
        stored = optuna.load_study(study_name=name, storage=storage).user_attrs.get(TERMS)
    except KeyError:
        return
    if stored is not None:
        _compare(name, stored, terms)


def _compare(name: str, old: Mapping[str, Any], terms: Terms) -> None:
    advice = "Give the study what it was made with, or choose another --study-name."
    new = terms.as_dict()
    for key, words in (("script", "trains with"), ("objective", "is judged by")):
        if old[key] != new[key]:
            raise UserError(f"The study {name} {words} {old[key]}, and {new[key]} is asked for. {advice}")
    knows_settings = bool(old.get("settings") and terms.settings)
    ignored = HARMLESS | terms.space.overruled | ({"dataset_config"} if knows_settings else set())
    for key, words in (
        ("space", "searches another space"),
        ("options", "has other fixed options"),
        ("judging", "is judged otherwise"),
    ):
        before, now = old[key], new[key]
        if key == "options":
            before, now = ({k: v for k, v in one.items() if k not in ignored} for one in (before, now))
        if changes := difference(before, now):
            raise UserError(f"The study {name} {words}: {'; '.join(changes)}. {advice}")
    for key, words in (
        ("dataset", "other pictures or captions than there are now"),
        ("settings", "other settings of its datasets than there are now (such as resolution, batch, repeats, folders)"),
        ("base", "other weights of the base than lie under its name now"),
    ):
        if old.get(key) and new[key] and old[key] != new[key]:
            raise UserError(f"The study {name} was made with {words}. {advice}")
    if old["seed"] != new["seed"]:
        raise UserError(
            f"The study {name} trains with the seed {old['seed']}, and {new['seed']} is asked for. {advice}"
        )
