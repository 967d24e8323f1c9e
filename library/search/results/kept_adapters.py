"""Deletes adapters of trials, but for those of the best."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from library.search.study.running import BASELINE, OF_TRIAL
from library.search.study.trial_values import breaks, is_real, value_of
from library.search.trial_files import adapter_file, trial_folder

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from library.search.study.verdict import Verdict


def keep_best_adapters(
    study_folder: Path,
    trials: list[FrozenTrial],
    verdict: Verdict,
    keep: int,
    confirmations: Sequence[FrozenTrial] = (),
    *,
    is_final: bool = True,
) -> None:
    """Delete the adapters of finished trials that are not among the `keep` best.

    The verdict's best is kept first, then the trials that were trained again, in its order, then the others by value.

    Args:
        confirmations: trainings of the best with new seeds. Their adapters are kept with those of their trials.
        is_final: if not, the default configuration is kept too, because it may turn out to be the best.
    """
    confirmed = {trial.user_attrs[OF_TRIAL] for trial in confirmations}
    best = [] if verdict.best is None else [verdict.best.trial]
    best += [candidate.trial for candidate in verdict.candidates if candidate.trial in confirmed]
    ranked = sorted(filter(is_real, trials), key=lambda trial: (breaks(trial), value_of(trial), trial.number))
    kept = set(list(dict.fromkeys([*best, *(trial.number + 1 for trial in ranked)]))[:keep])
    if not is_final:
        kept |= set([trial.number + 1 for trial in trials if BASELINE in trial.user_attrs and is_real(trial)][:1])

    def is_kept(trial: FrozenTrial) -> bool:
        if OF_TRIAL in trial.user_attrs:
            return is_real(trial) and trial.user_attrs[OF_TRIAL] in kept
        return trial.number + 1 in kept

    for trial in (*trials, *confirmations):
        if trial.state.is_finished() and not is_kept(trial):
            with suppress(OSError):
                adapter_of(study_folder, trial).unlink(missing_ok=True)


def adapter_of(study_folder: Path, trial: FrozenTrial) -> Path:
    """Where a trial or a confirmation writes its adapter; it need not be there."""
    number = trial.number + 1
    return adapter_file(trial_folder(study_folder, number, confirms=OF_TRIAL in trial.user_attrs), number)
