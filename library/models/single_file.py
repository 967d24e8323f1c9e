"""Stable Diffusion 1.x in one .safetensors file, in the names of the original LDM code.

Such a file carries no configuration: widths are read off tensor shapes, what leaves no trace in a shape is SD1.5's.
Format: 686 tensors under `model.diffusion_model.`, 248 under `first_stage_model.`, 196 under `cond_stage_model.transformer.`.
EMA copies (`model_ema.`) and schedule buffers are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from library.errors import UserError
from library.models.sd15_configs import SD15_SCHEDULER, SD15_TEXT_ENCODER, SD15_UNET, SD15_VAE
from library.models.weights import Shapes, read_shapes, read_tensors

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
PREFIXES = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX}

# What other files look like: a tensor name, or the beginning of one, that only they have.
_OTHER_FAMILIES = (
    ("conditioner.embedders.", "SDXL"),
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    (UNET_PREFIX + "joint_blocks.", "Stable Diffusion 3"),
    (UNET_PREFIX + "double_blocks.", "Flux"),
    ("lora_", "a LoRA adapter"),
    ("down_blocks.", "a diffusers U-Net alone"),
    ("encoder.", "a VAE alone"),
    ("text_model.", "a text encoder alone"),
)


def file_unet_config(path: Path) -> dict[str, Any]:
    """UNet2DConditionModel's configuration. Raises UserError when the file is no SD1.x, saying what it looks like."""
    shapes = _shapes(path, "unet")
    level_ends = [f"input_blocks.{1 + 3 * level}.0.out_layers.3.weight" for level in range(4)]
    cross = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    config = SD15_UNET | {
        "in_channels": _size(path, shapes, "input_blocks.0.0.weight", 1),
        "out_channels": _size(path, shapes, "out.2.weight", 0),
        "block_out_channels": [_size(path, shapes, name, 0) for name in level_ends],
        "cross_attention_dim": _size(path, shapes, cross, 1),
    }
    if config["in_channels"] == 9:
        raise UserError(
            f"{path} looks like an inpainting model (9 input channels). A text-to-image SD1.5 model is needed."
        )
    return config


def file_vae_config(path: Path) -> dict[str, Any]:
    """AutoencoderKL's configuration."""
    shapes = _shapes(path, "vae")
    widths = [_size(path, shapes, f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(4)]
    return SD15_VAE | {
        "block_out_channels": widths,
        "latent_channels": _size(path, shapes, "post_quant_conv.weight", 0),
        # Leaves no trace in the shapes. SD has 32 groups over 128 channels, and the tiny model keeps the proportion.
        "norm_num_groups": widths[0] // 4,
    }


def file_text_config(path: Path) -> dict[str, Any]:
    """CLIPTextConfig's fields. CLIP's heads are 64 wide at every size (Radford et al. 2021, table 20)."""
    shapes = {name.removeprefix("text_model."): shape for name, shape in _shapes(path, "text_encoder").items()}
    vocabulary = _size(path, shapes, "embeddings.token_embedding.weight", 0)
    hidden = _size(path, shapes, "embeddings.token_embedding.weight", 1)
    return SD15_TEXT_ENCODER | {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "projection_dim": hidden,
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": _size(path, shapes, "encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}),
        "max_position_embeddings": _size(path, shapes, "embeddings.position_embedding.weight", 0),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def file_scheduler_config(path: Path) -> dict[str, Any]:
    """SD1.5's schedule. A tensor called `v_pred`, as ComfyUI reads it, marks a model that predicts velocity."""
    shapes = read_shapes(path)
    config = dict(SD15_SCHEDULER)
    if "v_pred" in shapes:
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        config["rescale_betas_zero_snr"] = True
    return config


def file_unet_tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The U-Net under diffusers' names."""
    tensors = read_tensors(path, UNET_PREFIX)
    # The converter looks these keys up without a default.
    return _all_converted(
        path, tensors, convert_ldm_unet_checkpoint(dict(tensors), {"class_embed_type": None, **config})
    )


def file_vae_tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The VAE under diffusers' names; the attention's 1x1 convolutions become linear layers."""
    tensors = read_tensors(path, VAE_PREFIX)
    return _all_converted(path, tensors, convert_ldm_vae_checkpoint(dict(tensors), config))


def file_text_tensors(path: Path) -> dict[str, Tensor]:
    """The text encoder's tensors without their LDM prefix."""
    return {name.removeprefix(TEXT_PREFIX): value for name, value in read_tensors(path, TEXT_PREFIX).items()}


def _shapes(path: Path, component: str) -> Shapes:
    """Shapes of one component's tensors, prefix removed. Raises UserError when the file is not SD1.x or lacks it."""
    shapes = read_shapes(path)
    prefix = PREFIXES[component]
    # SDXL uses the same prefix for its U-Net, so what marks another family is looked for first.
    for beginning, family in _OTHER_FAMILIES:
        if any(name.startswith(beginning) for name in shapes):
            raise UserError(f"{path} looks like {family}. A Stable Diffusion 1.x base model is needed here.")
    found = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if not found:
        first = next(iter(sorted(shapes)), "none at all")
        raise UserError(
            f"{path} has no {component}: none of its {len(shapes)} tensors (first: {first}) begins with {prefix}. A complete "
            "SD1.x checkpoint or a diffusers folder is needed."
        )
    return found


def _size(path: Path, shapes: Shapes, name: str, axis: int) -> int:
    if name not in shapes:
        raise UserError(f"{path} is not laid out like Stable Diffusion 1.x: the tensor ...{name} is missing.")
    return shapes[name][axis]


def _all_converted(path: Path, tensors: dict[str, Tensor], converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Refuse what the converter dropped: a leftover of training (LoRA, heads) means an unfinished merge."""
    if len(converted) != len(tensors):
        kept = {value.data_ptr() for value in converted.values()}
        first = next((name for name, value in sorted(tensors.items()) if value.data_ptr() not in kept), "?")
        raise UserError(
            f"{len(tensors) - len(converted)} of {len(tensors)} tensors in {path} have no place in SD1.x (first: {first}). "
            "Merge or remove what training left there."
        )
    return converted
