"""Adapters of trials on the disk: those of the best stay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from library.search.study.ledger import BASELINE, OF_TRIAL
from library.search.study.trial_values import breaks, is_real, value_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from library.search.study.verdict import Verdict


def keep_best_adapters(
    folder: Path,
    trials: list[FrozenTrial],
    verdict: Verdict,
    keep: int,
    confirmations: Sequence[FrozenTrial] = (),
    *,
    is_final: bool = True,
) -> list[Path]:
    """Delete the adapters of finished trials in `folder` that are not among the `keep` best; returns what went.

    The verdict's best and those that were trained again go before others, in its order.

    Args:
        confirmations: trainings of the best with new seeds; their adapters stay with those of their trials.
        is_final: else the default configuration stays too: when all is known it may turn out to be the best.
    """
    again = {trial.user_attrs[OF_TRIAL] for trial in confirmations}
    best = [] if verdict.best is None else [verdict.best.trial]
    best += [one.trial for one in verdict.candidates if one.trial in again]
    ranked = sorted(filter(is_real, trials), key=lambda trial: (breaks(trial), value_of(trial), trial.number))
    kept = set(list(dict.fromkeys([*best, *(trial.number + 1 for trial in ranked)]))[:keep])
    if not is_final:
        kept |= set([trial.number + 1 for trial in trials if BASELINE in trial.user_attrs and is_real(trial)][:1])
    ended = [(adapter_file(folder, trial), trial.number + 1 in kept) for trial in trials if trial.state.is_finished()]
    for trial in confirmations:
        if trial.state.is_finished():
            stays = is_real(trial) and trial.user_attrs[OF_TRIAL] in kept
            ended.append((adapter_file(folder, trial), stays))
    gone = []
    for file, stays in ended:
        if not stays and file.is_file():
            with suppress(OSError):
                file.unlink()
                gone.append(file)
    return gone


def adapter_file(folder: Path, trial: FrozenTrial) -> Path:
    """Where a trial leaves its adapter, however it ended; it need not be there. folder: of the study."""
    number, kind = trial.number + 1, "confirm" if OF_TRIAL in trial.user_attrs else "trial"
    return folder / f"{kind}_{number:04d}" / f"lora_trial_{number}.safetensors"
