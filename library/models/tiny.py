"""A Stable Diffusion 1.5 and a DINOv2 small enough to build in seconds, for demos and tests without a download.

The real classes in the real folder layout, with SD1.5's tensor names and small widths. The weights are random except the
last convolutions of U-Net, encoder and decoder, which are solved by least squares on synthetic pictures: so latents
look like Stable Diffusion's (zero mean, unit variance), decoding them gives a blurred picture, and the U-Net predicts noise
better than zero does. Nobody would call it a generator of images.

    python -m library.models.tiny --out models/tiny-sd15 [--kind sd15|dinov2] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import DDPMScheduler
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model, PreTrainedModel

from library.errors import UserError, script
from library.files import human_bytes, read_json, whole_folder, write_json
from library.models.calibration import fit_convolution, input_of, synthetic_pictures
from library.models.clip_tokenizer import tiny_merges, vocabulary, write_tokenizer
from library.models.locate import TINY_DINOV2, TINY_SD15
from library.models.sd15_configs import SD15_SCHEDULER, SD15_TEXT_ENCODER, SD15_UNET, SD15_VAE

BUILDER_VERSION = 2
"""Raised whenever the same seed gives other weights or files; `ensure_tiny` then rebuilds what it built before."""

MODELS = Path(__file__).resolve().parents[2] / "models"
RECORD = "tiny.json"

HIDDEN = 64
UNET = {**SD15_UNET, "block_out_channels": [32, 64, 96, 96], "cross_attention_dim": HIDDEN, "sample_size": 16}
VAE = {**SD15_VAE, "block_out_channels": [16, 32, 48, 48], "norm_num_groups": 4, "sample_size": 128}
TEXT_ENCODER = {
    **SD15_TEXT_ENCODER,
    "vocab_size": len(vocabulary(tiny_merges())),
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "projection_dim": HIDDEN,
    "num_attention_heads": 1,
    "bos_token_id": len(vocabulary(tiny_merges())) - 2,
    "eos_token_id": len(vocabulary(tiny_merges())) - 1,
    "pad_token_id": len(vocabulary(tiny_merges())) - 1,
}
DINOV2_CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 518,  # 37 x 37 positions, as Meta's models
}
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def build_tiny_sd15(folder: Path | str, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write a whole diffusers folder that StableDiffusionPipeline loads. Same seed, same machine: same bytes.

    Raises UserError when the folder exists already, unless `overwrite`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), whole_folder(folder, overwrite=overwrite) as out:
        torch.manual_seed(seed)
        vae = _tiny_vae()
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).eval()
        unet = _tiny_unet(vae, text_encoder)
        vae.save_pretrained(out / "vae")
        _save(text_encoder, out / "text_encoder")
        unet.save_pretrained(out / "unet")
        write_tokenizer(out / "tokenizer", tiny_merges())
        write_json(out / "scheduler" / "scheduler_config.json", SD15_SCHEDULER)
        write_json(out / "model_index.json", PIPELINE)
        write_json(out / RECORD, {"kind": TINY_SD15, "builder_version": BUILDER_VERSION, "seed": seed})
    return Path(folder)


def build_tiny_dinov2(folder: Path | str, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write a transformers folder of a three-layer Dinov2Model whose tokens say much of the patch, little of its place.

    Raises UserError when the folder exists already, unless `overwrite`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), whole_folder(folder, overwrite=overwrite) as out:
        torch.manual_seed(seed)
        model = Dinov2Model(Dinov2Config(**DINOV2_CONFIG)).eval()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # Unit variance in, unit variance out: with the usual 0.02 the position would drown the patch.
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        model.embeddings.position_embeddings.normal_(std=0.02)
        _save(model, out)
        write_json(out / RECORD, {"kind": TINY_DINOV2, "builder_version": BUILDER_VERSION, "seed": seed})
    return Path(folder)


def ensure_tiny(name: str) -> Path:
    """The folder `models/<name>` of this project, built if absent or made by another version of the builder.

    Processes that start together wait for the first one to build it. Raises UserError for an unknown name, and rather
    than overwrite a folder that this module did not make.
    """
    if name not in BUILDERS:
        raise UserError(f"{name} is not a tiny model of this project. Known: {', '.join(BUILDERS)}.")
    folder = MODELS / name
    if _is_current(folder):
        return folder
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS / f".{name}.lock"):
        if folder.exists() and not (folder / RECORD).exists():
            raise UserError(f"{folder} was not made by this project ({RECORD} is missing). Move it to another name.")
        if not _is_current(folder):
            BUILDERS[name](folder, overwrite=True)
    return folder


def _is_current(folder: Path) -> bool:
    record = folder / RECORD
    return record.exists() and read_json(record).get("builder_version") == BUILDER_VERSION


def _tiny_vae() -> AutoencoderKL:
    """An autoencoder whose latents are a thumbnail: the colour of each 8 x 8 cell, and its brightness from top to bottom."""
    vae = AutoencoderKL.from_config(VAE).eval()
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


def _tiny_unet(vae: AutoencoderKL, text_encoder: CLIPTextModel) -> UNet2DConditionModel:
    """A random U-Net whose last convolution is solved to predict the noise in latents of synthetic pictures."""
    unet = UNet2DConditionModel.from_config(UNET).eval()
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_v"):
            module.weight *= 4.0  # a prompt then moves the prediction by some 5 %, not 2 %
    latents = vae.encode(synthetic_pictures(64, 128)).latent_dist.mean * vae.config["scaling_factor"]  # [64, 4, 16, 16]
    words = text_encoder(torch.randint(TEXT_ENCODER["vocab_size"], (64, 77))).last_hidden_state
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (64,))
    noisy = DDPMScheduler.from_config(SD15_SCHEDULER).add_noise(latents, noise, timesteps)
    features = input_of(unet.conv_out, lambda: unet(noisy, timesteps, words))
    fit_convolution(unet.conv_out, features, noise)
    return unet


def _save(model: PreTrainedModel, folder: Path) -> None:
    """What save_pretrained writes, without its progress bar."""
    folder.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


BUILDERS: dict[str, Callable[..., Path]] = {TINY_SD15: build_tiny_sd15, TINY_DINOV2: build_tiny_dinov2}


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m library.models.tiny", description="Build a tiny model to try things."
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist yet")
    parser.add_argument("--kind", choices=("sd15", "dinov2"), default="sd15", help="which model (default: sd15)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    options = parser.parse_args(argv)
    folder = BUILDERS[f"tiny-{options.kind}"](options.out, options.seed)
    print(f"{folder}: {human_bytes(sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
