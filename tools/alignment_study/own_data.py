"""A user's pictures in the place of the drawn ones: linked into the study's folder, a quarter of them held out."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from library.data.caption_files import CaptionFolders
from library.data.sources import load_class_names, open_source
from library.errors import UserError
from library.evaluation.photos import picture_files
from library.files import whole_folder, write_json
from tools.alignment_study.settings import CLASSES, CONCEPT

EVERY = 4
"""Every fourth picture is held out: of a class, of a concept."""


def studies_of(data: Sequence[Path]) -> dict[str, str]:
    """Study -> its folder: class folders are for `classes`, pictures with captions for `concept`.

    Raises UserError for what is neither, and for two of a kind.
    """
    found: dict[str, str] = {}
    for folder in data:
        if not folder.is_dir():
            raise UserError(
                f"--data {folder} is no folder. Name one of class folders, or one of pictures with captions."
            )
        study = CONCEPT if any(file.parent == folder for file in picture_files(folder)) else CLASSES
        if study in found:
            kind = "captioned pictures" if study == CONCEPT else "class folders"
            raise UserError(
                f"--data names two folders of {kind}, {found[study]} and {folder}. Name one of each at most."
            )
        found[study] = str(folder.resolve())
    return found


def link_classes(data: Path, into: Path) -> None:
    """`into`, whole: images/CLASS/*, train.csv, val.csv and class_names.json, as the drawn classes have them.

    Raises UserError where `data` is no folder of class folders, has one alone, or a class has too few pictures to hold one out.
    """
    source = open_source(data)
    names = load_class_names(None, folder_names=source.folder_names)
    if len(names) < 2:
        raise UserError(f"{data} has one class folder, {names[0]}; at least two are needed to tell classes apart.")
    rows: dict[str, list[tuple[str, str, int]]] = {"train": [], "val": []}
    with whole_folder(into) as temporary:
        for class_id, folder in enumerate(source.folder_names or []):
            samples = [sample for sample in source.samples if sample.class_id == class_id]
            if len(samples) < EVERY:
                raise UserError(
                    f"{data / folder} has fewer than {EVERY} pictures, of which one is to be held out. Add some."
                )
            for number, sample in enumerate(samples):
                path = f"images/{folder}/{Path(sample.path).name}"
                _link(Path(sample.path), temporary / path)
                rows["val" if _held_out(number) else "train"].append((sample.sample_id, path, class_id))
        for part, some in rows.items():
            with open(temporary / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("sample_id", "path", "class_id"), *some])
        write_json(temporary / "class_names.json", {str(number): name for number, name in names.items()})


def link_concept(data: Path, into: Path) -> None:
    """`into`, whole: train/ and held_out/, each picture with its caption beside it.

    Raises UserError where a picture has no caption, or there are too few to hold two out.
    """
    files, captions = [file for file in picture_files(data) if file.parent == data], CaptionFolders(data)
    if len(files) < 2 * EVERY:
        raise UserError(f"{data} has fewer than {2 * EVERY} pictures, of which two are to be held out. Add some.")
    with whole_folder(into) as temporary:
        for number, file in enumerate(files):
            caption = captions.find(file.stem, ".txt")
            if caption is None:
                raise UserError(f"{file} has no caption beside it. Write one into {file.with_suffix('.txt').name}.")
            part = temporary / ("held_out" if _held_out(number) else "train")
            _link(file, part / file.name)
            _link(caption, part / f"{file.stem}.txt")


def _held_out(number: int) -> bool:
    return number % EVERY == EVERY - 1


def _link(file: Path, to: Path) -> None:
    """Without room on disk where both lie on one; the file itself is never written."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)
