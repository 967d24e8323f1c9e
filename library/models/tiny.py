"""A Stable Diffusion 1.5, an SDXL, a DINOv2 and a T5 small enough to build in seconds, for demos and tests without a download.

The real classes in the real folder layout, with the real tensor names and small widths. The weights are random except the
last convolutions of U-Net, encoder and decoder, which are solved by least squares on synthetic pictures: so latents
look like Stable Diffusion's (zero mean, unit variance), decoding them gives a blurred picture, and the U-Net predicts noise
better than zero does. Nobody would call it a generator of images.

    python -m library.models.tiny --out models/tiny-sd15 [--kind sd15|sdxl|dinov2|t5] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from filelock import FileLock
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from library.errors import UserError, script
from library.files import human_bytes, read_json, write_json
from library.models.clip_tokenizer import PADS, tiny_merges, tiny_words, write_tokenizer
from library.models.configs import configs_of
from library.models.embedded import MODELS, TINY_DINOV2, TINY_T5
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
from networks.families import FAMILIES, SD15, SDXL, TEXT_ENCODER, TEXT_ENCODER_2, TOKENIZERS, Family

HIDDEN = 64
"""Width of SD1.5's text encoder and of the DINOv2."""
HIDDEN_1, HIDDEN_2 = 32, 48
"""Of SDXL's text encoders."""
SIZE_WIDTH = 8
"""Of the embedding of each of SDXL's sizes."""
DINOV2_CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 518,  # 37 x 37 positions, as Meta's models
}

T5_WIDTH = 48

# By family: what differs from the published configurations of the U-Net and of each text encoder.
_UNETS: dict[str, dict[str, Any]] = {
    SD15.key: {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": HIDDEN},
    SDXL.key: {
        "block_out_channels": [32, 64, 32],  # the last level has most of the blocks
        "attention_head_dim": [1, 1, 1],
        "transformer_layers_per_block": [1, 2, 3],
        "cross_attention_dim": HIDDEN_1 + HIDDEN_2,
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": 6 * SIZE_WIDTH + HIDDEN_2,
    },
}
_TEXT_ENCODERS = {
    SD15.key: {TEXT_ENCODER: text_encoder_sizes(HIDDEN)},
    SDXL.key: {
        TEXT_ENCODER: text_encoder_sizes(HIDDEN_1),
        TEXT_ENCODER_2: text_encoder_sizes(HIDDEN_2) | {"num_hidden_layers": 12, "pad_token_id": 0},
    },
}
_SAMPLE_SIZE = 16


def build_tiny_base(family: Family, folder: Path | str, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write a whole diffusers folder that the family's pipeline loads. Same seed, same machine: same bytes.

    Raises UserError when the folder exists already, unless `overwrite`.
    """
    published = configs_of(family)
    with tiny_folder(folder, f"tiny-{family.key}", seed, overwrite=overwrite) as out:
        vae = tiny_vae(published.vae)
        encoders = {}
        for component, sizes in _TEXT_ENCODERS[family.key].items():
            kind = CLIPTextModel if component == TEXT_ENCODER else CLIPTextModelWithProjection
            encoders[component] = kind(CLIPTextConfig(**{**published.text_encoders[component], **sizes})).eval()
        config = {**published.unet, **_UNETS[family.key], "sample_size": _SAMPLE_SIZE}
        unet = UNet2DConditionModel.from_config(config).eval()
        calibrate_unet(unet, vae, lambda count: _conditions(family, list(encoders.values()), count))
        vae.save_pretrained(out / "vae")
        unet.save_pretrained(out / "unet")
        for component, encoder in encoders.items():
            save_transformers(encoder, out / component)
            write_tokenizer(out / TOKENIZERS[component], tiny_merges(), PADS[component])
        write_json(out / "scheduler" / "scheduler_config.json", published.scheduler)
        write_pipeline_index(out, published.pipeline)
    return Path(folder)


def _conditions(family: Family, encoders: list[CLIPTextModel], count: int) -> dict[str, Any]:
    """Of random prompts, what the pipeline makes of them: hidden states [count, 77, D], and with sizes the pooled prompt."""
    ids = torch.randint(encoders[0].config.vocab_size, (count, 77))
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    layer = family.text_layer
    states = [output.last_hidden_state if layer is None else output.hidden_states[-layer] for output in outputs]
    conditions: dict[str, Any] = {"encoder_hidden_states": torch.cat(states, dim=-1)}
    if family.has_size_conditions:
        side = _SAMPLE_SIZE * family.vae_factor
        sizes = torch.tensor([side, side, 0, 0, side, side]).expand(count, 6)  # original, top left of the crop, target
        conditions["added_cond_kwargs"] = {"text_embeds": outputs[-1].text_embeds, "time_ids": sizes}
    return conditions


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


def build_tiny_t5(folder: Path | str, seed: int = 0, *, overwrite: bool = False) -> Path:
    """Write a transformers folder of a two-layer T5EncoderModel and its tokenizer, of the words that the tiny CLIPs know.

    Raises UserError when the folder exists already, unless `overwrite`.
    """
    words = [(f"\u2581{word}", -2.0) for word in sorted(set(tiny_words()))]
    marks = [(f"{start}{mark}", -8.0) for mark in map(chr, range(33, 127)) for start in ("", "\u2581")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0), *marks]
    known = {piece for piece, _ in vocabulary}
    vocabulary += [(piece, score) for piece, score in words if piece not in known]
    with tiny_folder(folder, TINY_T5, seed, overwrite=overwrite) as out:
        sizes = {"d_model": T5_WIDTH, "d_kv": 12, "d_ff": 2 * T5_WIDTH, "num_layers": 2, "num_heads": 4}
        model = T5EncoderModel(T5Config(**sizes, vocab_size=len(vocabulary), is_encoder_decoder=False)).eval()
        save_transformers(model, out)
        T5Tokenizer(vocab=vocabulary, extra_ids=0).backend_tokenizer.save(str(out / "tokenizer.json"))
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
    **{f"tiny-{family.key}": partial(build_tiny_base, family) for family in FAMILIES.values()},
    TINY_DINOV2: build_tiny_dinov2,
    TINY_T5: build_tiny_t5,
}


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m library.models.tiny", description="Build a tiny model to try things."
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist yet")
    parser.add_argument(
        "--kind",
        choices=[name.removeprefix("tiny-") for name in BUILDERS],
        default="sd15",
        help="which model (default: sd15)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    options = parser.parse_args(argv)
    folder = BUILDERS[f"tiny-{options.kind}"](options.out, options.seed)
    print(f"{folder}: {human_bytes(sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
