"""Drawn pictures that measure like photographs: sharp edges, texture, a scene and a background of their own each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SCENES = (
    *("snow", "sand", "grass", "rain", "fog", "water", "leaves", "stones", "hay", "mud", "straw", "moss", "gravel", "ice"),
    *("a kitchen", "a garden", "a forest", "a station", "a harbour", "a barn", "a cellar", "an attic", "a castle", "a meadow"),
    *("a tent", "a market", "a bridge", "a desert", "a library", "a church", "a stable", "a tunnel", "a tower", "a beach"),
    *("a lift", "a boat", "a bus", "a cave", "a ditch", "a mill"),
)  # fmt: skip


def scene(seed: int, size: tuple[int, int] = (192, 192)) -> Image.Image:
    """Polygons of all colours over a shaded ground, with fine texture."""
    draw_from = np.random.default_rng(seed)
    width, height = size
    corners = draw_from.integers(20, 236, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        centre = draw_from.uniform(0, 1, 2) * size
        corner = centre + draw_from.uniform(-0.28, 0.28, (int(draw_from.integers(3, 7)), 2)) * min(size)
        pen.polygon([tuple(point) for point in corner.tolist()], fill=tuple(draw_from.integers(0, 256, 3).tolist()))
    texture = draw_from.normal(0, 6, (height, width, 1))
    return Image.fromarray((np.asarray(image) + texture).clip(0, 255).astype(np.uint8))


def write_scenes(folder: Path, count: int = 40) -> list[Path]:
    """Forty pictures of sks dog, each with a caption of its own."""
    folder.mkdir(parents=True)
    paths = []
    for number, place in enumerate(SCENES[:count]):
        path = folder / f"{number:02}.jpg"
        scene(number).save(path, quality=92)
        path.with_suffix(".txt").write_text(f"a photo of sks dog in {place}", encoding="utf-8")
        paths.append(path)
    return paths
