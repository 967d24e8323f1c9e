"""Small pictures that differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def draw_picture(path: Path, seed: int, size: int = 64) -> None:
    """A few soft patches of colour, `size` pixels high and up to two more wide."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size + seed % 3, size), Image.Resampling.BICUBIC).save(path)
