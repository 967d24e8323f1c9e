"""The pictures that the tiny base is trained on: the demo set's shapes, drawn with other seeds, with what is known of each."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.demo_pictures import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    NEW_CLASSES,
    NEW_COLOURS,
    SHAPES,
    TEXTURES,
    Picture,
    draw,
    imagine,
    shape_mask,
)

SIDE = 128
SEEDS = {"train": "shapes train", "unseen": "shapes unseen", "all": "shapes all"}
"""Other seeds than `data/demo`'s, so that the demo set is not among them."""
DRAWN = {"train": CLASSES, "unseen": CLASSES, "all": (*CLASSES, *NEW_CLASSES)}
"""What is on the pictures of each part, the classes in turn; "all" has those too that the tiny base does not know."""

Labels = Mapping[str, tuple[str, ...]]
LABELS: Labels = {"shape": SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS), "texture": TEXTURES}
ALL_LABELS: Labels = {**LABELS, "shape": (*SHAPES, "cross"), "colour": (*COLOURS, *NEW_COLOURS)}


@dataclass(frozen=True)
class Pictures:
    """What was drawn.

    Attributes:
        pixels: [N, 3, 128, 128] uint8.
        coverage: [N, 128, 128] uint8, how much of each pixel the shape covers.
        known: what is on each.
    """

    pixels: Tensor
    coverage: Tensor
    known: list[Picture]

    def __len__(self) -> int:
        return len(self.known)

    def labels(self, of: str, names: Labels = LABELS) -> Tensor:
        """[N] int64: which of `names[of]` each picture has."""
        return torch.tensor([names[of].index(getattr(picture, of)) for picture in self.known])


class _Drawn(NamedTuple):
    picture: Picture
    pixels: np.ndarray
    coverage: np.ndarray


def draw_pictures(part: str, count: int) -> Pictures:
    """`count` pictures of a part of the set, the classes in turn. All follow from the part's name."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = list(pool.map(_one, [part] * count, range(count), chunksize=64))
    pixels = torch.from_numpy(np.stack([one.pixels for one in drawn])).permute(0, 3, 1, 2).contiguous()
    return Pictures(pixels, torch.from_numpy(np.stack([one.coverage for one in drawn])), [one.picture for one in drawn])


def _one(part: str, index: int) -> _Drawn:
    picture = imagine(DRAWN[part][index % len(DRAWN[part])], random.Random(f"{SEEDS[part]} {index}"))
    return _Drawn(picture, np.asarray(draw(picture, SIDE)), np.asarray(shape_mask(picture, SIDE)))


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices below `count`, [size] int64: every index once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        chosen, left = left[:size], left[size:]
        yield chosen
