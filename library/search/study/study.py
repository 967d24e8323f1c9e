"""Opening a study: a new one, or one that is there and was made with the same terms."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from library.errors import UserError
from library.search.study.storage import (
    ATTEMPTS,
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
        if TERMS not in study.user_attrs:
            if study.get_trials(deepcopy=False):
                raise UserError(f"The study {name} was not made by this program. Choose another --study-name.")
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


def compare_with_stored(name: str, url: str, terms: Terms) -> None:
    """Raises UserError where the study `name` exists and was made with other terms, as `open_study` would."""
    file = storage_file(url)
    if file is not None and not file.exists():
        return
    optuna = _quiet_optuna()
    try:
        stored = optuna.load_study(study_name=name, storage=open_storage(url)).user_attrs.get(TERMS)
    except KeyError:
        return
    if stored is not None:
        require_same_terms(name, stored, terms)


def _quiet_optuna() -> ModuleType:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
