"""What a study is about: pictures to train on, held-out ones, prompts, and what they ask for."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from library.data.demo_pictures import CLASSES as OLD_CLASSES
from library.data.demo_pictures import NEW_CLASSES, make_demo_pictures
from library.data.new_concept import make_concept_pictures
from library.data.pixels import decode_rgb, square_crop
from library.evaluation.photos import Photo, read_photos
from library.evaluation.prompt_sets import UNRELATED, UNRELATED_SHAPES, PromptSet
from library.files import read_json
from library.inference.picture_request import PictureRequest
from library.models.embedded import SHAPES
from tools.alignment_study.commands import plan_of
from tools.alignment_study.control import make_control_pictures, make_control_teacher, make_untrained_base
from tools.alignment_study.own_data import copy_classes, copy_concept
from tools.alignment_study.settings import CLASSES, CONCEPT, PLAIN, SCRATCH, Folders, Settings

CONCEPT_KIND = "purple cross"
PHOTOS_PER_KIND = 10
"""Held-out pictures that likeness and loss are measured on."""
CLASS_PROMPTS, CONCEPT_PROMPTS = 25, 6
"""Prompts at most; of more classes, so many evenly spread ones are drawn and measured."""
FIRST_SEED, CFG_SCALE = 42, 5.0


@dataclass(frozen=True)
class Subject:
    """photos: held out. kinds: what is on each, as "purple cross". photo_prompts: under which its noise is removed.

    asked_new, asked_old: what each prompt asks for; None where no classifier can tell.
    """

    photos: list[Photo]
    kinds: list[str]
    photo_prompts: list[str]
    new: PromptSet
    asked_new: list[str]
    old: PromptSet
    asked_old: list[str] | None


def make_pictures(study: str, settings: Settings, folders: Folders) -> None:
    """Draw the study's pictures, or copy those that the user named; once."""
    folder, plan = folders.pictures(study), plan_of(study, settings, folders)
    if folder.exists():
        return
    if study == SCRATCH:
        make_untrained_base(Path(plan.base))
    if study in (SCRATCH, PLAIN):
        make_control_teacher(Path(plan.teacher), plan.side, settings.scratch_teacher_steps)
        make_control_pictures(folder, plan.side)
    elif study == CLASSES and settings.class_data:
        copy_classes(Path(settings.class_data), folder)
    elif study == CLASSES:
        images = settings.train_pictures + settings.held_out
        make_demo_pictures(folder, images=images, validation=settings.held_out, size=plan.side, classes=NEW_CLASSES)
    elif settings.concept_data:
        copy_concept(Path(settings.concept_data), folder)
    else:
        make_concept_pictures(folder, size=plan.side)


def subject_of(study: str, settings: Settings, folders: Folders) -> Subject:
    """Of pictures that are there."""
    side = plan_of(study, settings, folders).side
    if study == CONCEPT:
        photos = [
            replace(photo, picture=_square(photo.picture, side))
            for photo in read_photos(folders.pictures(study) / "held_out")
        ]
        kinds = [CONCEPT_KIND] * len(photos)
        photo_prompts = [photo.caption or "" for photo in photos]
        prompts = photo_prompts[:CONCEPT_PROMPTS]
        asked = [CONCEPT_KIND] * len(prompts)
    else:
        photos, kinds = _held_out_of_classes(folders.pictures(study), side)
        asked = list(dict.fromkeys(kinds))
        prompts, photo_prompts = ([_of_class(kind) for kind in some] for some in (asked, kinds))
    old, asked_old = _unrelated(study, settings)
    tasks = (_task(some, side, settings) for some in (prompts, old))
    return Subject(photos, kinds, photo_prompts, next(tasks), asked, next(tasks), asked_old)


def _unrelated(study: str, settings: Settings) -> tuple[Sequence[str], list[str] | None]:
    """Prompts of what the base knew before, and what each asks for; a base from nothing knew nothing."""
    if study == SCRATCH:
        return (), None
    if settings.base != SHAPES:
        return UNRELATED, None
    return UNRELATED_SHAPES, [next(name for name in OLD_CLASSES if name in text) for text in UNRELATED_SHAPES]


def _of_class(name: str) -> str:
    """train_repa.py's default template."""
    return f"a photo of a {name}"


def _square(picture: Image.Image, side: int) -> Image.Image:
    """Of the size that is trained and drawn; photos of twelve megapixels would fill the memory."""
    return Image.fromarray(square_crop(picture, side))


def _held_out_of_classes(folder: Path, side: int) -> tuple[list[Photo], list[str]]:
    names = read_json(folder / "class_names.json")
    shown = {names[str(number * len(names) // CLASS_PROMPTS)] for number in range(CLASS_PROMPTS)}
    photos, kinds, seen = [], [], Counter[str]()
    with open(folder / "val.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kind = names[row["class_id"]]
            seen[kind] += 1
            if kind in shown and seen[kind] <= PHOTOS_PER_KIND:
                picture = _square(decode_rgb(folder / row["path"], name=row["path"]), side)
                photos.append(Photo(row["sample_id"], picture, _of_class(kind)))
                kinds.append(kind)
    return photos, kinds


def _task(prompts: Sequence[str], side: int, settings: Settings) -> PromptSet:
    requests = tuple(
        PictureRequest(text, "", steps=settings.sampling_steps, cfg_scale=CFG_SCALE, width=side, height=side)
        for text in prompts
    )
    return PromptSet(requests, tuple(range(FIRST_SEED, FIRST_SEED + settings.drawn_seeds)))
