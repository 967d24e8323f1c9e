"""An SDXL of small widths: two text encoders, sizes as conditions, one to three transformer blocks in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.files import write_json
from library.models.clip_tokenizer import OPEN_CLIP_PAD, tiny_merges, write_tokenizer
from library.models.embedded import TINY_SDXL
from library.models.sdxl_configs import (
    SDXL_PIPELINE,
    SDXL_SCHEDULER,
    SDXL_TEXT_ENCODER,
    SDXL_TEXT_ENCODER_2,
    SDXL_UNET,
    SDXL_VAE,
)
from library.models.tiny_parts import (
    calibrate_unet,
    save_transformers,
    text_encoder_sizes,
    tiny_folder,
    tiny_vae,
    write_pipeline_index,
)
from networks.families import SDXL

HIDDEN, HIDDEN_2 = 32, 48
TEXT_ENCODER = {**SDXL_TEXT_ENCODER, **text_encoder_sizes(HIDDEN)}
TEXT_ENCODER_2 = {
    **SDXL_TEXT_ENCODER_2,
    **text_encoder_sizes(HIDDEN_2),
    "num_hidden_layers": 12,
    "pad_token_id": 0,
}
SIZE_WIDTH = 8
UNET = {
    **SDXL_UNET,
    "block_out_channels": [32, 64, 32],  # the last level has most of the blocks
    "attention_head_dim": [1, 1, 1],
    "transformer_layers_per_block": [1, 2, 3],
    "cross_attention_dim": HIDDEN + HIDDEN_2,
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": 6 * SIZE_WIDTH + HIDDEN_2,
    "sample_size": 16,
}


def build_tiny_sdxl(folder: Path | str, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write a whole diffusers folder that StableDiffusionXLPipeline loads. Same seed, same machine: same bytes.

    Raises UserError when the folder exists already, unless `overwrite`.
    """
    with tiny_folder(folder, TINY_SDXL, seed, overwrite=overwrite) as out:
        vae = tiny_vae(SDXL_VAE)
        first = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).eval()
        second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2)).eval()
        unet = UNet2DConditionModel.from_config(UNET).eval()
        calibrate_unet(unet, vae, lambda count: _conditions(first, second, count))
        vae.save_pretrained(out / "vae")
        save_transformers(first, out / "text_encoder")
        save_transformers(second, out / "text_encoder_2")
        unet.save_pretrained(out / "unet")
        write_tokenizer(out / "tokenizer", tiny_merges())
        write_tokenizer(out / "tokenizer_2", tiny_merges(), OPEN_CLIP_PAD)
        write_json(out / "scheduler" / "scheduler_config.json", SDXL_SCHEDULER)
        write_pipeline_index(out, SDXL_PIPELINE)
    return Path(folder)


def _conditions(first: CLIPTextModel, second: CLIPTextModelWithProjection, count: int) -> dict[str, Any]:
    """Of random prompts, what the pipeline makes of them: last but one hidden states, pooled prompt, sizes."""
    ids = torch.randint(TEXT_ENCODER["vocab_size"], (count, 77))
    one, two = (model(ids, output_hidden_states=True) for model in (first, second))
    assert SDXL.text_layer is not None
    states = [output.hidden_states[-SDXL.text_layer] for output in (one, two)]
    side = UNET["sample_size"] * SDXL.vae_factor
    sizes = torch.tensor([side, side, 0, 0, side, side]).expand(count, 6)  # original, top left of the crop, target
    return {
        "encoder_hidden_states": torch.cat(states, dim=-1),  # [B, 77, 80]
        "added_cond_kwargs": {"text_embeds": two.text_embeds, "time_ids": sizes},
    }
