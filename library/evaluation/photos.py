"""Photos of the subject that no training has seen, to compare pictures with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from library.data.caption_files import CaptionFolders, read_captions
from library.data.pixels import UnreadableImage, decode_rgb
from library.errors import UserError
from library.evaluation.checkpoints import Candidate

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HELD_OUT = "held_out"
"""Folder beside that of the training pictures in which held-out ones are looked for."""
LEAST = 2


@dataclass(frozen=True)
class Photo:
    name: str
    picture: Image.Image
    caption: str | None


def read_photos(folder: Path, limit: int | None = None) -> list[Photo]:
    """The pictures of a folder, those below it included, by name; captions lie beside them as .txt.

    limit: so many at most, evenly spread over them. Raises UserError where there are fewer than two, or one is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"reference_dir {folder} is no folder. Name one with held-out photos of the subject.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(files) < LEAST:
        found = "no pictures" if not files else f"one picture, {files[0].name}"
        raise UserError(f"reference_dir {folder} holds {found}; {LEAST} at least are needed to know their spread.")
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


def held_out_photos(candidates: Sequence[Candidate]) -> Path | None:
    """The folder of held-out pictures that the training of these checkpoints points to; None where it names none.

    Its val_data, where that is a folder, else a folder held_out beside its training pictures. Paths are as the training had
    them, from where it was started.
    """
    for candidate in candidates:
        options = _options_of(candidate.path)
        if (named := options.get("val_data")) and Path(named).is_dir():
            return Path(named)
        if (trained := options.get("train_data_dir")) and (Path(trained).parent / HELD_OUT).is_dir():
            return Path(trained).parent / HELD_OUT
    return None


def _options_of(path: Path) -> dict[str, Any]:
    """Of the run that saved this, from the file it heads its output with."""
    import toml

    file = path.parent / "options.toml"
    try:
        return toml.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
