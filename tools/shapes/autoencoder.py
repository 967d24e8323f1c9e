"""The autoencoder of the tiny base: SD1.5's, eight pixels to a latent, narrow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from torch import Tensor

from library.models.sd15_configs import SD15_VAE
from library.models.tiny_parts import tiny_vae
from tools.shapes.fit import Record, fit
from tools.shapes.pictures import Pictures, batches

SIZES = {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 4, "sample_size": 128}
CONFIG = {**SD15_VAE, **SIZES}
BATCH, RATE = 8, 1e-3
CROP = 64  # of most steps: more of them in the same time, and of as many pictures each
WHOLE_PICTURES = 0.08  # the last steps: normalisation sees a whole picture when it counts
KL_WEIGHT = 1e-6  # as the LDM paper's autoencoders (Rombach et al. 2022, appendix G)


def train_autoencoder(pictures: Pictures, steps: int) -> tuple[AutoencoderKL, Record]:
    """Trained on absolute and squared error and a slight KL divergence, from the untrained tiny base's thumbnails.

    What it has to draw later is not known, so half of the pictures have their channels exchanged and scaled.
    """
    with torch.no_grad():
        vae = tiny_vae(SD15_VAE, SIZES)
    vae = vae.to(memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(1)

    def loss_at(step: int, indices: Tensor) -> Tensor:
        pixels = recoloured(pictures.pixels[indices].float() / 127.5 - 1.0, generator)
        if step < steps * (1.0 - WHOLE_PICTURES):
            pixels = _cropped(pixels, generator)
        if step % 2:
            pixels = pixels.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels.to(memory_format=torch.channels_last)).latent_dist
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(1).mean()
        return F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + KL_WEIGHT * divergence

    record = fit("autoencoder", {"vae": vae}, loss_at, list(batches(len(pictures), BATCH, steps, 1)), RATE)
    vae.eval().to(memory_format=torch.contiguous_format)
    scale_latents(vae, pictures.pixels[:512])
    return vae, record


def _cropped(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random square of each picture, [B, 3, CROP, CROP]."""
    corners = torch.randint(pixels.shape[-1] - CROP + 1, (len(pixels), 2), generator=generator).tolist()
    return torch.stack([one[:, y : y + CROP, x : x + CROP] for one, (y, x) in zip(pixels, corners, strict=True)])


def recoloured(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 3, H, W] in -1..1: every other picture with its channels in another order, nearer to one another, or darker."""
    changed = pixels.clone()
    for index in range(0, len(pixels), 2):
        order = torch.randperm(3, generator=generator)
        scale, shift = torch.rand(2, 3, 1, 1, generator=generator)
        changed[index] = (pixels[index][order] * (0.4 + 0.6 * scale) + 0.5 * (shift - 0.5)).clamp(-1.0, 1.0)
    return changed


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Change the two 1 x 1 convolutions so that SD1.5's scaling factor gives latents of `pixels` unit variance.

    pixels: [N, 3, H, W] uint8.
    """
    means = torch.cat([vae.encode(part.float() / 127.5 - 1.0).latent_dist.mean for part in pixels.split(32)])
    wanted = 1.0 / vae.config["scaling_factor"]
    scale = wanted / means.std(dim=(0, 2, 3))  # [4]
    shift = -means.mean(dim=(0, 2, 3)) * scale
    width = len(scale)
    vae.quant_conv.weight[:width] *= scale.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:width] = vae.quant_conv.bias[:width] * scale + shift
    vae.quant_conv.bias[width:] += 2.0 * scale.log()
    vae.post_quant_conv.bias -= vae.post_quant_conv.weight.flatten(1) @ (shift / scale)
    vae.post_quant_conv.weight /= scale.view(1, -1, 1, 1)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures [N, 3, H, W] uint8 of the peak signal-to-noise ratio in decibels, values in 0..1."""
    found = []
    for part in pixels.split(32):
        values = part.float() / 127.5 - 1.0
        decoded = vae.decode(vae.encode(values).latent_dist.mean).sample.clamp(-1.0, 1.0)
        found.append(-10.0 * ((decoded - values) / 2.0).square().mean(dim=(1, 2, 3)).log10())
    return float(torch.cat(found).mean())
