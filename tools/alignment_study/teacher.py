"""A teacher that knows more than the base: the embedded one, trained further on pictures of all classes, the new ones too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Dinov2Model

from library.files import whole_folder
from library.models.embedded import SHAPES_DINOV2
from library.models.locate import locate_dino
from tools.shapes.pictures import ALL_LABELS, Pictures, draw_pictures
from tools.shapes.teacher import train_teacher

PICTURES = 6000


def knowing_teacher(folder: Path, steps: int) -> None:
    train_further(folder, steps, lambda: draw_pictures("all", PICTURES))


def train_further(folder: Path, steps: int, pictures: Callable[[], Pictures]) -> None:
    """`folder`, with the teacher in it, trained first for `steps` where it is not there."""
    if folder.exists():
        return
    torch.manual_seed(0)
    begun = Dinov2Model.from_pretrained(locate_dino(SHAPES_DINOV2).path, dtype=torch.float32)
    model, _ = train_teacher(pictures(), steps, ALL_LABELS, begun)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
