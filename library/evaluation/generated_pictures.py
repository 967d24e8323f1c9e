"""Draws and saves the pictures of a checkpoint for a set of prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.evaluation.prompt_sets import PromptSet
from library.inference.drawing_model import DrawingModel
from library.inference.find_adapters import constant_weights
from library.inference.infotext import save_png
from library.inference.picture_infotext import infotext_of
from library.inference.picture_request import LoraUse, PictureRequest
from library.inference.text_to_image import draw
from networks.adapters import Adapter

EMPTY = 2 / 255
"""Standard deviation of a picture's values below which it counts as empty."""


@dataclass(frozen=True)
class AppliedAdapter:
    """An adapter of the base, and its weight."""

    path: Path
    adapter: Adapter
    weight: float = 1.0


def apply_adapter(model: DrawingModel, applied: AppliedAdapter | None) -> None:
    """Fold an adapter into the model, or (None) take the last one out: for measurements that do not draw."""
    strengths = [] if applied is None else [(applied.adapter, applied.weight)]
    model.folded.set_unet(strengths)
    model.folded.set_text(strengths)


def draw_prompt_set(
    model: DrawingModel,
    prompts: PromptSet,
    applied: AppliedAdapter | None,
    batch_size: int,
    drawn: Callable[[int], object] = lambda count: None,
) -> list[Image.Image]:
    """A picture for each of `prompts.places`; `drawn` hears how many are new.

    Raises RunFailed where numbers overflow, UserError for what the base cannot draw.
    """
    pictures: list[Image.Image] = []
    for request in prompts.requests:
        used = with_adapter(request, applied)
        adapters = {} if applied is None else {applied.path: applied.adapter}
        for start in range(0, len(prompts.seeds), batch_size):
            new = draw(model, used, prompts.seeds[start : start + batch_size], adapters=adapters)
            pictures += new
            drawn(len(new))
    return pictures


def with_adapter(request: PictureRequest, applied: AppliedAdapter | None) -> PictureRequest:
    if applied is None:
        return request
    return replace(request, loras=(LoraUse(applied.path, constant_weights(applied.path, applied.weight)),))


def save_pictures(
    folder: Path,
    kind: str,
    prompts: PromptSet,
    pictures: Sequence[Image.Image],
    applied: AppliedAdapter | None,
    base: str,
    base_hash: str | None = None,
) -> None:
    """Write KIND_PROMPT_SEED.png, each with the parameters text that A1111 reads. base, base_hash: named in that text."""
    for picture, (number, seed) in zip(pictures, prompts.places, strict=True):
        info = infotext_of(with_adapter(prompts.requests[number], applied), seed, base, model_hash=base_hash)
        save_png(picture, folder / f"{kind}_{number:02d}_{seed}.png", info)


def pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """uint8 [n, 3, h, w] of pictures of one size."""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def count_empty(pictures: Sequence[Image.Image]) -> int:
    """How many pictures are empty: black, or of one colour."""
    return sum(float(np.asarray(picture, dtype=np.float64).std()) / 255 < EMPTY for picture in pictures)
