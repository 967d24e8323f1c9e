"""Buckets of aspect ratios: which shape a picture is trained in, what is cut off for it, and the pixels that remain.

Sizes are (width, height) in pixels everywhere, except in what SDXL is conditioned on, which is (height, width).
The arithmetic is that of kohya's sd-scripts, so that a data set falls into the same buckets here as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from library.errors import UserError
from networks.families import FAMILIES

Size = tuple[int, int]

LATENT_PIXELS = math.lcm(*(family.vae_factor for family in FAMILIES.values()))
"""Every trained side is a multiple of it, and so a whole number of latents in each family."""

SMALLEST_SIDE = 64
"""A picture of fewer pixels a side is refused rather than trained (a guess: 8 latents, 1 after a U-Net's three halvings)."""

INTERPOLATIONS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "box": Image.Resampling.BOX,
}
"""Values of `resize_interpolation`. All but nearest average over what falls into a pixel when they shrink."""


class UnfitImage(ValueError):
    """A picture that no bucket can hold. Its text says why, in a few words."""


class BucketSettings(Protocol):
    """What `Buckets.of` reads of a data set's options, under kohya's names."""

    @property
    def resolution(self) -> Size: ...
    @property
    def enable_bucket(self) -> bool: ...
    @property
    def min_bucket_reso(self) -> int: ...
    @property
    def max_bucket_reso(self) -> int: ...
    @property
    def bucket_reso_steps(self) -> int: ...
    @property
    def bucket_no_upscale(self) -> bool: ...


class Conditioning(NamedTuple):
    """SDXL's size conditions of a picture, each (height, width) or (top, left) in pixels."""

    original_size: Size
    crop_top_left: Size
    target_size: Size

    @property
    def time_ids(self) -> tuple[int, ...]:
        """The six numbers in the order in which the U-Net embeds them."""
        return (*self.original_size, *self.crop_top_left, *self.target_size)


@dataclass(frozen=True)
class Fitted:
    """A picture of size `original`, scaled to `resized`, of which the box `crop` is kept: the size of `bucket`."""

    original: Size
    bucket: Size
    resized: Size
    crop: tuple[int, int, int, int]
    """(left, top, right, bottom) in pixels of the scaled picture."""

    @property
    def aspect_error(self) -> float:
        """How far the bucket's width / height is from the picture's, as kohya reports it."""
        return abs(self.bucket[0] / self.bucket[1] - self.original[0] / self.original[1])

    @property
    def cut(self) -> float:
        """Share of the picture that is not seen, 0 to 1."""
        return 1 - math.prod(self.bucket) / math.prod(self.resized)

    def cropped_at(self, left: int, top: int) -> Fitted:
        """The same picture with another part of it kept; a place outside is moved to the nearest one inside."""
        left, top = (
            max(0, min(start, full - kept))
            for start, full, kept in zip((left, top), self.resized, self.bucket, strict=True)
        )
        return replace(self, crop=(left, top, left + self.bucket[0], top + self.bucket[1]))

    def conditioning(self, flipped: bool = False) -> Conditioning:
        """What was really cut: 1500 x 1000 in a bucket of 1216 x 832 loses 16 pixels on the left, none at the top.

        (kohya passes the margins of a letterbox, 10 at the top in this example, and ignores random crops.)
        `flipped`: the kept part was mirrored, so that what is missing on its left is what was cut on the right.
        """
        left = self.resized[0] - self.crop[2] if flipped else self.crop[0]
        width, height = self.original
        return Conditioning((height, width), (self.crop[1], left), (self.bucket[1], self.bucket[0]))


def bucket_resolutions(max_resolution: Size, min_size: int, max_size: int, divisible: int) -> list[Size]:
    """All buckets of about the area of `max_resolution` and never above it, sorted.

    A square, and for every width from min_size to max_size the tallest bucket that stays below the area, lying and
    standing. The tallest is cut off at max_size, so elongated buckets can be much smaller than the area.

    Args:
        max_resolution: of which only the area counts.
        min_size, max_size: limits of both sides, multiples of `divisible`, min_size positive. The square, whose side
            lies between them wherever `max_resolution` does, is not checked against them.
        divisible: both sides are multiples of it.
    """
    area = math.prod(max_resolution)
    side = math.isqrt(area) // divisible * divisible
    found = {(side, side)}
    for width in range(min_size, max_size + 1, divisible):
        height = min(max_size, area // width // divisible * divisible)
        if height >= min_size:
            found |= {(width, height), (height, width)}
    return sorted(found)


@dataclass(frozen=True)
class Buckets:
    """The shapes of a data set, from options of kohya's names and defaults. Raises UserError for impossible ones.

    Without `enable_bucket` there is one bucket, `resolution`. Pictures are scaled to cover it and their centre is kept,
    whether latents are cached or not (kohya does so only when caching, and stops at other sizes when not).
    """

    resolution: Size
    enable_bucket: bool = True
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False

    @classmethod
    def of(cls, settings: BucketSettings) -> Buckets:
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        shape, steps = "{} x {}".format(*self.resolution), self.bucket_reso_steps
        if not self.enable_bucket:
            if any(side < 1 or side % LATENT_PIXELS for side in self.resolution):
                raise UserError(
                    f"resolution must be a positive multiple of {LATENT_PIXELS} on both sides, got {shape}."
                )
            return
        if steps < 1 or steps % LATENT_PIXELS:
            raise UserError(f"bucket_reso_steps must be a positive multiple of {LATENT_PIXELS}, got {steps}.")
        if min(self.resolution) < steps:
            raise UserError(f"resolution {shape} is smaller than bucket_reso_steps {steps}: lower bucket_reso_steps.")
        if self.bucket_no_upscale:
            return
        low, high = self.limits
        if low > min(self.resolution):
            raise UserError(
                f"min_bucket_reso must not exceed resolution, got {self.min_bucket_reso} for {shape}. "
                f"Set it to {min(self.resolution) // 2 // steps * steps or steps} or so."
            )
        if high < max(self.resolution):
            raise UserError(
                f"max_bucket_reso must not be below resolution, got {self.max_bucket_reso} for {shape}. "
                f"Set it to {2 * max(self.resolution)} or so."
            )

    @property
    def limits(self) -> Size:
        """Shortest and longest side: min_bucket_reso rounded down and max_bucket_reso rounded up to the steps."""
        steps = self.bucket_reso_steps
        return max(self.min_bucket_reso // steps, 1) * steps, -(-self.max_bucket_reso // steps) * steps

    @cached_property
    def resolutions(self) -> list[Size]:
        """The buckets a picture can fall into. With bucket_no_upscale they come from the pictures: none beforehand."""
        if not self.enable_bucket:
            return [self.resolution]
        if self.bucket_no_upscale:
            return []
        return bucket_resolutions(self.resolution, *self.limits, self.bucket_reso_steps)

    @cached_property
    def _aspects(self) -> npt.NDArray[np.float64]:
        return np.array([width / height for width, height in self.resolutions])

    def fit(self, width: int, height: int) -> Fitted:
        """The bucket of a picture, the size it is scaled to, and its centre as crop (an odd surplus goes right or down).

        Raises:
            UnfitImage: with bucket_no_upscale, where a side of the bucket would be shorter than `SMALLEST_SIDE`, or
                than half the resolution where that is less, or than one step.
        """
        if min(width, height) < 1:
            raise UnfitImage(f"{width} x {height} pixels, nothing to see")
        if self.bucket_no_upscale and self.enable_bucket:
            resized = self._shrunk(width, height)
            bucket = _floored(resized[0], self.bucket_reso_steps), _floored(resized[1], self.bucket_reso_steps)
            smallest = max(self.bucket_reso_steps, min(SMALLEST_SIDE, min(self.resolution) // 2))
            if min(bucket) < smallest:
                raise UnfitImage(
                    f"{width} x {height} pixels fill a bucket of {bucket[0]} x {bucket[1]}, less than {smallest} a side "
                    "(bucket_no_upscale)"
                )
        else:
            # A difference of ratios, not of their logarithms: kohya's, and coarser for lying pictures than standing ones.
            bucket = self.resolutions[int(np.abs(self._aspects - width / height).argmin())]
            scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
            resized = _rounded(width * scale), _rounded(height * scale)
        fitted = Fitted((width, height), bucket, resized, (0, 0, *bucket))
        return fitted.cropped_at((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)

    def _shrunk(self, width: int, height: int) -> Size:
        """The size a picture has with bucket_no_upscale: its own, or one of the target area with a side on the steps.

        Which side is put on the steps: the one whose bucket comes out closer to the picture's aspect, the height where
        both are equally close.
        """
        area, steps = math.prod(self.resolution), self.bucket_reso_steps
        if width * height <= area:
            return width, height
        aspect = width / height
        exact_width = math.sqrt(area * aspect)
        by_width = _floored(_rounded(exact_width), steps)
        by_height = _floored(_rounded(area / exact_width), steps)
        beside_width = _floored(_rounded(by_width / aspect), steps)
        beside_height = _floored(_rounded(by_height * aspect), steps)
        # A side of nothing is infinitely far off; kohya divides by it.
        width_error = abs(by_width / beside_width - aspect) if beside_width else math.inf
        height_error = abs(beside_height / by_height - aspect) if by_height else math.inf
        if width_error < height_error:
            return by_width, _rounded(by_width / aspect)
        return _rounded(by_height * aspect), by_height


def resize_and_crop(
    pixels: Image.Image | npt.NDArray[Any], fitted: Fitted, interpolation: str | None = None
) -> npt.NDArray[Any]:
    """The kept part of a picture at the size of its bucket.

    Only that part is computed, from all the pixels it needs, so a strip costs no more than another picture.

    Args:
        pixels: an image, or uint8 [H, W] or [H, W, 3].
        fitted: of a picture of this size.
        interpolation: a name of `INTERPOLATIONS`; None averages (area) where both sides shrink, else Lanczos. Pillow
            does all of them, so bilinear and bicubic do not alias when shrinking, as OpenCV's would.

    Returns:
        uint8 [bucket height, bucket width, ...], contiguous and writable.
    """
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if image.size != fitted.original:
        raise ValueError(f"the picture has {image.size} pixels, not the {fitted.original} its crop was computed for")
    if image.size == fitted.resized:
        return np.array(image.crop(fitted.crop))
    shrinks = all(after < before for after, before in zip(fitted.resized, image.size, strict=True))
    name = interpolation or ("area" if shrinks else "lanczos")
    if name not in INTERPOLATIONS:
        raise UserError(f"resize_interpolation must be one of {', '.join(INTERPOLATIONS)}, got {name}.")
    across, down = (before / after for before, after in zip(image.size, fitted.resized, strict=True))
    left, top, right, bottom = fitted.crop
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    return np.array(image.resize(fitted.bucket, INTERPOLATIONS[name], box=box))


class BucketRow(NamedTuple):
    """samples: pictures times their repeats. cut: mean share of a picture that is not seen."""

    bucket: Size
    images: int
    samples: int
    cut: float


@dataclass(frozen=True)
class BucketTable:
    """Which buckets a data set fills. `str()` is the table for the start of a run."""

    rows: list[BucketRow]
    mean_aspect_error: float
    """Over pictures, without repeats."""

    def info(self) -> dict[str, Any]:
        """The value of `ss_bucket_info`, ready for JSON."""
        buckets = {str(i): {"resolution": [*row.bucket], "count": row.samples} for i, row in enumerate(self.rows)}
        return {"buckets": buckets, "mean_img_ar_error": self.mean_aspect_error}

    def __str__(self) -> str:
        lines = ["     bucket   images  samples  cut off"]
        for (width, height), images, samples, cut in self.rows:
            lines.append(f"{width:5} x {height:<5}{images:7}  {samples:7}  {cut:7.1%}")
        images, samples = sum(row.images for row in self.rows), sum(row.samples for row in self.rows)
        lines.append(
            f"{len(self.rows):5} in all {images:7}  {samples:7}  mean aspect error {self.mean_aspect_error:.4f}"
        )
        return "\n".join(lines)


def bucket_table(fitted: Sequence[Fitted], repeats: Iterable[int]) -> BucketTable:
    """`repeats`: how often each picture is shown in an epoch."""
    found: dict[Size, list[tuple[float, int]]] = {}
    for fit, times in zip(fitted, repeats, strict=True):
        found.setdefault(fit.bucket, []).append((fit.cut, times))
    rows = []
    for bucket, members in sorted(found.items()):
        samples, cut = sum(times for _, times in members), sum(cut for cut, _ in members)
        rows.append(BucketRow(bucket, len(members), samples, cut / len(members)))
    return BucketTable(rows, sum(fit.aspect_error for fit in fitted) / max(1, len(fitted)))


def _rounded(length: float) -> int:
    return int(length + 0.5)


def _floored(length: int, steps: int) -> int:
    return length - length % steps
