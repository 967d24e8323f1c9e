"""What a study is about: pictures to train on, held-out ones, prompts, and what they ask for."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass

from library.data.demo_pictures import CLASSES as OLD_CLASSES
from library.data.demo_pictures import NEW_CLASSES, make_demo_pictures
from library.data.new_concept import NAME, make_concept_pictures
from library.data.pixels import decode_rgb
from library.evaluation.photos import Photo, read_photos
from library.evaluation.prompt_sets import UNRELATED_SHAPES, PromptSet
from library.inference.picture_request import PictureRequest
from tools.alignment_study.settings import CLASSES, SIDE, Folders, Settings

CONCEPT_KIND = "purple cross"
PHOTOS_PER_KIND = 10
"""Held-out pictures that likeness and loss are measured on."""
CONCEPT_PROMPTS = 6
FIRST_SEED, CFG_SCALE = 42, 5.0


@dataclass(frozen=True)
class Subject:
    """photos: held out. kinds: what is on each, as "purple cross". photo_prompts: under which its noise is removed.

    asked: what each prompt of `new` and of `old` asks for.
    """

    photos: list[Photo]
    kinds: list[str]
    photo_prompts: list[str]
    new: PromptSet
    asked_new: list[str]
    old: PromptSet
    asked_old: list[str]


def make_pictures(study: str, settings: Settings, folders: Folders) -> None:
    """Draw the study's pictures, once."""
    folder = folders.pictures(study)
    if folder.exists():
        return
    if study == CLASSES:
        images = settings.train_pictures + settings.held_out
        make_demo_pictures(folder, images=images, validation=settings.held_out, size=SIDE, classes=NEW_CLASSES)
    else:
        make_concept_pictures(folder, size=SIDE)


def subject_of(study: str, settings: Settings, folders: Folders) -> Subject:
    if study == CLASSES:
        photos, kinds = _held_out_of_classes(folders)
        prompts, asked = [_of_class(name) for name in NEW_CLASSES], list(NEW_CLASSES)
        photo_prompts = [_of_class(kind) for kind in kinds]
    else:
        photos = read_photos(folders.pictures(study) / "held_out")
        kinds = [CONCEPT_KIND] * len(photos)
        photo_prompts = [photo.caption or f"a {NAME}" for photo in photos]
        prompts, asked = photo_prompts[:CONCEPT_PROMPTS], [CONCEPT_KIND] * CONCEPT_PROMPTS
    old = [next(name for name in OLD_CLASSES if name in text) for text in UNRELATED_SHAPES]
    return Subject(
        photos, kinds, photo_prompts, _task(prompts, settings), asked, _task(UNRELATED_SHAPES, settings), old
    )


def _of_class(name: str) -> str:
    """train_repa.py's default template."""
    return f"a photo of a {name}"


def _held_out_of_classes(folders: Folders) -> tuple[list[Photo], list[str]]:
    folder = folders.pictures(CLASSES)
    photos, kinds, seen = [], [], Counter[str]()
    with open(folder / "val.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kind = NEW_CLASSES[int(row["class_id"])]
            seen[kind] += 1
            if seen[kind] <= PHOTOS_PER_KIND:
                photos.append(
                    Photo(row["sample_id"], decode_rgb(folder / row["path"], name=row["path"]), _of_class(kind))
                )
                kinds.append(kind)
    return photos, kinds


def _task(prompts: list[str] | tuple[str, ...], settings: Settings) -> PromptSet:
    requests = tuple(
        PictureRequest(text, "", steps=settings.sampling_steps, cfg_scale=CFG_SCALE, width=SIDE, height=SIDE)
        for text in prompts
    )
    return PromptSet(requests, tuple(range(FIRST_SEED, FIRST_SEED + settings.drawn_seeds)))
