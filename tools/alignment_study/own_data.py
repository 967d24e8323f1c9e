"""A user's pictures in the place of the drawn ones: copied into the study's folder, a quarter of them held out."""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from library.data.caption_files import CaptionFolders
from library.data.sources import load_class_names, open_source
from library.errors import UserError
from library.evaluation.photos import picture_files
from library.files import whole_folder, write_json
from library.words import plural
from tools.alignment_study.settings import CLASSES, CONCEPT

EVERY = 4
"""Every fourth picture is held out: of a class, of a concept."""
FEWEST_HELD_OUT = 4
"""Of all classes together, below which features cannot be compared."""
_KOHYA = re.compile(r"\d+_")


def studies_of(data: Sequence[Path]) -> dict[str, str]:
    """Study -> its folder: class folders are for `classes`, pictures with captions for `concept`.

    Raises UserError for what is neither or both, and for two of a kind.
    """
    found: dict[str, str] = {}
    for folder in data:
        if not folder.is_dir():
            raise UserError(
                f"--data {folder} is no folder. Name one of class folders, or one of pictures with captions."
            )
        folders = {file.parent for file in picture_files(folder)}
        if folder in folders and len(folders) > 1:
            raise UserError(
                f"--data {folder} holds pictures, and folders with pictures too. Name a folder of class folders alone, or one of "
                "pictures with captions alone."
            )
        if kohya := sorted(one.name for one in folders if one != folder and _KOHYA.match(one.name)):
            raise UserError(f"--data {folder} has folders of kohya's layout ({kohya[0]}). Name that folder itself.")
        study = CONCEPT if folder in folders else CLASSES
        if study in found:
            kind = "captioned pictures" if study == CONCEPT else "class folders"
            raise UserError(
                f"--data names two folders of {kind}, {found[study]} and {folder}. Name one of each at most."
            )
        found[study] = str(folder.resolve())
    return found


def listing(data: str, *, captions: bool = False) -> str:
    """Count and digest of the pictures in a user's folder, so that it is seen when one comes later; "" for no folder.

    captions: with the texts beside the pictures.
    """
    if not data:
        return ""
    found, digest = picture_files(Path(data)), hashlib.sha256()
    texts = CaptionFolders(Path(data))
    for file in found:
        digest.update(f"{file} {file.stat().st_size}\n".encode())
        if captions and (text := texts.find(file.stem, ".txt")) is not None:
            digest.update(text.read_bytes())
    return f"{plural(len(found), 'picture')} ({digest.hexdigest()[:8]})"


def copy_classes(data: Path, into: Path) -> None:
    """`into`, whole: images/CLASS/*, train.csv, val.csv and class_names.json, as the drawn classes have them.

    Raises UserError where `data` is no folder of class folders, has one alone, or too few pictures to hold some out.
    """
    source = open_source(data)
    names = load_class_names(None, folder_names=source.folder_names)
    for note in source.notes:
        print(f"note       {note}", flush=True)
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
                _copy(Path(sample.path), temporary / path)
                rows["val" if _held_out(number) else "train"].append((sample.sample_id, path, class_id))
        if len(rows["val"]) < FEWEST_HELD_OUT:
            raise UserError(
                f"Of {data}, {len(rows['val'])} pictures would be held out, every fourth of a class; {FEWEST_HELD_OUT} are "
                "needed at least. Add some."
            )
        for part, some in rows.items():
            with open(temporary / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("sample_id", "path", "class_id"), *some])
        write_json(temporary / "class_names.json", {str(number): name for number, name in names.items()})


def copy_concept(data: Path, into: Path) -> None:
    """`into`, whole: train/ and held_out/, each picture with its caption beside it.

    Raises UserError where a picture has no caption or shares it with another, or there are too few to hold two out.
    """
    files, captions = picture_files(data), CaptionFolders(data)
    if len(files) < 2 * EVERY:
        raise UserError(f"{data} has fewer than {2 * EVERY} pictures, of which two are to be held out. Add some.")
    if twice := [file for file, after in zip(files, files[1:], strict=False) if file.stem == after.stem]:
        raise UserError(
            f"{data} has several pictures called {twice[0].stem}, which share a caption. Rename or remove some."
        )
    with whole_folder(into) as temporary:
        for number, file in enumerate(files):
            caption = captions.find(file.stem, ".txt")
            if caption is None:
                raise UserError(f"{file} has no caption beside it. Write one into {file.with_suffix('.txt').name}.")
            part = temporary / ("held_out" if _held_out(number) else "train")
            _copy(file, part / file.name)
            _copy(caption, part / f"{file.stem}.txt")


def _held_out(number: int) -> bool:
    return number % EVERY == EVERY - 1


def _copy(file: Path, to: Path) -> None:
    """The bytes alone; whoever may read the original may write the copy."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)
