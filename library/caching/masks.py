"""Masks of the loss, cut as their pictures are. They are small and quick to read, so they are not cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from library.data.buckets import Fitted, Size
from library.data.image_headers import read_header
from library.data.pixels import FORMATS, UnreadableImage, decode_rgb
from library.errors import UserError

Weights = npt.NDArray[np.float32]


def latent_mask(mask: Path | npt.NDArray[Any], fitted: Fitted, size: Size, flipped: bool = False) -> Weights:
    """The weight of each latent of a picture, from 0 to 1: the mean of the mask over the pixels that it stands for.

    Args:
        mask: an image file of the picture's aspect and any size, of which the red channel counts, under transparency too; or
            values from 0 to 255 [H, W] of the picture's own size, as from `alpha_channel`.
        fitted: how the picture is cut. size: rows and columns of its latents. flipped: it is mirrored then.

    Returns:
        float32 of that size.

    Raises:
        UnreadableImage: the file gives no picture.
        UserError: its aspect is another than the picture's.
    """
    if isinstance(mask, Path):
        colours = np.asarray(decode_rgb(mask, name=str(mask), hidden_colours=True))
        values = Image.fromarray(colours[..., 0].astype(np.float32))
        _require_aspect(mask, values.size, fitted.original)
    else:
        values = Image.fromarray(np.asarray(mask, np.float32))
    across, down = (side / scaled for side, scaled in zip(values.size, fitted.resized, strict=True))
    left, top, right, bottom = fitted.crop
    box = (left * across, top * down, min(right * across, values.width), min(bottom * down, values.height))
    weights = np.asarray(values.resize((size[1], size[0]), Image.Resampling.BOX, box=box), np.float32) / 255.0
    return np.ascontiguousarray(weights[:, ::-1] if flipped else weights)


def alpha_channel(path: Path) -> npt.NDArray[np.uint8]:
    """How opaque each pixel of an image file is, uint8 [H, W], upright; 255 throughout where it has no transparency.

    Raises UnreadableImage as `decode_rgb` does.
    """
    read_header(path)  # refuses what is not an image or too large
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return np.full((upright.height, upright.width), 255, np.uint8)
            return np.array(upright.convert("RGBA").getchannel("A"))
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise UnreadableImage(str(path), (str(error).splitlines() or [type(error).__name__])[0]) from error


def _require_aspect(path: Path, mask: tuple[int, int], image: tuple[int, int]) -> None:
    (mask_width, mask_height), (width, height) = mask, image
    if abs(mask_width - width * mask_height / height) > 1 and abs(mask_height - height * mask_width / width) > 1:
        raise UserError(
            f"The mask {path} is {mask_width} x {mask_height}, another shape than its image of {width} x {height}. Cut it alike."
        )
