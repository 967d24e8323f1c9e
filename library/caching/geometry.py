"""Which pixels of a picture are encoded: one square for all, or what its bucket keeps of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from library.data.buckets import Fitted, Size, resize_and_crop
from library.data.pixels import UnreadableImage, square_crop
from library.data.sources import Sample

BUCKET_PIXELS_VERSION = 1
"""Part of the fingerprint of every bucketed entry. Raise it when `resize_and_crop` gives other pixels for the same file."""


class Geometry(Protocol):
    """How pictures are cut. Called from several threads."""

    @property
    def same_for_all(self) -> bool:
        """Whether `facts` is None for every picture."""

    def size(self, sample: Sample) -> Size:
        """(width, height) of what comes out; pictures of one size are encoded together."""

    def facts(self, sample: Sample) -> dict[str, Any] | None:
        """What decides the pixels of this picture beside its file and the facts of the store; None where nothing does."""

    def hidden_colours(self, sample: Sample) -> bool:
        """Whether the colours under its transparent pixels are seen (see `decode_rgb`)."""

    def __call__(self, sample: Sample, image: Image.Image) -> npt.NDArray[np.uint8]:
        """RGB image -> uint8 [height, width, 3], contiguous. Raises UnreadableImage where the image cannot be cut so."""


@dataclass(frozen=True)
class SquareCrop:
    """The centre of every picture, its short side scaled to `resolution`."""

    resolution: int
    same_for_all = True

    def size(self, sample: Sample) -> Size:
        return self.resolution, self.resolution

    def facts(self, sample: Sample) -> None:
        return None

    def hidden_colours(self, sample: Sample) -> bool:
        return False

    def __call__(self, sample: Sample, image: Image.Image) -> npt.NDArray[np.uint8]:
        return square_crop(image, self.resolution)


class Cut(NamedTuple):
    """What is kept of one picture, and by which filter it is scaled (a name of `INTERPOLATIONS`, None: by the direction).

    hidden_colours: the picture has transparency, and the colours under it are kept.
    """

    fitted: Fitted
    interpolation: str | None
    hidden_colours: bool = False


@dataclass(frozen=True)
class BucketCrop:
    """Each picture as its bucket has it, by sample id."""

    cuts: Mapping[str, Cut]
    same_for_all = False

    def size(self, sample: Sample) -> Size:
        return self.cuts[sample.sample_id].fitted.bucket

    def facts(self, sample: Sample) -> dict[str, Any]:
        fitted, interpolation, hidden_colours = self.cuts[sample.sample_id]
        scaled = fitted.original != fitted.resized
        facts = {
            "resized": fitted.resized,
            "crop": fitted.crop,
            "interpolation": interpolation if scaled else None,
            "bucket_pixels": BUCKET_PIXELS_VERSION,
        }
        # Not where it changes nothing, so that entries stay what they are.
        return facts | ({"hidden_colours": True} if hidden_colours else {})

    def hidden_colours(self, sample: Sample) -> bool:
        return self.cuts[sample.sample_id].hidden_colours

    def __call__(self, sample: Sample, image: Image.Image) -> npt.NDArray[np.uint8]:
        fitted, interpolation, _ = self.cuts[sample.sample_id]
        if image.size != fitted.original:
            raise UnreadableImage(
                sample.path, "{} x {} pixels, not the {} x {} of its header".format(*image.size, *fitted.original)
            )
        return resize_and_crop(image, fitted, interpolation)
