"""Held-out photos of the subject, which generated pictures are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from library.data.caption_files import CaptionFolders, read_captions
from library.data.pixels import UnreadableImage, decode_rgb
from library.data.sources import EXTENSIONS
from library.errors import UserError
from library.evaluation.candidates import Candidate

HELD_OUT = "held_out"
"""Name of a folder of held-out photos beside that of the training pictures."""
LEAST = 2


@dataclass(frozen=True)
class Photo:
    """name: with the folders that it lies in."""

    name: str
    picture: Image.Image
    caption: str | None

    @property
    def label(self) -> str:
        """The folder that it lies in, which says of whom it is where there are several."""
        return str(Path(self.name).parent)


def read_photos(folder: Path, limit: int | None = None) -> list[Photo]:
    """The pictures in a folder and below it, sorted by name, with captions from the .txt files beside them.

    limit: at most so many, evenly spread. Raises UserError where there are fewer than two, or one is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"reference_dir {folder} is no folder. Name one with held-out photos of the subject.")
    files = picture_files(folder)
    if len(files) < LEAST:
        found = "no pictures" if not files else f"one picture, {files[0].name}"
        raise UserError(
            f"reference_dir {folder} holds {found}; at least {LEAST} are needed to estimate their variance."
        )
    if limit is not None and len(files) > limit:
        files = [files[i * len(files) // limit] for i in range(limit)]
    folders = {parent: CaptionFolders(parent) for parent in {file.parent for file in files}}
    photos = []
    for file in files:
        try:
            picture = decode_rgb(file, name=str(file))
        except UnreadableImage as error:
            raise UserError(f"{error}. Remove it from reference_dir, or replace it.") from None
        beside = folders[file.parent].find(file.stem, ".txt")
        caption = None if beside is None else read_captions([beside])[0].caption(all_lines=False)
        photos.append(Photo(file.relative_to(folder).as_posix(), picture, caption or None))
    return photos


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and below it, sorted by name."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())


def held_out_photos(candidates: Sequence[Candidate]) -> Path | None:
    """The folder of held-out photos of the training of these checkpoints; None where there is none.

    Its val_data, where that is a folder, else a folder held_out beside its training pictures. Relative paths are taken from the
    current folder, as in the training.
    """
    for candidate in candidates:
        options = options_of_run(candidate.path)
        if (named := options.get("val_data")) and Path(named).is_dir():
            return Path(named)
        if (trained := options.get("train_data_dir")) and (Path(trained).parent / HELD_OUT).is_dir():
            return Path(trained).parent / HELD_OUT
    return None


def options_of_run(path: Path) -> dict[str, Any]:
    """The options of the run that saved this checkpoint, from the options.toml beside it; empty where there is none."""
    import toml

    file = path.parent / "options.toml"
    try:
        return toml.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
