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
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from filelock import FileLock
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

from library.errors import UserError, script
from library.files import read_json, whole_folder, write_json
from library.models.calibration import fit_convolution, input_of, synthetic_pictures
from library.models.clip_tokenizer import build_tokenizer, tiny_merges, vocabulary, write_tokenizer
from library.models.locate import TINY_DINOV2, TINY_SD15
from library.models.sd15_configs import SD15_SCHEDULER, SD15_TEXT_ENCODER, SD15_UNET, SD15_VAE

BUILDER_VERSION = 1
"""Raised whenever the same seed gives other weights or files; `ensure_tiny` then rebuilds what it built before."""

MODELS = Path(__file__).resolve().parents[2] / "models"
RECORD = "tiny.json"

HIDDEN = 64
UNET = {**SD15_UNET, "block_out_channels": [32, 64, 96, 96], "cross_attention_dim": HIDDEN, "sample_size": 16}
VAE = {**SD15_VAE, "block_out_channels": [32, 64, 96, 96], "norm_num_groups": 8, "sample_size": 128}
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
DINOV2_CONFIG = {
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


def build_tiny_sd15(folder: Path | str, seed: int = 0) -> Path:
    """Write a whole diffusers folder that StableDiffusionPipeline loads. Same seed, same machine: same bytes.

    Raises UserError when the folder exists already.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), whole_folder(folder) as out:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        pictures = synthetic_pictures(8, 128, generator)
        vae = _tiny_vae(pictures)
        text_encoder = _tiny_text_encoder()
        unet = _tiny_unet(_latents(vae, synthetic_pictures(32, 128, generator)), text_encoder, generator)

        vae.save_pretrained(out / "vae")
        text_encoder.save_pretrained(out / "text_encoder")
        unet.save_pretrained(out / "unet")
        write_tokenizer(out / "tokenizer", tiny_merges())
        write_json(out / "scheduler" / "scheduler_config.json", SD15_SCHEDULER)
        write_json(out / "model_index.json", PIPELINE)
        write_json(out / RECORD, {"kind": TINY_SD15, "builder_version": BUILDER_VERSION, "seed": seed})
    return Path(folder)


def build_tiny_dinov2(folder: Path | str, seed: int = 0) -> Path:
    """Write a transformers folder of a three-layer Dinov2Model whose tokens say much of the patch, little of its place.

    Raises UserError when the folder exists already.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), whole_folder(folder) as out:
        torch.manual_seed(seed)
        model = Dinov2Model(Dinov2Config(**DINOV2_CONFIG)).eval()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # Unit variance in, unit variance out: the default 0.02 would drown the patch in the position.
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        model.embeddings.position_embeddings.normal_(std=0.02)
        model.embeddings.cls_token.normal_(std=1.0)
        model.save_pretrained(out)
        write_json(out / RECORD, {"kind": TINY_DINOV2, "builder_version": BUILDER_VERSION, "seed": seed})
    return Path(folder)


BUILDERS: dict[str, Callable[[Path | str, int], Path]] = {
    TINY_SD15: build_tiny_sd15,
    TINY_DINOV2: build_tiny_dinov2,
}


def ensure_tiny(name: str) -> Path:
    """The folder `models/<name>` of this project, built if absent or made by another version of the builder.

    Processes that start together wait for the first one to build it.
    """
    if name not in BUILDERS:
        raise UserError(f"{name} is not a tiny model of this project. Known: {', '.join(BUILDERS)}.")
    folder = MODELS / name
    if _is_current(folder, name):
        return folder
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS / f".{name}.lock"):
        if not _is_current(folder, name):
            _refuse_foreign(folder)
            with whole_folder(folder, overwrite=True) as out:
                BUILDERS[name](out / "new", 0)
                for part in (out / "new").iterdir():
                    part.rename(out / part.name)
                (out / "new").rmdir()
    return folder


def _is_current(folder: Path, name: str) -> bool:
    record = folder / RECORD
    found = read_json(record) if record.exists() else {}
    return found.get("kind") == name and found.get("builder_version") == BUILDER_VERSION
