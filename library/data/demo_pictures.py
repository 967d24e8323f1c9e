"""The data set that comes with the project: coloured shapes with captions, drawn the same on every machine.

python -m library.data.demo_pictures --out data/demo
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from library.errors import UserError, script
from library.files import read_json, whole_folder, write_json

GENERATOR = "library.data.demo_pictures"
GENERATOR_VERSION = 1
"""Raise it when the same arguments give other files; `ensure_demo_pictures` then draws the set again."""

DEFAULT_IMAGES = 480
DEFAULT_VALIDATION_IMAGES = 80
DEFAULT_TRAINING_IMAGES = DEFAULT_IMAGES - DEFAULT_VALIDATION_IMAGES

_SAMPLES_PER_PIXEL = 4  # along each side: everything is drawn this much larger, then averaged

Colour = tuple[int, int, int]
SHAPES = ("circle", "square", "star", "triangle")
COLOURS: dict[str, Colour] = {
    "blue": (52, 106, 214),
    "green": (48, 160, 84),
    "red": (218, 56, 52),
    "yellow": (246, 194, 38),
}
CLASSES = tuple(sorted(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))
BACKGROUNDS: dict[str, Colour] = {
    "black": (44, 46, 54),
    "brown": (140, 106, 80),
    "grey": (158, 162, 168),
    "pink": (240, 190, 200),
    "turquoise": (128, 206, 200),
    "white": (242, 240, 234),
}
TEXTURES = ("plain", "striped", "checked", "dotted", "gradient")
# Nothing of the set has these: they are for showing a model something new.
NEW_COLOURS: dict[str, Colour] = {"purple": (136, 64, 190)}
NEW_CLASSES = tuple(
    sorted([*(f"{colour} cross" for colour in (*COLOURS, "purple")), *(f"purple {shape}" for shape in SHAPES)])
)
_CORNERS = {"triangle": (3, 1.0), "square": (4, 1.0), "star": (10, 0.45)}
_CROSS = ((1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3))
SIZES = {"small": (0.13, 0.17), "medium": (0.20, 0.25), "large": (0.29, 0.34)}  # radius / side of the picture
PLACES = {
    (-1, -1): "at the top left",
    (0, -1): "at the top",
    (1, -1): "at the top right",
    (-1, 0): "on the left",
    (0, 0): "in the middle",
    (1, 0): "on the right",
    (-1, 1): "at the bottom left",
    (0, 1): "at the bottom",
    (1, 1): "at the bottom right",
}


@dataclass(frozen=True)
class Picture:
    """What is on one picture. Lengths are parts of its side; angles are in radians."""

    shape: str
    colour: str
    size: str
    radius: float
    place: str
    centre: tuple[float, float]
    angle: float
    background: str
    texture: str
    pitch: float  # of stripes, checks and dots
    course: int  # of stripes and gradients, 0 to 5

    @property
    def ground(self) -> str:
        return f"{self.background} gradient" if self.texture == "gradient" else f"{self.texture} {self.background}"

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place} on a {self.ground} background"


def caption_of(picture: Picture, choose: random.Random) -> str:
    """One of the ways to say what is on a picture, from "red circle" to the whole caption of the demo set."""
    colour, shape, ground = picture.colour, picture.shape, picture.ground
    return choose.choice(
        (
            picture.caption,
            picture.caption,
            f"{colour} {shape}",
            f"a {colour} {shape}",
            f"a photo of a {colour} {shape}",
            f"a {colour} {shape} {picture.place}",
            f"a {picture.size} {colour} {shape}",
            f"a {colour} {shape} on a {ground} background",
            f"a {picture.size} {colour} {shape} {picture.place}",
            f"a picture of a {colour} {shape} on a {ground} background",
        )
    )


def make_demo_pictures(
    folder: Path,
    *,
    images: int = DEFAULT_IMAGES,
    validation: int = DEFAULT_VALIDATION_IMAGES,
    size: int = 128,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    overwrite: bool = False,
) -> None:
    """Draw the data set into `folder`, which appears whole or not at all.

    `images/<class>/<sample_id>.png` with a caption beside each as `.txt`, `train.csv` and `val.csv` with the columns
    sample_id, path, class_id, `class_names.json`, and `dataset.json` with the version and the arguments. The classes
    take turns, so both parts hold the same number of each where their count divides them. All bytes follow from the arguments.

    Args:
        images: how many pictures in all.
        validation: how many of them, the last ones, go to `val.csv`.
        size: width and height in pixels.
        classes: what is drawn, as "red circle"; NEW_CLASSES are those that the trained tiny base does not know.

    Raises:
        UserError: an argument out of range, or `folder` exists and `overwrite` is not given.
        RunFailed: the disk refused.
    """
    if not 0 <= validation < images:
        raise UserError(f"validation must be from 0 to less than images ({images}), got {validation}.")
    if size < 16:
        raise UserError(f"size must be at least 16 pixels, got {size}.")
    rows = []
    with whole_folder(folder, overwrite=overwrite) as temporary:
        for index in range(images):
            class_id, number = index % len(classes), index // len(classes)
            folder_name = classes[class_id].replace(" ", "_")
            sample_id = f"{folder_name}_{number:04d}"
            path = f"images/{folder_name}/{sample_id}.png"
            picture = imagine(classes[class_id], random.Random(f"{GENERATOR} {GENERATOR_VERSION} {seed} {index}"))
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_bytes(_png(draw(picture, size)))
            (temporary / path).with_suffix(".txt").write_bytes(picture.caption.encode() + b"\n")
            rows.append((sample_id, path, class_id))
        _write_manifest(temporary / "train.csv", rows[: images - validation])
        _write_manifest(temporary / "val.csv", rows[images - validation :])
        write_json(temporary / "class_names.json", {str(number): name for number, name in enumerate(classes)})
        arguments = {"images": images, "validation": validation, "size": size, "seed": seed}
        record = {"generator": GENERATOR, "version": GENERATOR_VERSION, "arguments": arguments}
        write_json(temporary / "dataset.json", record)


def ensure_demo_pictures(folder: Path) -> Path:
    """Return `folder` with the data set in it: drawn where there is none, drawn again where its version is old.

    A set made with other arguments is kept, and keeps them when it is drawn again. Call it from one process only.

    Raises:
        UserError: `folder` holds something else.
    """
    if not folder.exists():
        make_demo_pictures(folder)
        return folder
    record = read_json(folder / "dataset.json") if (folder / "dataset.json").exists() else None
    if not isinstance(record, dict) or record.get("generator") != GENERATOR:
        raise UserError(f"{folder} exists and is not the demo data set (no dataset.json of its kind). Move it away.")
    if record.get("version") != GENERATOR_VERSION:
        saved, known = record.get("arguments"), ("images", "validation", "size", "seed")
        arguments = {name: saved[name] for name in known if name in saved} if isinstance(saved, dict) else {}
        make_demo_pictures(folder, **arguments, overwrite=True)
    return folder


def imagine(class_name: str, choose: random.Random) -> Picture:
    """Choose everything about one picture but its class."""
    colour, shape = class_name.split(" ")
    size = choose.choice(list(SIZES))
    radius = choose.uniform(*SIZES[size])
    direction = choose.choice(list(PLACES))
    reach = 0.46 - radius  # leaves a rim of 0.04
    across, down = (reach * (toward * 0.85 + choose.uniform(-0.15, 0.15)) for toward in direction)
    return Picture(
        shape=shape,
        colour=colour,
        size=size,
        radius=radius,
        place=PLACES[direction],
        centre=(0.5 + across, 0.5 + down),
        angle=choose.uniform(0, 2 * math.pi),
        background=choose.choice(list(BACKGROUNDS)),
        texture=choose.choice(TEXTURES),
        pitch=choose.uniform(0.08, 0.16),
        course=choose.randrange(6),
    )


def draw(picture: Picture, size: int) -> Image.Image:
    """Draw one picture, RGB, `size` x `size`: ground, soft shadow, then the shape lit from the top left.

    Pillow works on integers in everything used here, so no processor or mathematics library changes a pixel.
    """
    ground = BACKGROUNDS[picture.background]
    image = _blend(_shade(ground, -24), _shade(ground, 18), _texture_mask(picture, size))
    shape = shape_mask(picture, size)
    soft = max(1, size // 48)
    shadow = Image.new("L", shape.size)
    shadow.paste(shape, (soft, 2 * soft))
    shadow = shadow.filter(ImageFilter.BoxBlur(soft)).filter(ImageFilter.BoxBlur(soft))
    image.paste((16, 18, 28), mask=shadow.point([value * 2 // 5 for value in range(256)]))
    colour = (COLOURS | NEW_COLOURS)[picture.colour]
    image.paste(_blend(_shade(colour, 32), _shade(colour, -36), _light(picture, size)), mask=shape)
    return image


def _texture_mask(picture: Picture, size: int) -> Image.Image:
    """Mode L: 0 where the ground is dark, 255 where it is light."""
    side = size * _SAMPLES_PER_PIXEL
    if picture.texture == "plain":
        return Image.new("L", (size, size), 160)
    if picture.texture == "gradient":
        ramp = bytes(255 * row // (size - 1) for row in range(size))
        mask = Image.frombytes("L", (1, size), ramp).resize((size, size), Image.Resampling.NEAREST)
        return mask if picture.course % 2 else mask.transpose(Image.Transpose.ROTATE_90)
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    step = round(picture.pitch * side)
    if picture.texture == "striped":
        # Upright, level or along a diagonal: exact slopes, so that no rounding decides about a pixel.
        lean = (0, side, -side)[picture.course // 2]
        for left in range(-2 * side, 3 * side, 2 * step):
            pen.polygon([(left, 0), (left + step, 0), (left + step + lean, side), (left + lean, side)], fill=255)
        mask = mask if picture.course % 2 else mask.transpose(Image.Transpose.ROTATE_90)
        return mask.reduce(_SAMPLES_PER_PIXEL)
    for row, top in enumerate(range(0, side, step)):
        for column, left in enumerate(range(0, side, step)):
            if (row + column) % 2 == 0:
                box = (left, top, left + step - 1, top + step - 1)
                if picture.texture == "checked":
                    pen.rectangle(box, fill=255)
                else:
                    pen.ellipse(box, fill=255)
    return mask.reduce(_SAMPLES_PER_PIXEL)


def shape_mask(picture: Picture, size: int) -> Image.Image:
    """Mode L: how much of each pixel the shape covers, 255 for all of it."""
    side = size * _SAMPLES_PER_PIXEL
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    x, y = (round(part * side) for part in picture.centre)
    radius = round(picture.radius * side)
    if picture.shape == "circle":
        radius = radius * 9 // 10  # of about the same area as the others
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        polygon = [
            (x + round(reach * math.sin(turn)), y - round(reach * math.cos(turn)))
            for turn, reach in _outline(picture, radius)
        ]
        _fill(pen, polygon)
    return mask.reduce(_SAMPLES_PER_PIXEL)


def _outline(picture: Picture, radius: int) -> list[tuple[float, float]]:
    """(direction, distance) of each corner from the centre; directions clockwise from upright."""
    if picture.shape == "cross":
        return [(picture.angle + math.atan2(x, y), radius * math.hypot(x, y) / math.hypot(1, 3)) for x, y in _CROSS]
    corners, inner = _CORNERS[picture.shape]
    turns = (picture.angle + 2 * math.pi * corner / corners for corner in range(corners))
    return [(turn, radius * (inner if corner % 2 else 1.0)) for corner, turn in enumerate(turns)]


def _fill(pen: ImageDraw.ImageDraw, polygon: list[tuple[int, int]]) -> None:
    """Fill a polygon row by row, in whole numbers.

    ImageDraw.polygon computes its edges in float32, where processors with fused multiply-add may differ by a pixel.
    """
    edges = list(zip(polygon, polygon[1:] + polygon[:1], strict=True))
    for row in range(min(y for _, y in polygon), max(y for _, y in polygon)):
        # An edge crosses the middle of the row, at row + 1/2, in x0 + (row + 1/2 - y0) * (x1 - x0) / (y1 - y0).
        crossings = sorted(
            x0 + (2 * (row - y0) + 1) * (x1 - x0) // (2 * (y1 - y0))
            for (x0, y0), (x1, y1) in edges
            if (y0 <= row) != (y1 <= row)
        )
        for left, right in zip(crossings[::2], crossings[1::2], strict=True):
            pen.line((left, row, right, row), fill=255)


def _light(picture: Picture, size: int) -> Image.Image:
    """Mode L: 0 at the lit top left of the shape to 255 at its far end."""
    x, y, radius = (round(part * size) for part in (*picture.centre, picture.radius))
    start, length = x + y - radius, max(1, 2 * radius)
    ramp = bytes(min(255, max(0, 255 * (step - start) // length)) for step in range(2 * size))
    rows = b"".join(ramp[row : row + size] for row in range(size))
    return Image.frombytes("L", (size, size), rows)


def _blend(low: Colour, high: Colour, mask: Image.Image) -> Image.Image:
    """RGB from `low` where the mask is 0 to `high` where it is 255."""
    return Image.composite(Image.new("RGB", mask.size, high), Image.new("RGB", mask.size, low), mask)


def _shade(colour: Colour, by: int) -> Colour:
    red, green, blue = (min(255, max(0, part + by)) for part in colour)
    return red, green, blue


def _png(image: Image.Image) -> bytes:
    """An RGB image as PNG, stored without compression: zlib and zlib-ng compress to different bytes."""
    width, height = image.size
    pixels = image.tobytes()
    raw = b"".join(b"\0" + pixels[start : start + 3 * width] for start in range(0, len(pixels), 3 * width))
    blocks = [raw[start : start + 65535] for start in range(0, len(raw), 65535)]
    stored = b"".join(
        struct.pack("<BHH", number == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for number, block in enumerate(blocks)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _write_manifest(path: Path, rows: list[tuple[str, str, int]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("sample_id", "path", "class_id"))
        writer.writerows(rows)


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {GENERATOR}", description="Draw the demo data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, such as data/demo")
    parser.add_argument("--images", type=int, default=DEFAULT_IMAGES, help="pictures in all (%(default)s)")
    parser.add_argument(
        "--new_classes",
        action="store_true",
        help="draw what the trained tiny base does not know: crosses, and purple things",
    )
    parser.add_argument(
        "--validation", type=int, default=DEFAULT_VALIDATION_IMAGES, help="how many of them for val.csv (%(default)s)"
    )
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another number, other pictures (%(default)s)")
    options = parser.parse_args(argv)
    classes = NEW_CLASSES if options.new_classes else CLASSES
    start = time.perf_counter()
    make_demo_pictures(
        options.out,
        images=options.images,
        validation=options.validation,
        size=options.size,
        seed=options.seed,
        classes=classes,
    )
    print(
        f"{options.images} pictures of {options.size} x {options.size} in {len(classes)} classes in {options.out} "
        f"(train.csv {options.images - options.validation}, val.csv {options.validation}), "
        f"{time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
