"""From a dataset file, kohya's folders or a metadata file to datasets whose every value is settled.

A value is looked for in the subset, then in its dataset, in [general], on the command line, and last in the defaults.
Nothing here opens an image; see library/data/training_images.py.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from library.data.buckets import Buckets
from library.data.caption_files import names_in, some
from library.data.dataset_schema import (
    CLI_NAMES,
    DATASET_KEYS,
    SUBSET_KEYS,
    Dataset,
    Document,
    Subset,
    check_given,
    read_document,
)
from library.data.image_headers import endings, unread_pictures
from library.data.picture_files import has_images
from library.errors import UserError

__all__ = ["Dataset", "Subset", "dataset_from_metadata", "datasets_from_folders", "read_dataset_config"]

_CLI_NAMES = {key: option for option, key in CLI_NAMES.items() if key not in ("caption_extension",)}
ID_PREFIX = "id_prefix"
"""Of custom_attributes: what ids start with instead. An export has it, so that the study's pictures are held out."""
_TEXTS = ("class_tokens", "keep_tokens_separator", "secondary_separator", "caption_prefix", "caption_suffix")
_CLASS_FOLDER = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)


@dataclass(frozen=True)
class _Level:
    """Values of the right types, and where each of them was written."""

    values: Mapping[str, Any]
    place: Callable[[str], str]


@dataclass(frozen=True)
class _Settled:
    """The value of every key, and where it came from: `set.toml, line 7`, `--resolution`, `the default`."""

    values: dict[str, Any]
    places: dict[str, str]

    def require(self, holds: bool, key: str, message: str) -> None:
        if not holds:
            raise UserError(f"{key} {message} ({self.places[key]}).")


def read_dataset_config(path: Path, given: Mapping[str, Any], *, beside_options: bool = False) -> list[Dataset]:
    """Read a `.toml` or `.json` dataset file.

    Paths in it are relative to the working folder, as kohya's are, else to the folder of the file.

    Args:
        given: what the user gave on the command line, by option name; other options than those of datasets may be
            among it. It counts only where the file says nothing.
        beside_options: the file holds options of a script, too, in other tables.

    Raises UserError: bad keys and types (see `read_document`), no datasets or subsets, a folder or file that is not
    there, values that cannot be or exclude each other; each with file and line.
    """
    document = read_document(Path(path), beside_options=beside_options)
    command_line = _command_line(given)
    general = _Level(document.general, partial(document.place, "general"))
    datasets = []
    for number, (table, subset_tables) in enumerate(document.datasets):
        level = _Level(table, partial(document.place, "datasets", number))
        where = document.place("datasets", number)
        if not subset_tables:
            raise UserError(
                f"The dataset in {where} has no [[datasets.subsets]]. Write one with an image_dir under its [[datasets]]."
            )
        uppers = [level, general, command_line]
        subsets = [
            _file_subset(document, table, uppers, ("datasets", number, "subsets", index))
            for index, table in enumerate(subset_tables)
        ]
        if len({subset.metadata_file is None for subset in subsets}) == 2:
            one = next(subset for subset in subsets if subset.metadata_file is not None)
            raise UserError(
                f"The dataset in {where} mixes subsets with and without metadata_file ({one.place}). "
                "Give each kind a [[datasets]] of its own."
            )
        datasets.append(_dataset(uppers, subsets, where))
    return _named(datasets)


def datasets_from_folders(train_data_dir: Path, reg_data_dir: Path | None, given: Mapping[str, Any]) -> list[Dataset]:
    """One dataset from kohya's folders: `train_data_dir/10_mio girl/*.png` is seen 10 times an epoch as "mio girl".

    A folder that has images itself, or in `images/`, and no such class folders is taken as one subset.

    Raises UserError: no such folder, nothing to train on in it, and as `read_dataset_config`.
    """
    command_line, notes = _command_line(given), list[str]()
    subsets = _class_folders(Path(train_data_dir), "train", command_line, notes)
    if reg_data_dir is not None:
        subsets += _class_folders(Path(reg_data_dir), "reg", command_line, notes)
    dataset = _dataset([command_line], subsets, str(train_data_dir))
    return _named([dataclasses.replace(dataset, notes=tuple(notes))])


def dataset_from_metadata(in_json: Path, train_data_dir: Path | None, given: Mapping[str, Any]) -> list[Dataset]:
    """One dataset from kohya's `--in_json` (JSON or JSONL), whose relative paths start in `train_data_dir`.

    Raises UserError: no such file or folder, and as `read_dataset_config`.
    """
    command_line = _command_line(given)
    own: dict[str, Any] = {"metadata_file": Path(in_json)}
    if train_data_dir is not None:
        own["image_dir"] = Path(train_data_dir)
    options = {"metadata_file": "--in_json", "image_dir": "--train_data_dir"}
    level = _Level(own, lambda key: options.get(key, "--in_json"))
    return _named([_dataset([command_line], [_subset([level, command_line], str(in_json))], str(in_json))])


def dataset_of_latents(store: Path, size: tuple[int, int], given: Mapping[str, Any]) -> Dataset:
    """The latents of one store, of pictures of this width and height, with the captions' options from the command line."""
    command_line = _command_line({**given, "resolution": size})
    level = _Level({"image_dir": store}, lambda key: "--teacher_latents")
    return _named([_dataset([command_line], [_subset([level, command_line], str(store))], str(store))])[0]


def has_class_folders(folder: Path) -> bool:
    """Whether a folder is of class folders, as train_repa.py reads them: folders with pictures, no pictures beside them, and none
    of them kohya's `10_mio girl` or `images`.
    """
    folders = [name for name in names_in(folder) if not name.startswith(".") and (folder / name).is_dir()]
    return (
        not has_images(folder)
        and not any(_CLASS_FOLDER.fullmatch(name) for name in folders)
        and any(has_images(folder / name) for name in folders)
    )


_DEFAULT = "the default"


def _command_line(given: Mapping[str, Any]) -> _Level:
    return _Level(check_given(given), lambda key: f"--{_CLI_NAMES.get(key, key)}")


def _settle(defaults: Mapping[str, Any], keys: frozenset[str], levels: Sequence[_Level]) -> _Settled:
    """The first level that has a key decides it."""
    values, places = {}, {}
    for key in sorted(keys):
        level = next((level for level in levels if key in level.values), None)
        values[key] = level.values[key] if level is not None else defaults[key]
        places[key] = level.place(key) if level is not None else _DEFAULT
    return _Settled(values, places)


def _dataset(levels: Sequence[_Level], subsets: Sequence[Subset], where: str) -> Dataset:
    settled = _settle(vars(Dataset(resolution=(0, 0))), DATASET_KEYS, levels)
    values = settled.values
    if values["resolution"] == (0, 0):
        raise UserError(
            f"resolution is missing for the dataset in {where}. Write resolution = 512 (1024 for SDXL) in [general] or "
            "[[datasets]], or give --resolution."
        )
    # Limits that nobody set follow the resolution: kohya's 256 and 1024 suit 512 alone.
    shortest, longest = min(values["resolution"]) // 2, 2 * max(values["resolution"])
    if settled.places["min_bucket_reso"] == _DEFAULT:
        values["min_bucket_reso"] = max(min(values["min_bucket_reso"], shortest), 1)
    if settled.places["max_bucket_reso"] == _DEFAULT:
        values["max_bucket_reso"] = longest
    dataset = Dataset(**values, subsets=tuple(subsets))
    try:
        Buckets.of(dataset)
    except UserError as error:  # it begins with the name of the key
        place = settled.places.get(str(error).split()[0], where)
        raise UserError(f"{str(error).rstrip('.')} ({place}).") from None
    return dataset


def _named(datasets: Sequence[Dataset]) -> list[Dataset]:
    """Name each by its resolution, so that the ids of its images do not change when another dataset comes or goes."""
    times: Counter[str] = Counter()
    named = []
    for dataset in datasets:
        name = "x".join(map(str, dataset.resolution))
        times[name] += 1
        named.append(dataclasses.replace(dataset, name=name if times[name] == 1 else f"{name}#{times[name]}"))
    return named


def _subset(levels: Sequence[_Level], where: str, **more: Any) -> Subset:
    """The first of the levels is the subset's own."""
    settled = _settle(vars(Subset()), SUBSET_KEYS, levels)
    values = settled.values | {key: settled.values[key] or None for key in _TEXTS}
    own = levels[0].values
    if values["metadata_file"] is None:
        if values["image_dir"] is None:
            raise UserError(
                f"The subset in {where} has neither image_dir nor metadata_file. Write image_dir, the folder of its images."
            )
    else:
        settled.require(
            "caption_extension" not in own,
            "caption_extension",
            "has no meaning beside metadata_file, where the captions are: leave it out",
        )
    settled.require(
        not (values["alpha_mask"] and values["conditioning_data_dir"]),
        "alpha_mask",
        f"and conditioning_data_dir {values['conditioning_data_dir']} both give masks: keep one of them",
    )
    name = values["custom_attributes"].get(ID_PREFIX) or as_written(values["image_dir"] or values["metadata_file"])
    for key in ("image_dir", "conditioning_data_dir", "metadata_file"):
        if values[key] is not None:
            values[key] = _existing(key, values[key], settled.places[key], more.get("beside"))
    return Subset(**values, name=more.get("name", str(name)), place=where)


def _file_subset(
    document: Document, table: Mapping[str, Any], uppers: Sequence[_Level], path: tuple[str | int, ...]
) -> Subset:
    level = _Level(table, partial(document.place, *path))
    where = document.place(*path, "image_dir" if "image_dir" in table else "metadata_file")
    return _subset([level, *uppers], where, beside=document.file)


def as_written(path: Path) -> str:
    """What the ids of a folder's images start with, where nothing else is said."""
    return posixpath.normpath(path.as_posix())


def _existing(key: str, path: Path, place: str, beside: Path | None) -> Path:
    """The path from the working folder, else from the folder of the file it was read in. Raises UserError without it."""
    candidates = [path] if beside is None else [path, beside.parent / path]
    exists = Path.is_file if key == "metadata_file" else Path.is_dir
    for candidate in candidates:
        if exists(candidate):
            return candidate
    place = f" ({place})" if place else ""
    if any(candidate.exists() for candidate in candidates):
        raise UserError(f"{key} {path} is no {'file' if key == 'metadata_file' else 'folder'}{place}.")
    places = "" if path.is_absolute() or beside is None else f", neither in {Path.cwd()} nor beside {beside.name}"
    raise UserError(f"{key} {path} does not exist{places}{place}.")


def _class_folders(root: Path, kind: str, command_line: _Level, notes: list[str]) -> list[Subset]:
    option = "--reg_data_dir" if kind == "reg" else "--train_data_dir"
    root = _existing(option, root, "", None)
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{option} {root} could not be listed: {error.strerror or error}.") from None

    def subset(folder: Path, place: str, **own: Any) -> Subset:
        # The ids hold no root, so that the data may be moved.
        name = kind if folder == root else f"{kind}/{folder.name}"
        level = _Level({"image_dir": folder, "is_reg": kind == "reg", **own}, lambda key: place)
        return _subset([level, command_line], place, name=name)

    found = {name: match for name in folders if (match := _CLASS_FOLDER.fullmatch(name))}
    if not found and has_images(root):
        notes.append(f"{root} has no <repeats>_<class tokens> folders: its images are taken as they are.")
        return [subset(root, option)]
    if not found:
        unread = unread_pictures(names_in(root), endings())
        raise UserError(
            f"{option} {root} has no images, and no folder named <repeats>_<class tokens>, such as 10_mio girl"
            f"{f' (but {some(folders)})' if folders else ''}.{f' Not read are {unread}.' if unread else ''}"
        )
    if others := [name for name in folders if name not in found]:
        notes.append(
            f"{root}: folders without a number of repeats in front of their name are left out ({some(others)})."
        )
    if has_images(root):
        notes.append(f"{root}: images outside of its <repeats>_<class tokens> folders are left out.")
    return [
        subset(root / name, str(root / name), num_repeats=int(match[1]), class_tokens=match[2] or "")
        for name, match in found.items()
    ]
