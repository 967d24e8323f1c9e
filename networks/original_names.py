"""Where the tensors of diffusers' models lie in the original single files of SD1.x and SDXL, and the way back.

The names are of modules and tensors; how values are laid out differently there is a `Form`. With `networks.names`, which
holds the spellings of adapters, this is the one table of names.

Sources: the CompVis LDM and Stability-AI generative-models code, open_clip (SDXL's second text encoder).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from functools import cache
from typing import NamedTuple

from networks.families import TEXT_ENCODER, TEXT_ENCODER_2, VAE, Family

_UNET_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # LCM's
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_OUTER = {
    **{name: name for name in ("quant_conv", "post_quant_conv")},
    **{f"{side}.{name}": f"{side}.{name}" for side in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{side}.conv_norm_out": f"{side}.norm_out" for side in ("encoder", "decoder")},
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_LEVELS = 4
_OPEN_CLIP_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # in this order
_HF_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_HF_KEY = re.compile(r"text_model\.(?:embeddings|encoder\.layers|final_layer_norm)(?:\..+)?\.(?:weight|bias)")
_OPEN_CLIP_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_OPEN_CLIP_STACK = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


class Form(Enum):
    """How the values of a tensor in an original file are laid out, against those of the diffusers model."""

    SAME = "same"
    CONVOLUTION = "convolution"
    """[out, in, 1, 1] there, [out, in] in diffusers: the VAE's attention."""
    TRANSPOSED = "transposed"
    STACKED = "stacked"
    """One of three equal parts along the first axis."""


class Place(NamedTuple):
    """Where a tensor of the diffusers model lies in an original single file."""

    key: str
    form: Form = Form.SAME
    part: int = 0
    """Which of the three, where they are stacked."""


def original_place(family: Family, component: str, key: str) -> Place:
    """The place of tensor `key` of a component in an original single file. Raises KeyError for a name it has none for."""
    prefix = family.original[component]
    if component == TEXT_ENCODER:
        return Place(prefix + with_text_model(key))
    if component == TEXT_ENCODER_2:
        place = _open_clip_place(key)
        return place._replace(key=prefix + place.key)
    path, _, leaf = key.rpartition(".")
    inner = _to_original(_vae_blocks() if component == VAE else _unet_blocks(family), path)
    is_attention = component == VAE and ".attentions." in path and not path.endswith("group_norm")
    form = Form.CONVOLUTION if is_attention and leaf == "weight" else Form.SAME
    return Place(f"{prefix}{inner}.{leaf}", form)


def diffusers_keys(family: Family, key: str) -> list[tuple[str, str]]:
    """(component, key) of what one tensor of an original file holds: one, three where stacked, none for other things.

    Other things are EMA copies, the schedule's buffers, position_ids, logit_scale, and what does not belong there.
    """
    for component, prefix in family.original.items():
        if key.startswith(prefix):
            return [(component, name) for name in _from_original(family, component, key.removeprefix(prefix))]
    return []


def is_dropped(family: Family, key: str) -> bool:
    """Whether a tensor of an original file is left out on reading, as every program does: no model of the family has it.

    position_ids, logit_scale, and the projection of CLIP-L, whose text encoders here have none.
    """
    first = family.original[TEXT_ENCODER]
    return key.endswith(("position_ids", "logit_scale")) or key.startswith(f"{first}text_projection")


def unet_to_original(family: Family, path: str) -> str:
    """The original path of a U-Net module, without what precedes it in a file. Raises KeyError where there is none."""
    return _to_original(_unet_blocks(family), path)


def unet_from_original(family: Family, path: str) -> str | None:
    """The diffusers path of a U-Net module that the original code calls `path`; None where there is none."""
    return _to_diffusers(_unet_blocks(family), path)


def _from_original(family: Family, component: str, key: str) -> list[str]:
    if component == TEXT_ENCODER:
        return [with_text_model(key)] if _HF_KEY.fullmatch(with_text_model(key)) else []
    if component == TEXT_ENCODER_2:
        return _from_open_clip(key)
    path, _, leaf = key.rpartition(".")
    blocks = _vae_blocks() if component == VAE else _unet_blocks(family)
    found = _to_diffusers(blocks, path)
    return [f"{found}.{leaf}"] if found is not None and leaf in ("weight", "bias") else []


class _Blocks(NamedTuple):
    """Prefix in diffusers -> (prefix in the original, names inside in diffusers -> in the original; None: the same)."""

    there: dict[str, tuple[str, dict[str, str] | None]]
    back: dict[str, tuple[str, dict[str, str] | None]]


def _blocks(pairs: Iterable[tuple[str, str, dict[str, str] | None]]) -> _Blocks:
    there = {here: (original, inner) for here, original, inner in pairs}
    back = {
        original: (here, None if inner is None else {name: key for key, name in inner.items()})
        for here, (original, inner) in there.items()
    }
    assert len(back) == len(there)
    return _Blocks(there, back)


@cache
def _unet_blocks_of(up_attention: tuple[bool, ...]) -> _Blocks:
    """The original code's U-Net is flat lists: two residual blocks and a downsampling per level, three on the way up."""
    pairs: list[tuple[str, str, dict[str, str] | None]] = [(a, b, {}) for a, b in _UNET_OUTER.items()]
    for level, attention in enumerate(up_attention):
        for i in range(2):
            pairs.append((f"down_blocks.{level}.resnets.{i}", f"input_blocks.{3 * level + i + 1}.0", _UNET_RESNET))
            pairs.append((f"down_blocks.{level}.attentions.{i}", f"input_blocks.{3 * level + i + 1}.1", None))
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op", {}))
        for i in range(3):
            pairs.append((f"up_blocks.{level}.resnets.{i}", f"output_blocks.{3 * level + i}.0", _UNET_RESNET))
            pairs.append((f"up_blocks.{level}.attentions.{i}", f"output_blocks.{3 * level + i}.1", None))
        slot = 2 if attention else 1
        pairs.append((f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{3 * level + 2}.{slot}.conv", {}))
    pairs.append(("mid_block.resnets.0", "middle_block.0", _UNET_RESNET))
    pairs.append(("mid_block.attentions.0", "middle_block.1", None))
    pairs.append(("mid_block.resnets.1", "middle_block.2", _UNET_RESNET))
    return _blocks(pairs)


def _unet_blocks(family: Family) -> _Blocks:
    return _unet_blocks_of(family.up_attention)


@cache
def _vae_blocks() -> _Blocks:
    """The decoder's levels are numbered from the picture inwards there, in the order of use in diffusers."""
    pairs: list[tuple[str, str, dict[str, str] | None]] = [(a, b, {}) for a, b in _VAE_OUTER.items()]
    for level in range(_VAE_LEVELS):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        above = _VAE_LEVELS - 1 - level
        pairs += [(f"{down}.resnets.{i}", f"encoder.down.{level}.block.{i}", _VAE_RESNET) for i in range(2)]
        pairs += [(f"{up}.resnets.{i}", f"decoder.up.{above}.block.{i}", _VAE_RESNET) for i in range(3)]
        pairs.append((f"{down}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv", {}))
        pairs.append((f"{up}.upsamplers.0.conv", f"decoder.up.{above}.upsample.conv", {}))
    for side in ("encoder", "decoder"):
        pairs += [(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}", _VAE_RESNET) for i in range(2)]
        pairs.append((f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _VAE_ATTENTION))
    return _blocks(pairs)


def _to_original(blocks: _Blocks, path: str) -> str:
    found = _translate(blocks.there, path)
    if found is None:
        raise KeyError(path)
    return found


def _to_diffusers(blocks: _Blocks, path: str) -> str | None:
    return _translate(blocks.back, path)


def _translate(table: dict[str, tuple[str, dict[str, str] | None]], path: str) -> str | None:
    words = path.split(".")
    for length in range(min(len(words), 6), 0, -1):
        if (found := table.get(".".join(words[:length]))) is None:
            continue
        prefix, inner = found
        rest = ".".join(words[length:])
        if inner is None:
            return f"{prefix}.{rest}" if rest else None
        if not rest:
            return prefix if inner == {} else None
        return f"{prefix}.{inner[rest]}" if rest in inner else None
    return None


def _open_clip_place(key: str) -> Place:
    if key in _OPEN_CLIP_OUTER:
        return Place(_OPEN_CLIP_OUTER[key], Form.TRANSPOSED if key == "text_projection.weight" else Form.SAME)
    match = _HF_LAYER.fullmatch(key)
    if match is None:
        raise KeyError(key)
    layer, module, leaf = match.groups()
    if module in _STACKED:
        return Place(f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", Form.STACKED, _STACKED.index(module))
    return Place(f"transformer.resblocks.{layer}.{_OPEN_CLIP_LAYER[module]}.{leaf}")


def _from_open_clip(key: str) -> list[str]:
    for here, there in _OPEN_CLIP_OUTER.items():
        if key == there:
            return [here]
    if match := _OPEN_CLIP_STACK.fullmatch(key):
        layer, leaf = match.groups()
        return [f"text_model.encoder.layers.{layer}.{module}.{leaf}" for module in _STACKED]
    if match := _OPEN_CLIP_RESBLOCK.fullmatch(key):
        layer, module, leaf = match.groups()
        for here, there in _OPEN_CLIP_LAYER.items():
            if module == there:
                return [f"text_model.encoder.layers.{layer}.{here}.{leaf}"]
    return []


def with_text_model(path: str) -> str:
    """A path or key inside CLIPTextModel as transformers < 5.6, and every other reader, knows it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
