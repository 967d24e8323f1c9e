"""What can be measured of a picture in a few milliseconds, without a model: sharpness, exposure, borders, writing, likeness.

Measured is what training sees of it: the part that its bucket keeps, at the size it is trained in or at its own where that is less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from library.data.buckets import Buckets, Fitted
from library.data.pixels import Glance, UnreadableImage, glance
from library.progress import doing

SIDE = 512
"""Pixels of the longer side of what is measured."""
THUMBNAIL = 160
READERS = 4
LAYOUT = 16
"""Cells a side of a picture's colours."""
_HASHED, _LOW = 32, 8  # sides of a perceptual hash: the picture, and the low frequencies that are kept of it
_BLUR = 9  # pixels over which Crete et al. average
_STEEP, _FAINT = 2, 2.0  # percent of the pixels that are looked at, and the least step there, of 255
_BORDER_NOISE = 12  # of 255: what JPEG makes of one colour
_LEAST_BORDER = 0.015  # of a side
_FAR = 0.7  # of the way across, where the opposite border has not begun
_REGULAR = 0.45  # of a spectrum, in one frequency

Grey = npt.NDArray[np.float32]

Read = Callable[[], bytes]
"""Gives the bytes of a picture's file. Raises UnreadableImage."""
Fit = Callable[[int, int], Fitted]
"""Gives the bucket of a picture of so many pixels, and what it keeps."""


class Asked(NamedTuple):
    """A picture to be measured."""

    name: str
    read: Read
    fit: Fit


class Borders(NamedTuple):
    """Shares of the height or width that are of one colour and end in a straight line."""

    left: float = 0.0
    top: float = 0.0
    right: float = 0.0
    bottom: float = 0.0


@dataclass(frozen=True)
class Measures:
    thumbnail: Image.Image
    """The whole picture, at most THUMBNAIL pixels a side."""
    fitted: Fitted
    blur: float
    """0 (crisp) to 1; see `blur_of`."""
    dark: float
    """The 1st percentile of its luminance, 0 to 255."""
    bright: float
    """The 99th."""
    borders: Borders
    writing: float
    """Share of its area in lines that look like writing."""
    transparent: float
    turned: bool
    hashed: npt.NDArray[np.int8]
    """[64] of -1 and 1: a perceptual hash of the whole picture."""
    mirrored: npt.NDArray[np.int8]
    """The hash of its mirror image."""
    colours: npt.NDArray[np.float32]
    """[16, 16, 3], 0 to 255: mean colours of its cells."""

    @property
    def enlarged(self) -> float:
        """Pixels of the trained picture for each of the file's, along a side."""
        return self.fitted.resized[0] / self.fitted.original[0]


def seen_part(picture: Glance, fitted: Fitted, side: int) -> Image.Image:
    """What training sees of a picture, the longer side at most `side` pixels, and never enlarged."""
    image = picture.image
    across, down = image.width / fitted.resized[0], image.height / fitted.resized[1]
    left, top, right, bottom = fitted.crop
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    shrink = min(1.0, side / max(fitted.bucket), across, down)
    size = (max(round(fitted.bucket[0] * shrink), 1), max(round(fitted.bucket[1] * shrink), 1))
    return image.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def measure(data: bytes, name: str, fit: Fit) -> Measures:
    """Measures of a picture from the bytes of its file. Raises UnreadableImage."""
    picture = glance(data, name=name, least=SIDE)
    fitted = fit(*picture.size)
    seen = seen_part(picture, fitted, SIDE)
    grey = np.asarray(seen.convert("L"), np.float32)
    thumbnail = picture.image.copy()
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=2.0)
    hashed, mirrored = perceptual_hashes(thumbnail)
    dark, bright = np.percentile(grey, (1, 99))
    return Measures(
        thumbnail,
        fitted,
        blur_of(grey),
        float(dark),
        float(bright),
        borders_of(np.asarray(seen, np.int16)),
        writing_of(grey),
        picture.transparent,
        picture.turned,
        hashed,
        mirrored,
        np.asarray(thumbnail.resize((LAYOUT, LAYOUT), Image.Resampling.BOX), np.float32),
    )


def square(side: int) -> Fit:
    """The cut of class pictures: their centre as a square."""
    return Buckets((side, side), enable_bucket=False).fit


def measure_all(pictures: Sequence[Asked]) -> list[Measures | UnreadableImage]:
    """Measures of many pictures, in order; the error in the place of one that cannot be read."""

    def one(picture: Asked) -> Measures | UnreadableImage:
        try:
            return measure(picture.read(), picture.name, picture.fit)
        except UnreadableImage as error:
            return error

    found = []
    with doing("looking at pictures", len(pictures)) as activity, ThreadPoolExecutor(READERS) as pool:
        for measured in pool.map(one, pictures):
            found.append(measured)
            activity.advance()
    return found


def blur_of(grey: Grey) -> float:
    """How soft the steepest edges are: 1/9 for steps from one pixel to the next, towards 1 the wider they are.

    After Crete et al. 2007, "The blur effect": averaging over nine pixels takes most of a sharp edge's steepness away, and little
    of a soft one's. Theirs is of all pixels, and takes smooth shading and shallow focus for blur. The crisper of the two directions
    counts; 0 where there is no edge at all.
    """
    return min(_blur_along(grey), _blur_along(grey.T))


def _blur_along(grey: Grey) -> float:
    if grey.shape[1] <= _BLUR + 1:
        return 0.0
    sums = np.cumsum(grey, axis=1)
    averaged = (sums[:, _BLUR:] - sums[:, :-_BLUR]) / _BLUR  # column j is the mean around j + 5
    after = np.abs(np.diff(averaged, axis=1))
    before = np.abs(np.diff(grey, axis=1))[:, (_BLUR + 1) // 2 :][:, : after.shape[1]]
    steep = before >= max(float(np.percentile(before, 100 - _STEEP)), _FAINT)
    total = float(before[steep].sum())
    return float(np.minimum(after, before)[steep].sum()) / total if total else 0.0


def borders_of(pixels: npt.NDArray[np.int16]) -> Borders:
    """[H, W, 3]: strips along the sides of one colour each, that end in a straight line across the picture."""
    height, width = pixels.shape[:2]
    columns = pixels.transpose(1, 0, 2)
    return Borders(
        _strip(columns) / width, _strip(pixels) / height, _strip(columns[::-1]) / width, _strip(pixels[::-1]) / height
    )


def _strip(rows: npt.NDArray[np.int16]) -> int:
    """How many of the first rows are a border: all of one colour, and what follows differs from it nearly everywhere."""
    colour = np.median(rows[0], axis=0).astype(rows.dtype)

    def others(part: npt.NDArray[np.int16]) -> npt.NDArray[np.intp]:
        """Rows that are not of the border's colour."""
        return np.flatnonzero((np.abs(part - colour).max(axis=2) > _BORDER_NOISE).mean(axis=1) > 0.02)

    if len(others(rows[: max(3, math.ceil(_LEAST_BORDER * len(rows)))])):
        return 0
    inner = others(rows[: round(_FAR * len(rows))])
    if not len(inner) or inner[0] >= len(rows) // 2:
        return 0
    end = int(inner[0])
    if inner[-1] + 1 - end - len(inner) > 2:  # the colour comes again: stripes
        return 0
    # Scaling leaves one or two mixed rows between a border and the picture. A slow gradient differs only after more of them.
    after = rows[end + 1 : end + 5]
    jump = (np.abs(after - rows[end - 3]).max(axis=2) > _BORDER_NOISE).mean(axis=1)
    return end if len(after) and jump.max() > 0.75 and after.astype(np.float32).std(axis=1).mean() > 6 else 0


def writing_of(grey: Grey) -> float:
    """Share of a picture in lines that look like writing: many upright strokes in a row, with calm above and below.

    A guess from edges, which misses large letters. Strokes at one distance are a railing's or stripes: of sixteen lines
    of writing in photographs none has more than a third of its spectrum in one frequency, of a gate's bars more than half is.
    """
    from scipy import ndimage

    height, width = grey.shape
    if min(height, width) < 64:
        return 0.0
    strokes = (np.abs(np.diff(grey, axis=1)) > 48).astype(np.float32)
    dense = ndimage.uniform_filter(strokes, (3, 25)) > 0.2
    labels, count = ndimage.label(dense)
    area = 0
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        if not (7 <= tall <= height / 6 and wide >= max(3 * tall, 48)):
            continue
        full = (labels[rows, columns] == number).mean()
        calm = [
            strokes[max(rows.start - tall // 2, 0) : rows.start, columns],
            strokes[rows.stop : rows.stop + max(tall // 2, 1), columns],
        ]
        around = max((float(part.mean()) for part in calm if part.size), default=1.0)
        if full > 0.6 and around < 0.05 and not _is_regular(strokes[rows, columns].mean(axis=0)):
            area += tall * wide
    return area / (height * width)


def _is_regular(strokes: Grey) -> bool:
    """Whether strokes [W] come at one distance."""
    spectrum = np.square(np.abs(np.fft.rfft(strokes - strokes.mean())))[1:]
    return bool(spectrum.max() > _REGULAR * spectrum.sum())


def perceptual_hashes(image: Image.Image) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """The signs, about their median, of a picture's lowest 8 x 8 cosine frequencies [64], and those of its mirror image.

    As pHash (Zauner 2010) has it; a mirror image has the odd horizontal frequencies with the other sign.
    """
    grey = np.asarray(image.convert("L").resize((_HASHED, _HASHED), Image.Resampling.BOX), np.float32)
    low = _COSINES @ grey @ _COSINES.T  # [8, 8], rows are vertical frequencies
    return _signs(low), _signs(low * np.where(np.arange(_LOW) % 2, -1, 1))


def _signs(low: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    values = low.ravel()
    return np.where(values > np.median(values[1:]), 1, -1).astype(np.int8)  # the first is the mean


_COSINES = np.array(
    [[math.cos(math.pi * k * (2 * x + 1) / (2 * _HASHED)) for x in range(_HASHED)] for k in range(_LOW)], np.float32
)
