"""Pictures of every checkpoint from the same prompts and seeds; the one place of evaluation that knows how drawing is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.evaluation.prompts import Task
from library.inference.find_adapters import constant_weights
from library.inference.infotext import save_png
from library.inference.model import DrawingModel
from library.inference.pictures import picture_info
from library.inference.request import LoraUse, Request
from library.inference.text_to_image import draw
from networks.adapters import Adapter

FLAT = 2 / 255
"""Deviation of a picture's values below which there is nothing on it."""


@dataclass(frozen=True)
class Worn:
    """An adapter on the base, and how strongly."""

    path: Path
    adapter: Adapter
    weight: float = 1.0


def wear(model: DrawingModel, worn: Worn | None) -> None:
    """Fold an adapter in, or take the last one out: for what looks at the model without drawing."""
    strengths = [] if worn is None else [(worn.adapter, worn.weight)]
    model.folded.set_unet(strengths)
    model.folded.set_text(strengths)


def draw_task(model: DrawingModel, task: Task, worn: Worn | None, batch_size: int) -> list[Image.Image]:
    """A picture for each of `task.places`. Raises RunFailed where numbers overflow, UserError for what does not fit."""
    pictures: list[Image.Image] = []
    for request in task.requests:
        used = with_adapter(request, worn)
        adapters = {} if worn is None else {worn.path: worn.adapter}
        for start in range(0, len(task.seeds), batch_size):
            pictures += draw(model, used, task.seeds[start : start + batch_size], adapters=adapters)
    return pictures


def with_adapter(request: Request, worn: Worn | None) -> Request:
    if worn is None:
        return request
    return replace(request, loras=(LoraUse(worn.path, constant_weights(worn.path, worn.weight)),))


def save_pictures(
    folder: Path,
    kind: str,
    task: Task,
    pictures: Sequence[Image.Image],
    worn: Worn | None,
    base: str,
    base_hash: str | None = None,
) -> None:
    """KIND_PROMPT_SEED.png, each with the parameters text that A1111 reads; it calls the base by this name and hash."""
    for picture, (number, seed) in zip(pictures, task.places, strict=True):
        info = picture_info(with_adapter(task.requests[number], worn), seed, base, model_hash=base_hash)
        save_png(picture, folder / f"{kind}_{number:02d}_{seed}.png", info)


def pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """uint8 [n, 3, h, w] of pictures of one size."""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def count_flat(pictures: Sequence[Image.Image]) -> int:
    """Pictures with nothing on them: black, or of one colour."""
    return sum(float(np.asarray(picture, dtype=np.float64).std()) / 255 < FLAT for picture in pictures)
