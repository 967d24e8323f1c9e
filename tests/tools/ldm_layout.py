"""Diffusers names to those of the original code of SD1.5 and SDXL, written down from that code and not from any converter.

The U-Net there is three flat lists. `input_blocks`: the first convolution, then per level two residual blocks (with
attention) and a downsampling; `output_blocks`: per level, deepest first, three residual blocks, the last one followed by an
upsampling; `middle_block`: residual, attention, residual.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    # generative-models: label_emb is a Sequential of one Sequential (Linear, SiLU, Linear).
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_OUTER = {"conv_norm_out": "norm_out"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def ldm_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder as the original single file of SD1.5, or of SDXL, holds them."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    second = folder / "text_encoder_2" / "model.safetensors"
    return original_tensors(unet, vae, text, load_file(second) if second.exists() else None)


def original_tensors(
    unet: dict[str, Tensor], vae: dict[str, Tensor], text: dict[str, Tensor], text_2: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The same from the state of each model. With a second text encoder it is an SDXL."""
    sdxl = text_2 is not None
    first = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    return (
        {f"model.diffusion_model.{unet_name(name, sdxl)}": value for name, value in unet.items()}
        | {f"first_stage_model.{vae_name(name)}": as_convolution(name, value) for name, value in vae.items()}
        | {f"{first}{name}": value for name, value in text.items()}
        | {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip(text_2 or {}).items()}
    )


def unet_name(name: str, sdxl: bool = False) -> str:
    for ours, theirs in _UNET_OUTER.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    section, *rest = name.split(".")
    if section == "mid_block":
        kind, index, *inner = rest
        slot = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{slot}." + _inner(kind, inner)
    level, kind, index, *inner = rest
    if section == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * int(level) + 3}.0.op.{inner[-1]}"
        return f"input_blocks.{3 * int(level) + int(index) + 1}.{int(kind == 'attentions')}." + _inner(kind, inner)
    assert section == "up_blocks"
    if kind == "upsamplers":
        # Behind the attention where there is one: at 8 times less than the latents, which only SD1.5 has, there is none.
        return f"output_blocks.{3 * int(level) + 2}.{1 if level == '0' and not sdxl else 2}.conv.{inner[-1]}"
    return f"output_blocks.{3 * int(level) + int(index)}.{int(kind == 'attentions')}." + _inner(kind, inner)


def _inner(kind: str, inner: list[str]) -> str:
    if kind == "resnets":
        return f"{_RESNET[inner[0]]}.{inner[1]}"
    return ".".join(inner)


def vae_name(name: str) -> str:
    side, *rest = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    if rest[0] == "mid_block":
        if rest[1] == "attentions":
            return f"{side}.mid.attn_1.{_VAE_ATTENTION['.'.join(rest[3:-1])]}.{rest[-1]}"
        return f"{side}.mid.block_{int(rest[2]) + 1}." + _vae_resnet(rest[3:])
    if rest[0] in ("down_blocks", "up_blocks"):
        # The decoder's levels are numbered from the picture inwards there, in the order of use here.
        level = int(rest[1]) if rest[0] == "down_blocks" else 3 - int(rest[1])
        place = f"{side}.{rest[0].removesuffix('_blocks')}.{level}"
        if rest[2] == "resnets":
            return f"{place}.block.{rest[3]}." + _vae_resnet(rest[4:])
        return f"{place}.{rest[2].removesuffix('rs')}.conv.{rest[-1]}"
    return f"{side}.{_VAE_OUTER.get(rest[0], rest[0])}.{rest[1]}"


def _vae_resnet(inner: list[str]) -> str:
    return f"{inner[0].replace('conv_shortcut', 'nin_shortcut')}.{inner[1]}"


def as_convolution(name: str, value: Tensor) -> Tensor:
    """The VAE's attention is made of 1 x 1 convolutions there."""
    return value[:, :, None, None] if ".attentions." in name and value.ndim == 2 else value


def open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """SDXL's second text encoder as OpenCLIP has it: torch's MultiheadAttention, and `x @ text_projection`."""
    outer = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    tensors: dict[str, Tensor] = {}
    for name, value in text.items():
        if name == "text_projection.weight":
            tensors["text_projection"] = value.T
        elif name in outer:
            tensors[outer[name]] = value
        else:
            _, _, _, layer, *inner, leaf = name.split(".")  # text_model.encoder.layers.N.
            block, module = f"transformer.resblocks.{layer}", ".".join(inner)
            if module == "self_attn.q_proj":
                three = [text[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")]
                tensors[f"{block}.attn.in_proj_{leaf}"] = torch.cat(three)
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                tensors[f"{block}.{_OPEN_CLIP_BLOCK[module]}.{leaf}"] = value
    return tensors
