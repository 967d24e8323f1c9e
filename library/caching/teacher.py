"""A vision model whose tokens are cached: what it sees of a picture, what is kept of what it says, and what caches note of that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from library.device import named_dtype
from library.models.encoders import TeacherEncoder
from library.models.fingerprint import weight_fingerprint
from library.models.locate import DINOV2, BaseLocation, locate_dino
from library.models.teachers import TeacherSize, load_teacher, teacher_size
from library.options.alignment import TokenOptions
from library.options.model import ModelOptions


@dataclass(frozen=True)
class Teacher:
    """Which vision model, what it sees of a square picture, and what is kept of its tokens.

    precision: no or bf16. grid, resolution: see `TeacherEncoder`. layer: whose tokens, counted from 1; None: the last.
    """

    location: BaseLocation
    resolution: int
    grid: int
    dtype: Literal["float16", "int8"]
    precision: str
    layer: int | None = None

    @cached_property
    def size(self) -> TeacherSize:
        return teacher_size(self.location)

    def facts(self, cache_dir: Path) -> dict[str, Any]:
        """What makes the tokens of a square, but for precision and number format. cache_dir: has the hashes of weights."""
        return {
            "model": self.location.name,
            "weights": weight_fingerprint(self.location, DINOV2, cache_dir),
            "dino_resolution": self.resolution,
            "token_grid": self.grid,
            **({} if self.layer is None else {"layer": self.layer}),
        }

    def encoder(self, device: torch.device) -> TeacherEncoder:
        model = load_teacher(self.location, self.layer, dtype=named_dtype(self.precision), device=device)
        return TeacherEncoder(model, self.resolution, self.grid)


def locate_teacher(name: str, model: ModelOptions, options: TokenOptions, precision: str) -> Teacher:
    """One of `model.teachers`, fetched where it is on the hub."""
    location, number = locate_dino(model.teachers[name]), list(model.teachers).index(name)
    resolution = options.resolution(number, teacher_size(location).patch)
    return Teacher(location, resolution, options.token_grid, options.token_dtype, precision, options.teacher_layer)
