"""A Stable Diffusion 1.5, an SDXL and a DINOv2 small enough to build in seconds, for demos and tests without a download.

The real classes in the real folder layout, with the real tensor names and small widths. The weights are random except the
last convolutions of U-Net, encoder and decoder, which are solved by least squares on synthetic pictures: so latents
look like Stable Diffusion's (zero mean, unit variance), decoding them gives a blurred picture, and the U-Net predicts noise
better than zero does. Nobody would call it a generator of images.

    python -m library.models.tiny --out models/tiny-sd15 [--kind sd15|sdxl|dinov2] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from filelock import FileLock
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

from library.errors import UserError, script
from library.files import human_bytes, read_json, write_json
from library.models.clip_tokenizer import tiny_merges, write_tokenizer
from library.models.embedded import MODELS, TINY_DINOV2, TINY_SD15, TINY_SDXL
from library.models.sd15_configs import SD15_PIPELINE, SD15_SCHEDULER, SD15_TEXT_ENCODER, SD15_UNET, SD15_VAE
from library.models.tiny_parts import (
    BUILDER_VERSION,
    RECORD,
    calibrate_unet,
    save_transformers,
    text_encoder_sizes,
    tiny_folder,
    tiny_vae,
    write_pipeline_index,
)
from library.models.tiny_sdxl import build_tiny_sdxl

HIDDEN = 64
UNET = {**SD15_UNET, "block_out_channels": [32, 64, 96, 96], "cross_attention_dim": HIDDEN, "sample_size": 16}
TEXT_ENCODER = {**SD15_TEXT_ENCODER, **text_encoder_sizes(HIDDEN)}
DINOV2_CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 518,  # 37 x 37 positions, as Meta's models
}


def build_tiny_sd15(folder: Path | str, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write a whole diffusers folder that StableDiffusionPipeline loads. Same seed, same machine: same bytes.

    Raises UserError when the folder exists already, unless `overwrite`.
    """
    with tiny_folder(folder, TINY_SD15, seed, overwrite=overwrite) as out:
        vae = tiny_vae(SD15_VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).eval()
        unet = UNet2DConditionModel.from_config(UNET).eval()
        calibrate_unet(unet, vae, lambda count: {"encoder_hidden_states": _prompts(text_encoder, count)})
        vae.save_pretrained(out / "vae")
        save_transformers(text_encoder, out / "text_encoder")
        unet.save_pretrained(out / "unet")
        write_tokenizer(out / "tokenizer", tiny_merges())
        write_json(out / "scheduler" / "scheduler_config.json", SD15_SCHEDULER)
        write_pipeline_index(out, SD15_PIPELINE)
    return Path(folder)


def _prompts(text_encoder: CLIPTextModel, count: int) -> Tensor:
    ids = torch.randint(TEXT_ENCODER["vocab_size"], (count, 77))
    return text_encoder(ids).last_hidden_state  # [count, 77, HIDDEN]


def build_tiny_dinov2(folder: Path | str, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write a transformers folder of a three-layer Dinov2Model whose tokens say much of the patch, little of its place.

    Raises UserError when the folder exists already, unless `overwrite`.
    """
    with tiny_folder(folder, TINY_DINOV2, seed, overwrite=overwrite) as out:
        model = Dinov2Model(Dinov2Config(**DINOV2_CONFIG)).eval()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # Unit variance in, unit variance out: with the usual 0.02 the position would drown the patch.
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        model.embeddings.position_embeddings.normal_(std=0.02)
        save_transformers(model, out)
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


BUILDERS: dict[str, Callable[..., Path]] = {
    TINY_SD15: build_tiny_sd15,
    TINY_SDXL: build_tiny_sdxl,
    TINY_DINOV2: build_tiny_dinov2,
}


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m library.models.tiny", description="Build a tiny model to try things."
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist yet")
    parser.add_argument(
        "--kind", choices=("sd15", "sdxl", "dinov2"), default="sd15", help="which model (default: sd15)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    options = parser.parse_args(argv)
    folder = BUILDERS[f"tiny-{options.kind}"](options.out, options.seed)
    print(f"{folder}: {human_bytes(sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
