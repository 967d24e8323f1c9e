"""The frozen encoders as caches use them: pixels to latents, pixels to tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from torch import Tensor

from library.errors import UserError
from library.models.teachers import VisionTeacher

PROMPTS_AT_ONCE = 64
# Between them diffusers keeps log-variances, as LDM's code did. At the floor a draw is the mean, to 1 part in 3 million.
LOG_VARIANCE_FLOOR, LOG_VARIANCE_CEILING = -30.0, 20.0


class VaeEncoder:
    """Pixels to scaled latents. Takes the posterior's mode: a cache with noise in it could not be checked."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        if vae.device.type == "cpu":
            # 8 % of the CPU-seconds of a picture of 256 px (float32, AVX-512): nothing is brought into another order and back.
            vae.encoder.to(memory_format=torch.channels_last)
        self.scaling_factor = float(vae.config["scaling_factor"])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float16 [B, C, H/f, W/f], near zero mean and unit variance."""
        mean, _ = self.moments(pixels)
        return (mean.float() * self.scaling_factor).to(torch.float16)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, unscaled, in the model's dtype, both [B, C, H/f, W/f]."""
        _require_uint8(pixels)
        factor = pixels_of_latent(self.vae)
        if pixels.shape[-1] % factor or pixels.shape[-2] % factor:
            raise UserError(
                f"The VAE needs sides that are multiples of {factor}, got {tuple(pixels.shape[-2:])}. Change --resolution."
            )
        inputs = pixels.to(self.vae.device).float() / 127.5 - 1.0
        posterior = self.vae.encode(inputs.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.logvar


class MomentsEncoder:
    """Pixels to the VAE's posterior, unscaled, so that training can sample from it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = VaeEncoder(vae)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float16 [B, 2C, H/f, W/f]: the channels of means, then those of log-variances."""
        mean, log_variance = self._vae.moments(pixels)
        return torch.cat([mean, log_variance.clamp(LOG_VARIANCE_FLOOR, LOG_VARIANCE_CEILING)], dim=1).to(torch.float16)


class TeacherEncoder:
    """Pixels to a teacher's patch tokens, pooled to a grid of the crop's aspect.

    The whole crop is resized, so that token (r, c) of the grid and latent (r, c) of a map of that many rows and columns
    show the same place; the tokens keep their true grid of one per patch until they are pooled by area.

    resolution: side that a square crop is resized to, a multiple of the patch size (224, 448, 518). grid: tokens per side that come
    out of it, at most resolution / patch. Raises UserError otherwise. Of crops that are no squares there are about as many patches
    and tokens, in their aspect (`grid_in_aspect`).
    """

    def __init__(self, teacher: VisionTeacher, resolution: int, grid: int) -> None:
        self.side = patches_of(teacher.size.patch, resolution, grid)
        self.teacher, self.patch, self.grid, self.width = teacher, teacher.size.patch, grid, teacher.size.width

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float16 [B, N, D], row-major, after the final layer norm, not normalised."""
        height, width = pixels.shape[-2:]
        grid = grid_in_aspect(self.grid, width, height)
        tokens = self.patch_tokens(pixels)  # [B, D, h, w]
        return F.adaptive_avg_pool2d(tokens, grid).flatten(2).transpose(1, 2).to(torch.float16)

    @torch.no_grad()
    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Patch tokens on their true grid: float32 [B, D, h, w]."""
        pictures = self._pictures(pixels)
        grid = tuple(side // self.patch for side in pictures.shape[-2:])
        return self.teacher.patch_tokens(pictures).float().transpose(1, 2).unflatten(2, grid)

    def _pictures(self, pixels: Tensor) -> Tensor:
        _require_uint8(pixels)
        pictures = pixels.to(self.teacher.model.device).float() / 255.0
        rows, columns = grid_in_aspect(self.side, pixels.shape[-1], pixels.shape[-2])
        size = (rows * self.patch, columns * self.patch)
        if pictures.shape[-2:] != size:
            pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False)
        # Bicubic overshoots at edges, and no picture the teacher saw did.
        return pictures.clamp(0.0, 1.0)


def patches_of(patch: int, resolution: int, grid: int) -> int:
    """Patches per side of a square. Raises UserError where the resolution is no multiple of the patch, or the grid is finer."""
    if resolution % patch:
        below = resolution // patch * patch
        raise UserError(
            f"dino_resolution must be a multiple of the patch size {patch}, got {resolution}. Nearest: {below or patch} "
            f"and {below + patch}."
        )
    side = resolution // patch
    if not 1 <= grid <= side:
        raise UserError(
            f"token_grid must lie between 1 and {side}, the patches per side at dino_resolution {resolution}, got "
            f"{grid}. Raise dino_resolution to {grid * patch} or lower token_grid."
        )
    return side


def pixels_of_latent(vae: Any) -> int:
    """Pixels to a latent of an AutoencoderKL, along one side: every level but the last halves."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def grid_in_aspect(side: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of about side² cells for a picture of this aspect; of a square, `side` and `side`.

    The shorter one first, and the longer one from it, so that the cells come out as square as whole numbers allow.
    """
    short, long = min(width, height), max(width, height)
    fewer = max(1, int(side * (short / long) ** 0.5 + 0.5))
    more = int(fewer * long / short + 0.5)
    return (more, fewer) if height > width else (fewer, more)


def quantize_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [..., N, D] -> int8 of the same shape, and a float16 scale [..., N] per token: absmax / 127.

    Rounded against the scale as stored, so that its own rounding costs nothing. A token of zeros stays zero. The cosine to
    what went in is 1 - (absmax / rms / 127)^2 / 24: at least 0.999 while no value exceeds 19 times the token's rms.
    """
    values = tokens.float()
    scale = (values.abs().amax(dim=-1) / 127.0).to(torch.float16)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    return (values / divisor.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_tokens(values: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantize_tokens`: float32 [..., N, D]."""
    return values.float() * scale.float().unsqueeze(-1)


def _require_uint8(pixels: Tensor) -> None:
    """A defect of the caller, not of the user: float pixels would be scaled twice without a sign of it."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise TypeError(f"pixels must be uint8 [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
