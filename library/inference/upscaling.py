"""Upscalers of the hires fix by A1111's names: six for latents, three for pictures.

Latent upscalers need no decoding but leave artefacts that the second pass has to remove (denoising strength of about 0.5 or more);
for the others, pictures are decoded, enlarged and encoded again. Sizes are in pixels, multiples of 8. No torch on import.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from PIL import Image

from library.errors import UserError
from library.options.parser import nearest

if TYPE_CHECKING:
    from torch import Tensor

SIZE_STEP = 8  # pixels per latent


@dataclass(frozen=True)
class LatentUpscaler:
    """Enlarges latents by torch's interpolation."""

    mode: Literal["bilinear", "bicubic", "nearest", "nearest-exact"]
    antialias: bool = False

    def __call__(self, latents: Tensor, width: int, height: int) -> Tensor:
        """[B, C, h, w] to [B, C, height / 8, width / 8], of the same dtype; computed in float32."""
        from torch.nn.functional import interpolate

        size = (_latent_side("height", height), _latent_side("width", width))
        return interpolate(latents.float(), size=size, mode=self.mode, antialias=self.antialias).to(latents.dtype)


@dataclass(frozen=True)
class PictureUpscaler:
    """Enlarges pictures by Pillow's resampling."""

    resampling: Image.Resampling

    def __call__(self, picture: Image.Image, width: int, height: int) -> Image.Image:
        return picture.resize((width, height), self.resampling)


LATENT_UPSCALERS: dict[str, LatentUpscaler] = {
    "Latent": LatentUpscaler("bilinear"),
    "Latent (antialiased)": LatentUpscaler("bilinear", antialias=True),
    "Latent (bicubic)": LatentUpscaler("bicubic"),
    "Latent (bicubic antialiased)": LatentUpscaler("bicubic", antialias=True),
    "Latent (nearest)": LatentUpscaler("nearest"),
    "Latent (nearest-exact)": LatentUpscaler("nearest-exact"),
}
PICTURE_UPSCALERS: dict[str, PictureUpscaler] = {
    # As in A1111, pictures are resized with Lanczos where no upscaler is chosen: the second pass needs its size.
    "None": PictureUpscaler(Image.Resampling.LANCZOS),
    "Lanczos": PictureUpscaler(Image.Resampling.LANCZOS),
    "Nearest": PictureUpscaler(Image.Resampling.NEAREST),
}
UPSCALERS: dict[str, LatentUpscaler | PictureUpscaler] = {**LATENT_UPSCALERS, **PICTURE_UPSCALERS}


def find_upscaler(name: str) -> LatentUpscaler | PictureUpscaler:
    """The upscaler of a name, in any case. Raises UserError for an unknown one, with the nearest."""
    by_word = {known.lower(): upscaler for known, upscaler in UPSCALERS.items()}
    found = by_word.get(" ".join(name.split()).lower())
    if found is None:
        known = ", ".join(UPSCALERS)
        raise UserError(
            f"{name} is no upscaler{nearest(name, UPSCALERS)}. Known are {known}; neural upscalers (ESRGAN) are not supported."
        )
    return found


def target_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Width and height in pixels, `scale` times as large, each rounded down to a multiple of 8, as A1111 does.

    Raises UserError where scale is not positive and finite, or a side would be below 8 pixels.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"An upscaler's scale must be above 0 (2 doubles width and height), got {scale}.")
    # 360 * 1.4 is 503.99999999999994 in floating point; it must become 504.
    sides = [math.floor(side * scale + 1e-6) // SIZE_STEP * SIZE_STEP for side in (width, height)]
    if min(sides) < SIZE_STEP:
        raise UserError(
            f"{width} x {height} times {scale:g} leaves a side below {SIZE_STEP} pixels. Use a larger scale."
        )
    return sides[0], sides[1]


def _latent_side(name: str, pixels: int) -> int:
    if pixels < SIZE_STEP or pixels % SIZE_STEP:
        raise UserError(f"{name} must be a multiple of {SIZE_STEP}, got {pixels}.")
    return pixels // SIZE_STEP
