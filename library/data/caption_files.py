"""Captions as they lie on disk: text files beside the images or in `captions/`, and metadata of many images at once."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

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


def one_form(text: str) -> str:
    """The text in one of the forms in which Unicode writes it: macOS splits letters from accents, others do not."""
    return unicodedata.normalize("NFC", text)


def alike(name: str, ending: str | None = None) -> str:
    """What a file name shares with those that differ only in Unicode form or in the case of the ending (default: its own)."""
    name = one_form(name)
    cut = len(name) - len(os.path.splitext(name)[1] if ending is None else one_form(ending))
    return name[:cut] + name[cut:].lower()


T = TypeVar("T")


class ByName(Generic[T]):
    """Values by file name, found by the very name, else by what is the same for names that differ only in spelling."""

    def __init__(self, values: Mapping[str, T], same: Callable[[str], str]) -> None:
        self._values, self._same = values, same
        self._spelled_otherwise = {same(name): values[name] for name in sorted(values, reverse=True)}

    def get(self, name: str) -> T | None:
        return self._values[name] if name in self._values else self._spelled_otherwise.get(self._same(name))


class CaptionFolders:
    """Where the captions of the images in one folder may lie: beside them, and in `captions/` beside `images/`."""

    def __init__(self, images: Path) -> None:
        folders = [images]
        if images.absolute().name.lower() == "images":
            folders.append(images.parent / "captions" if images.name else images.absolute().parent / "captions")
        self._folders = [{name: folder / name for name in names_in(folder)} for folder in folders]
        self._by_ending: dict[str, list[ByName[Path]]] = {}

    def find(self, stem: str, extension: str) -> Path | None:
        """The caption file of an image. `name_cx_cy_w_h`, as kohya's face cropper names them, may share that of `name`."""
        whole, *fields = stem.rsplit("_", 4)
        is_cut_out = len(fields) == 4 and all(number.isdecimal() for number in fields)
        if extension not in self._by_ending:
            same = partial(alike, ending=extension)
            self._by_ending[extension] = [ByName(files, same) for files in self._folders]
        for candidate in [stem, whole] if is_cut_out else [stem]:
            for files in self._by_ending[extension]:
                if (file := files.get(candidate + extension)) is not None:
                    return file
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

    Raises UserError: not UTF-8, not JSON, another form, no entries, or a key, caption or tags that are there twice.
    """
    text = read_text(file)
    content: Any = None
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
    wrong, twice = [], [repr(key) for key in content.twice] if isinstance(content, _Repeating) else []
    for place, key, row in pairs:
        if isinstance(row, _Repeating):
            fields = [name for name in row.twice if name in ("image_path", "caption", "tags")]
            twice += [f"the {name} of {place}" for name in fields]
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


class _Repeating(dict[str, Any]):
    """An object whose text has some keys twice; a dict keeps the last of each."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    kept = dict(pairs)
    return kept if len(kept) == len(pairs) else _Repeating(pairs)


def _parsed(file: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = place or f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{file} is not valid JSON ({where}: {error.msg}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({place or type(error).__name__}).") from None
