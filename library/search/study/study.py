"""Opening a study: a new one, or one that is there and was made with the same terms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from library.errors import UserError
from library.search.study.storage import (
    ATTEMPTS,
    check_storage_file,
    insisting,
    is_storage_failure,
    open_storage,
    storage_failed,
    storage_file,
)
from library.search.terms import Terms, require_same_terms

if TYPE_CHECKING:
    import optuna

TERMS = "terms"
"""User attribute of a study: `Terms.as_dict`."""


def open_study(name: str, url: str, terms: Terms, say: Callable[[str], None] = print) -> optuna.Study:
    """The study `name`, new or as it was left.

    Raises UserError, with the difference, where it was made with other terms; RunFailed where the storage fails.
    """
    optuna = _quiet_optuna()
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
        _require_own_study(study)
        if TERMS not in study.user_attrs:
            insisting(lambda: study.set_user_attr(TERMS, terms.as_dict()))
        require_same_terms(name, study.user_attrs[TERMS], terms)
        return study
    except UserError:
        raise
    except Exception as error:
        if not is_storage_failure(error):
            raise
        raise storage_failed(url, error) from error


def load_study(name: str, url: str) -> optuna.Study:
    """A study to look at. Raises UserError, with the names of those that exist, where it does not."""
    optuna = _quiet_optuna()
    storage = open_storage(url)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        existing = ", ".join(sorted(optuna.get_all_study_names(storage))) or "none"
        raise UserError(f"There is no study {name} in this storage. Its studies: {existing}.") from None


def check_study(name: str, url: str, folder: Path, terms: Callable[[], Terms]) -> None:
    """Raises UserError where a study cannot be opened or continued, or cannot use `folder`. It makes no file.

    terms: called where the study is there, for what it must have been made with.
    """
    file = storage_file(url)
    if file is not None:
        check_storage_file(file)
    study = _existing(name, url) if file is None or file.exists() else None
    if study is not None:
        _require_own_study(study)
        if TERMS in study.user_attrs:
            require_same_terms(name, study.user_attrs[TERMS], terms())
    require_own_folder(folder, name, has_trials=study is not None and bool(study.get_trials(deepcopy=False)))


def require_own_folder(folder: Path, name: str, *, has_trials: bool) -> None:
    """Raises UserError where trials lie in the output folder, but the study of that name has none."""
    if not has_trials and any(folder.glob("trial_[0-9]*")):
        raise UserError(f"{folder} has trials of another study: {name} has no trials yet. Choose another --output-dir.")


def _require_own_study(study: optuna.Study) -> None:
    if TERMS not in study.user_attrs and study.get_trials(deepcopy=False):
        raise UserError(f"The study {study.study_name} was not made by this program. Choose another --study-name.")


def _existing(name: str, url: str) -> optuna.Study | None:
    try:
        return _quiet_optuna().load_study(study_name=name, storage=open_storage(url))
    except KeyError:
        return None


def _quiet_optuna() -> ModuleType:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
