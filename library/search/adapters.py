"""Files of trials on the disk: adapters of the best stay, contact sheets go to the dashboard."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from library.search.noise import BASELINES
from library.search.values import is_real, value_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from library.search.ledger import Ledger, Running

SHEET = "contact_sheet.png"
ARTIFACTS = "artifacts"


def keep_best_adapters(trials: list[FrozenTrial], folder: Path, keep: int) -> list[Path]:
    """Delete the adapters of finished trials that are not among the `keep` best; returns what went.

    Only files in `folder`, and only once enough trials are done for there to be a choice.
    """
    ended = [trial for trial in trials if trial.state.is_finished() and trial.user_attrs.get("file")]
    best = sorted(filter(is_real, ended), key=lambda trial: (value_of(trial), trial.number))[: max(keep, BASELINES)]
    kept = {Path(trial.user_attrs["file"]).resolve() for trial in best}
    gone = []
    for trial in ended:
        file = Path(trial.user_attrs["file"]).resolve()
        if file not in kept and file.is_relative_to(folder.resolve()) and file.is_file():
            with suppress(OSError):
                file.unlink()
                gone.append(file)
    return gone


def attach_sheet(running: Running, ledger: Ledger, folder: Path) -> None:
    """Give optuna-dashboard the trial's contact sheet. Before it is told: afterwards a trial takes nothing more."""
    sheet = ledger.folder(running.number) / SHEET
    if not sheet.is_file() or running.lost:
        return
    from optuna.artifacts import FileSystemArtifactStore, upload_artifact

    store = folder / ARTIFACTS
    with suppress(Exception):  # a picture in the dashboard is worth no trial
        store.mkdir(exist_ok=True)
        upload_artifact(
            artifact_store=FileSystemArtifactStore(base_path=str(store)),
            file_path=str(sheet),
            study_or_trial=running.trial,
            mimetype="image/png",
        )
