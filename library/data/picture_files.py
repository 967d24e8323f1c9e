"""The picture files that a subset names: those of its folder, or of the keys of its metadata file."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from library.data.caption_files import ByName, alike, names_in, one_form, read_metadata, some
from library.data.dataset_schema import Subset
from library.data.image_headers import endings, unread_pictures
from library.errors import UserError

MAX_ID_BYTES = 400  # LMDB keys end at 511, and stores append what they hold

_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class Found:
    """An image file that is to be looked at."""

    path: Path
    identity: str
    metadata_caption: str | None = None


def has_images(folder: Path) -> bool:
    """Whether `folder`, or `images/` in it, has pictures to train on."""
    return any(image_names(folder)) or any(image_names(folder / "images"))


def in_metadata(subset: Subset, dropped: dict[str, str]) -> list[Found]:
    assert subset.metadata_file is not None
    entries = read_metadata(subset.metadata_file)
    roots = [Path(), subset.metadata_file.parent] if subset.image_dir is None else [subset.image_dir]
    outside = [entry.key for entry in entries if not _stays_inside(entry.key, subset.image_dir)]
    if outside:
        root = subset.image_dir or subset.metadata_file.parent
        raise UserError(
            f"{subset.metadata_file} names images outside of {root} ({some(outside)}). "
            "Write paths that start in it, or leave image_dir out and write whole paths."
        )
    found, listings, keys = [], dict[Path, _Pictures](), dict[str, list[str]]()
    for entry in entries:
        path = _locate(entry.key, roots, listings)
        if path is None:
            dropped[entry.key] = "not there"
            continue
        keys.setdefault(os.path.join(os.path.realpath(path.parent), path.name), []).append(entry.key)
        caption = entry.joined(subset.caption_separator, all_lines=subset.enable_wildcard)
        if subset.image_dir is not None:
            name = os.path.relpath(path, subset.image_dir)
        else:
            name = os.path.join(os.path.dirname(entry.key), path.name)
        found.append(Found(path, _identity(subset.name, posixpath.normpath(Path(name).as_posix())), caption))
    if twice := [" and ".join(map(repr, named)) for named in keys.values() if len(named) > 1]:
        raise UserError(f"{subset.metadata_file}: images that are there twice ({some(twice)}). Keep one entry of each.")
    return found


def _stays_inside(key: str, image_dir: Path | None) -> bool:
    """Whether a key does not climb out of the folder it starts in. A whole path may be anywhere if there is no image_dir."""
    key = posixpath.normpath(key.replace("\\", "/"))
    if key.startswith("/") or _DRIVE.match(key):
        roots = [] if image_dir is None else [os.path.abspath(image_dir), os.path.realpath(image_dir)]
        return image_dir is None or any(Path(key).is_relative_to(root) for root in roots)
    return key.split("/")[0] != ".." and "\0" not in key


class _Pictures(NamedTuple):
    """Names of the pictures of a folder, by name and by stem. Of several endings the first by name."""

    names: ByName[str]
    stems: ByName[str]

    @staticmethod
    def of(folder: Path) -> _Pictures:
        names = image_names(folder)
        stems = {Path(name).stem: name for name in reversed(names)}
        return _Pictures(ByName({name: name for name in names}, alike), ByName(stems, one_form))


def _locate(key: str, roots: Sequence[Path], listings: dict[Path, _Pictures]) -> Path | None:
    """The file of a metadata key, which may lack its ending, as kohya's older tools write it."""
    for root in roots:
        for spelling in dict.fromkeys([key, key.replace("\\", "/")]):
            path = root / spelling
            if path.is_file():
                return path
            if path.parent not in listings:
                listings[path.parent] = _Pictures.of(path.parent)
            there = listings[path.parent]
            if name := there.stems.get(path.name) or there.names.get(path.name):
                return path.parent / name
    return None


def _identity(*parts: str) -> str:
    """The parts as one path; a long one as its hash and its end. 360 bytes leave room for the name of the dataset."""
    whole = posixpath.join(*parts).encode("utf-8", "backslashreplace")
    if len(whole) <= MAX_ID_BYTES - 40:
        return whole.decode()
    return f"{blake2b(whole, digest_size=16).hexdigest()}/{whole[-200:].decode('utf-8', 'ignore')}"


def image_names(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.lower().endswith(endings()) and not name.startswith(".")]


def in_folder(subset: Subset, dropped: dict[str, str], notes: list[str]) -> list[Found]:
    assert subset.image_dir is not None  # checked when the subset was made
    folder = subset.image_dir
    names = image_names(folder)
    inner = image_names(folder / "images")
    name_parts: tuple[str, ...] = (subset.name,)
    if names and inner:
        notes.append(f"{folder}/images is left out, since {folder} has images itself.")
    elif inner:
        folder, names, name_parts = folder / "images", inner, (subset.name, "images")
    if others := unread_pictures(names_in(folder), endings()):
        notes.append(f"{folder}: pictures of kinds that are not read are left out: {others}.")
    found = []
    for name in names:
        path = folder / name
        if not path.is_file():
            dropped[_printable(path)] = "not a file: " + ("a link to nothing" if path.is_symlink() else "a folder")
        elif _printable(path) != str(path):
            dropped[_printable(path)] = "with a name that is not UTF-8"
        else:
            found.append(Found(path, _identity(*name_parts, name)))
    if not found and not dropped:
        kinds = ", ".join(ending[1:] for ending in endings())
        folders = [name for name in names_in(folder) if (folder / name).is_dir()]
        hint = f" It has folders ({some(folders)}), which are not looked into: name one of them." if folders else ""
        place = f" ({subset.place})" if subset.place else ""
        unread = f" Not read are {others}." if others else ""
        raise UserError(f"{folder} has no images{place}. Read are {kinds}.{unread}{hint}")
    return found


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()
