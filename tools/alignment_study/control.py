"""The positive control's own things: pictures that are soon learned, a U-Net that has learned nothing, a teacher that knows all."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from library.data.demo_pictures import Picture, draw, imagine, shape_mask
from library.files import whole_folder
from library.models.embedded import SHAPES
from library.models.locate import locate_base
from tools.alignment_study.own_data import copy_classes
from tools.alignment_study.reader import KINDS
from tools.alignment_study.teacher import train_further
from tools.shapes.denoiser import new_unet
from tools.shapes.pictures import Pictures

PER_KIND = 160
TAUGHT = 3000
"""Pictures that the teacher learns from, others than the U-Net's."""
RADIUS, REACH = 0.32, 0.06
"""Parts of the side: the size of every shape, and how far from the middle it may lie."""


def make_control_pictures(into: Path, side: int) -> None:
    """All 25 kinds, large, on plain grey, a quarter of the pictures held out. Kind, turn and a little the place vary."""
    with whole_folder(into.with_name("drawn"), overwrite=True) as drawn:
        for kind in KINDS:
            folder = drawn / kind.replace(" ", "_")
            folder.mkdir()
            for number in range(PER_KIND):
                picture = _imagined(kind, f"control {kind} {number}")
                draw(picture, side).save(folder / f"{folder.name}_{number:04d}.png")
    copy_classes(into.with_name("drawn"), into)


def _imagined(kind: str, seed: str) -> Picture:
    choose = random.Random(seed)
    centre = (0.5 + choose.uniform(-REACH, REACH), 0.5 + choose.uniform(-REACH, REACH))
    return replace(imagine(kind, choose), radius=RADIUS, centre=centre, texture="plain", background="grey")


def make_control_teacher(into: Path, side: int, steps: int) -> None:
    """The embedded teacher, trained for `steps` more on pictures like the control's, of all kinds; once."""
    train_further(into, steps, lambda: _taught(side))


def _taught(side: int) -> Pictures:
    known = [_imagined(KINDS[number % len(KINDS)], f"control teacher {number}") for number in range(TAUGHT)]
    pixels = torch.from_numpy(np.stack([np.asarray(draw(one, side)) for one in known])).permute(0, 3, 1, 2)
    coverage = torch.from_numpy(np.stack([np.asarray(shape_mask(one, side)) for one in known]))
    return Pictures(pixels.contiguous(), coverage, known)


def make_untrained_base(into: Path) -> None:
    """The tiny base with a U-Net of random weights; once."""
    if into.exists():
        return
    torch.manual_seed(0)
    with whole_folder(into) as temporary:
        shutil.copytree(locate_base(SHAPES).path, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet"))
        new_unet().save_pretrained(temporary / "unet")
