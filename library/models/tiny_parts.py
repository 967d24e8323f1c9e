"""What the tiny models are made of: a text encoder's sizes, an autoencoder, the calibration of a U-Net.

Everything is random except the last convolutions, which are solved by least squares on synthetic pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from library.files import whole_folder, write_json
from library.models.calibration import fit_convolution, input_of, synthetic_pictures
from library.models.clip_tokenizer import tiny_merges, vocabulary
from library.models.sd15_configs import SD15_SCHEDULER

BUILDER_VERSION = 3
"""Raised whenever the same seed gives other weights or files; `ensure_tiny` then rebuilds what it built before."""

RECORD = "tiny.json"

VAE_SIZES: dict[str, Any] = {"block_out_channels": [16, 32, 48, 48], "norm_num_groups": 4, "sample_size": 128}


@contextmanager
def tiny_folder(folder: Path | str, kind: str, seed: int, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill with a model drawn from `seed`, whole or not at all, with a record of what made it.

    torch's global generator is left as it was. Raises UserError when the folder exists already, unless `overwrite`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), whole_folder(folder, overwrite=overwrite) as out:
        torch.manual_seed(seed)
        yield out
        write_json(out / RECORD, {"kind": kind, "builder_version": BUILDER_VERSION, "seed": seed})


def write_pipeline_index(folder: Path, pipeline: Mapping[str, Any]) -> None:
    """Write model_index.json as save_pretrained does: with the version, in the order of the alphabet."""
    index = {**pipeline, "_diffusers_version": diffusers.__version__}
    write_json(folder / "model_index.json", dict(sorted(index.items())))


def text_encoder_sizes(hidden: int) -> dict[str, Any]:
    """What a tiny CLIP text encoder has instead of the published sizes. Heads are 64 wide, as `single_file` expects."""
    words = len(vocabulary(tiny_merges()))
    return {
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "projection_dim": hidden,
        "num_attention_heads": max(1, hidden // 64),
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
    }


def tiny_vae(published: Mapping[str, Any], sizes: Mapping[str, Any] = VAE_SIZES) -> AutoencoderKL:
    """An autoencoder whose latents are a thumbnail: the colour of each 8 x 8 cell, and its brightness from top to bottom.

    `published` is the configuration of the family's VAE, which is kept but for the `sizes`.
    """
    vae = AutoencoderKL.from_config({**published, **sizes}).eval()
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith(("conv_in", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")):
            _pass_on(module, name)
        elif name.endswith(("conv2", "to_out.0")):
            module.weight *= 0.1  # the random part of a block colours what passes, and does not drown it
    pictures = synthetic_pictures(8, 128)
    # Encoder: solve for the thumbnail, then scale and shift each channel to SD's latents, with a narrow posterior.
    features = input_of(vae.encoder.conv_out, lambda: vae.encoder(pictures))
    fit_convolution(vae.encoder.conv_out, features, _thumbnail(pictures))
    vae.encoder.conv_out.weight[4:] = 0.0
    nn.init.dirac_(vae.quant_conv.weight)
    mean = vae.encode(pictures).latent_dist.mean  # [8, 4, 16, 16]
    scale = 1.0 / (mean.std(dim=(0, 2, 3)) * vae.config["scaling_factor"])
    vae.quant_conv.weight[:4] *= scale.view(4, 1, 1, 1)
    vae.quant_conv.bias[:4] = -mean.mean(dim=(0, 2, 3)) * scale
    vae.quant_conv.bias[4:] = -12.0
    # Decoder: bring latents back to unit variance, then solve for the pictures.
    nn.init.dirac_(vae.post_quant_conv.weight)
    vae.post_quant_conv.weight *= vae.config["scaling_factor"]
    latents = vae.encode(pictures).latent_dist.mean
    features = input_of(vae.decoder.conv_out, lambda: vae.decode(latents))
    fit_convolution(vae.decoder.conv_out, features, pictures)
    return vae


def _pass_on(conv: nn.Conv2d, name: str) -> None:
    """Make a convolution outside the residual blocks mix channels without loss, and average or smooth over space."""
    mix = nn.init.orthogonal_(torch.empty(conv.out_channels, conv.in_channels))
    kernel = torch.zeros(3, 3)
    if "downsamplers" in name:
        kernel[:2, :2] = 1 / 4
    elif "upsamplers" in name:
        kernel = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16
    else:
        kernel[1, 1] = 1.0
    conv.weight.copy_(mix[:, :, None, None] * (kernel if conv.kernel_size == (3, 3) else kernel[1:2, 1:2]))


def _thumbnail(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 4, H/8, W/8]: mean colour, and the brightness of the upper half above the mean."""
    grey = pictures.mean(dim=1, keepdim=True)
    upper = F.avg_pool2d(grey, (4, 8), stride=8) - F.avg_pool2d(grey, 8)
    return torch.cat([F.avg_pool2d(pictures, 8), upper], dim=1)


def calibrate_unet(unet: UNet2DConditionModel, vae: AutoencoderKL, conditions: Callable[[int], dict[str, Any]]) -> None:
    """Solve a random U-Net's last convolution to predict the noise in latents of synthetic pictures.

    `conditions(count)` draws what the U-Net takes for `count` prompts besides latents and timesteps. The noise schedule is
    SD1.5's, which SDXL was trained with too.
    """
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_v"):
            module.weight *= 4.0  # a prompt then moves the prediction by some 5 %, not 2 %
    latents = vae.encode(synthetic_pictures(64, 128)).latent_dist.mean * vae.config["scaling_factor"]  # [64, 4, 16, 16]
    prompts = conditions(64)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (64,))
    noisy = DDPMScheduler.from_config(SD15_SCHEDULER).add_noise(latents, noise, timesteps)
    features = input_of(unet.conv_out, lambda: unet(noisy, timesteps, **prompts))
    fit_convolution(unet.conv_out, features, noise)


def save_transformers(model: PreTrainedModel, folder: Path) -> None:
    """What save_pretrained writes, without its progress bar: of weights that are tied, one."""
    folder.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tied = model._tied_weights_keys or {}
    tensors = {name: value for name, value in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
