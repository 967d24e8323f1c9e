"""Captions as they lie on disk: text files beside the images or in `captions/`, and metadata of many images at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.text_files import NotText, decoded, read_text

_LINE_ENDS = re.compile(r"\r\n|\r|\n")


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where there is no folder. Raises UserError where it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} could not be listed: {error.strerror or error}.") from None


def some(found: Sequence[object]) -> str:
    """The first three, and how many there are where there are more."""
    return "; ".join([*(str(one) for one in found[:3]), *([f"{len(found)} in all"] if len(found) > 3 else [])])


class CaptionFolders:
    """Where the captions of the images in one folder may lie: beside them, and in `captions/` beside `images/`."""

    def __init__(self, images: Path) -> None:
        folders = [images]
        if images.absolute().name.lower() == "images":
            folders.append(images.parent / "captions" if images.name else images.absolute().parent / "captions")
        self._folders = [(folder, set(names_in(folder))) for folder in folders]

    def find(self, stem: str, extension: str) -> Path | None:
        """The caption file of an image. `name_cx_cy_w_h`, as kohya's face cropper names them, may share that of `name`."""
        whole, *fields = stem.rsplit("_", 4)
        is_cut_out = len(fields) == 4 and all(number.isdecimal() for number in fields)
        for candidate in [stem, whole] if is_cut_out else [stem]:
            for folder, names in self._folders:
                if candidate + extension in names:
                    return folder / (candidate + extension)
        return None


@dataclass(frozen=True)
class CaptionText:
    """The lines of a caption file that say something."""

    lines: list[str]

    def caption(self, *, all_lines: bool) -> str:
        return "\n".join(self.lines if all_lines else self.lines[:1])


def read_captions(paths: Sequence[Path]) -> list[CaptionText]:
    """Read caption files. Raises UserError naming all that cannot be read and all that are not UTF-8."""
    texts, unreadable = [], []
    foreign: dict[str, list[str]] = {}
    for path in paths:
        try:
            lines = _LINE_ENDS.split(decoded(path.read_bytes()))
            texts.append(CaptionText([stripped for line in lines if (stripped := line.strip())]))
        except OSError as error:
            unreadable.append(f"{path}: {error.strerror or error}")
        except NotText as error:
            foreign.setdefault(error.what, []).append(f"{path}, line {error.line}")
    if unreadable:
        raise UserError(f"Caption files that cannot be read: {some(unreadable)}. Make them readable, or remove them.")
    if foreign:
        raise UserError(
            " ".join(
                f"Caption files that are {what}: {some(found)}. Save them as UTF-8." for what, found in foreign.items()
            )
        )
    return texts


@dataclass(frozen=True)
class MetadataEntry:
    """One image of a metadata file: its key, which is a path or a stem, and what is said about it."""

    key: str
    caption: str | None
    tags: str | None

    def joined(self, separator: str, *, all_lines: bool) -> str | None:
        """Caption and tags as kohya joins them; with all_lines, the tags after every line. None where there is neither."""
        if self.caption is None and self.tags is None:
            return None
        lines = [line.strip() for line in _LINE_ENDS.split(self.caption or "") if line.strip()] or [""]
        parts = [[line, (self.tags or "").strip()] for line in (lines if all_lines else lines[:1])]
        return "\n".join(separator.join(part for part in pair if part) for pair in parts)


def read_metadata(file: Path) -> list[MetadataEntry]:
    """Read kohya's metadata: JSON `{"<key>": {"caption": "", "tags": ""}}` or, of the name `.jsonl`, lines of
    `{"image_path": "<key>", "caption": "", "tags": ""}`. Other values of an entry, such as its size, are left alone.

    Raises UserError: not UTF-8, not JSON, another form, no entries, or an image that is there twice.
    """
    text = read_text(file)
    if file.suffix.lower() == ".jsonl":
        lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(place, _parsed(file, line, place)) for place, line in lines]
        pairs = [(place, row.get("image_path") if isinstance(row, dict) else None, row) for place, row in rows]
    else:
        content = _parsed(file, text, "") if text.strip() else {}
        if not isinstance(content, dict):
            raise UserError(f'{file} holds a {type(content).__name__}. Expected {{"image.png": {{"caption": "..."}}}}.')
        pairs = [(repr(key), key, row) for key, row in content.items()]
    if not pairs:
        raise UserError(f"{file} names no images.")
    entries: dict[str, tuple[str, MetadataEntry]] = {}
    wrong, twice = [], []
    for place, key, row in pairs:
        texts = [row.get("caption"), row.get("tags")] if isinstance(row, dict) else [0]
        if not isinstance(key, str) or not key.strip() or not all(isinstance(text, str | None) for text in texts):
            wrong.append(place)
        elif key in entries:
            twice.append(f"{key!r} in {entries[key][0]} and {place}")
        else:
            entries[key] = place, MetadataEntry(key, *texts)
    if wrong:
        raise UserError(f"{file}: entries without an image path, or whose caption or tags are no text ({some(wrong)}).")
    if twice:
        raise UserError(f"{file}: images that are there twice ({some(twice)}). Keep one entry of each.")
    return [entry for _, entry in entries.values()]


def _parsed(file: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place or f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{file} is not valid JSON ({where}: {error.msg}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({place or type(error).__name__}).") from None
