"""Pictures for optuna-dashboard, stored with optuna.artifacts in output_dir/artifacts.

A trial that was judged by pictures gets its pictures before it is finished, because Optuna lets nothing be added afterwards.
The rows of the contact sheet, which is drawn after all trials, belong to the study.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from library.errors import UserError
from library.files import whole_file
from library.search.trial_files import EVALUATIONS, slot_folder

if TYPE_CHECKING:
    from optuna.artifacts import FileSystemArtifactStore
    from optuna.study import Study

    from library.search.messages import Outcome
    from library.search.study.running import Running

ARTIFACTS, SHEET = "artifacts", "contact_sheet.png"
SIDE = 256
"""Longest side of a picture on a sheet, in pixels."""

Say = Callable[[str], None]


def attach_pictures(running: Running, outcome: Outcome, trial_folder: Path, folder: Path, say: Say) -> None:
    """Attach the pictures of its best slot to a trial, before its result is stored. folder: of the study."""
    slot = slot_folder(trial_folder, outcome.best_slot or 0)
    if running.lost or not slot.is_dir():
        return
    with _failure_is_a_message(f"trial {running.number}: its pictures are not in the dashboard", say):
        from optuna.artifacts import upload_artifact

        # Named subject_00.png, subject_01.png, ..., unrelated_00.png.
        files = sorted(slot.glob("*_[0-9][0-9].png"))
        rows = [list(row) for _, row in groupby(files, lambda file: file.stem.rpartition("_")[0])]
        if rows:
            sheet = _write_sheet(rows, trial_folder / EVALUATIONS / SHEET, say)
            upload_artifact(
                artifact_store=_store(folder), file_path=str(sheet), study_or_trial=running.trial, mimetype="image/png"
            )


def attach_rows(study: Study, rows: Mapping[str, Sequence[Path]], folder: Path, say: Say) -> None:
    """Attach a sheet of each row of pictures, given by name, to the study, unless it has that sheet. folder: of the study."""
    with _failure_is_a_message("The contact sheet is not in the dashboard", say):
        from optuna.artifacts import upload_artifact

        store = _store(folder)
        known = set(_known(study, folder / ARTIFACTS))
        for name, files in rows.items():
            sheet = _write_sheet([files], files[0].parent / f"{name.replace(' ', '_')}.png", say)
            if (sheet.name, sheet.read_bytes()) not in known:
                upload_artifact(artifact_store=store, file_path=str(sheet), study_or_trial=study, mimetype="image/png")


def _store(folder: Path) -> FileSystemArtifactStore:
    from optuna.artifacts import FileSystemArtifactStore

    (folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(base_path=str(folder / ARTIFACTS))


def _known(study: Study, store: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a study's artifacts on this machine. One that was removed in the dashboard left a null."""
    from optuna.artifacts._upload import ARTIFACTS_ATTR_PREFIX

    for key, content in study._storage.get_study_system_attrs(study._study_id).items():
        meta = json.loads(content) if key.startswith(ARTIFACTS_ATTR_PREFIX) else None
        if meta is not None and (file := store / meta["artifact_id"]).is_file():
            yield meta["filename"], file.read_bytes()


def _write_sheet(rows: Sequence[Sequence[Path]], path: Path, say: Say) -> Path:
    from library.inference.grids import grid

    columns = max(map(len, rows))
    pictures: list[Image.Image] = []
    for row in rows:
        pictures += [_small(file) for file in row]
        pictures += [Image.new("RGB", pictures[0].size, "white")] * (columns - len(row))
    with whole_file(path) as temporary:
        grid(pictures, columns, say=say).save(temporary, format="PNG")
    return path


def _small(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    return picture


@contextmanager
def _failure_is_a_message(words: str, say: Say) -> Iterator[None]:
    """Any error within the context becomes a line in the log: a missing picture must not end a study."""
    try:
        yield
    except Exception as error:
        what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        say(f"{words}: {what}{(str(error).splitlines() or [''])[0]}")
