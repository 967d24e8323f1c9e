"""The names of one module in different files: kohya's, PEFT's, and its path in the diffusers or transformers model.

Stable Diffusion 1.x: kohya's names are the paths of the real model with dots as underscores, so the way back is a
table over a model's paths, never a guess where an underscore was a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET = "unet"
TEXT_ENCODER = "text_encoder"

# What precedes a module's name in kohya's files, by the pipeline component the module belongs to.
KOHYA_PREFIXES = {UNET: "lora_unet", TEXT_ENCODER: "lora_te", "text_encoder_2": "lora_te2"}

_PEFT_KEY = re.compile(
    r"(?:(?P<component>unet|text_encoder_2|text_encoder)\.)?(?:base_model\.model\.)?(?P<path>.+?)\."
    r"(?:lora_(?P<AB>[AB])(?:\.\w+)?|lora(?:_linear_layer)?\.(?P<down_up>down|up))\.weight"
)


def kohya_name(path: str, prefix: str = KOHYA_PREFIXES[UNET]) -> str:
    """Kohya's name of the module at `path`: `lora_unet_mid_block_attentions_0_proj_in`.

    Text encoders always say text_model_, which transformers >= 5.6 dropped from the paths of CLIPTextModel and
    every reader of these files expects.
    """
    if prefix.startswith("lora_te"):
        path = with_text_model(path)
    return f"{prefix}_{path.replace('.', '_')}"


def with_text_model(path: str) -> str:
    """A path or key inside CLIPTextModel as transformers < 5.6, and every other reader, knows it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def kohya_table(paths: Iterable[str], prefix: str = KOHYA_PREFIXES[UNET]) -> dict[str, str]:
    """Kohya's name -> path, for the paths of a model: the inverse of `kohya_name`."""
    return {kohya_name(path, prefix): path for path in paths if path}


def canonical_kohya_name(name: str) -> str:
    """`lora_te1_` and `lora_te_` both mean the first text encoder; diffusers writes the former even for SD1.5."""
    return name.replace("lora_te1_", "lora_te_", 1) if name.startswith("lora_te1_") else name


def weight_paths(keys: Iterable[str]) -> list[str]:
    """The paths of the modules whose weights a state dict holds."""
    return [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]


def split_peft_key(key: str) -> tuple[str, str, str] | None:
    """(component, path, "down" or "up") of a tensor in a PEFT or diffusers LoRA file, None for any other key.

    Known: `unet.X.lora_A.weight`, with or without `unet.`, `base_model.model.` and the adapter's name after lora_A, and
    diffusers' older `unet.X.lora.down.weight`. A key that names no component is of the U-Net.
    """
    match = _PEFT_KEY.fullmatch(key)
    if match is None:
        return None
    part = match["down_up"] or {"A": "down", "B": "up"}[match["AB"]]
    return match["component"] or UNET, match["path"], part
