"""DINOv2 as transformers' model: from a folder, the hub, or Meta's own `.pth` (Oquab et al. 2023, Darcet et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from library.errors import UserError
from library.files import read_json
from library.models.header import read_shapes
from library.models.locate import DINOV2, BaseLocation, check_dino, dino_status, locate_dino, weight_files
from library.models.weights import assemble, read_tensors

Dinov2: TypeAlias = Dinov2Model | Dinov2WithRegistersModel
Config: TypeAlias = Dinov2Config | Dinov2WithRegistersConfig

_HEAD_WIDTH = 64  # of every published size: 384/6, 768/12, 1024/16, 1536/24

# Meta's names outside the blocks, and inside one, to transformers'.
_OUTER = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_INNER = {
    "attn.proj": "attention.output.dense",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def load_dinov2(
    location: BaseLocation | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layers: int | None = None,
) -> Dinov2:
    """The model, frozen; of its layers the first `layers` alone, and the last layer norm.

    Raises UserError for a file that is no DINOv2, is torn, or does not fit its configuration.

    At other resolutions than 518 position embeddings are interpolated as transformers does it: by 16/37 at 224 pixels, where
    Meta's code for models without registers takes (16 + 0.1)/37.
    """
    location = _located(location)
    if location.is_file:
        meta = read_tensors(location.path)
        config: Config = _meta_config(meta, location.path)
        tensors = dict(_transformers_names(meta))
    else:
        config = _folder_config(location.path)
        tensors = read_tensors(weight_files(location.path, DINOV2))
    if layers is not None:
        config.num_hidden_layers = layers
        tensors = {name: value for name, value in tensors.items() if _layer_of(name) < layers}
    cls: Any = Dinov2WithRegistersModel if isinstance(config, Dinov2WithRegistersConfig) else Dinov2Model
    return assemble(lambda: cls(config), tensors, f"The DINOv2 in {location.path}", dtype=dtype, device=device)


def check_dinov2(name: str) -> None:
    """Raise UserError where `load_dinov2(locate_dino(name))` would, as far as names, configuration and headers tell.

    Nothing is fetched, and of Meta's `.pth` nothing is read.
    """
    check_dino(name)
    if dino_status(name) is None and not (location := locate_dino(name)).is_file:
        _folder_config(location.path)
        for path in weight_files(location.path, DINOV2):
            if path.suffix == ".safetensors":
                read_shapes(path)


def dinov2_config(location: BaseLocation | str) -> Config:
    """Without loading more than the configuration of a folder."""
    location = _located(location)
    if location.is_file:
        return _meta_config(read_tensors(location.path), location.path)
    return _folder_config(location.path)


def _layer_of(name: str) -> int:
    """-1 of weights outside of the layers."""
    return int(name.split(".")[2]) if name.startswith("encoder.layer.") else -1


def _located(location: BaseLocation | str) -> BaseLocation:
    return location if isinstance(location, BaseLocation) else locate_dino(location)


def _folder_config(folder: Path) -> Config:
    fields = read_json(folder / "config.json")
    classes: dict[str, Any] = {"dinov2": Dinov2Config, "dinov2_with_registers": Dinov2WithRegistersConfig}
    kind = fields.get("model_type")
    if kind not in classes:
        raise UserError(
            f"{folder / 'config.json'} describes a {kind}. A dinov2 or dinov2_with_registers is needed here."
        )
    return classes[kind].from_dict(fields)


def _meta_config(meta: dict[str, Tensor], path: Path) -> Config:
    """Read the architecture off the shapes of Meta's tensors."""
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    if missing := [name for name in needed if name not in meta]:
        first = next(iter(sorted(meta)), "none at all")
        raise UserError(
            f"{path} is no DINOv2 backbone of Meta's: {missing[0]} is missing among {len(meta)} tensors (first: {first}). "
            "Files are called dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth."
        )
    width, _, patch, _ = meta["patch_embed.proj.weight"].shape
    swiglu = "blocks.0.mlp.w3.weight" in meta
    # SwiGLU keeps 2/3 of the hidden width, so that it costs what a plain MLP would.
    hidden = meta["blocks.0.mlp.w3.weight"].shape[1] * 3 / 2 if swiglu else meta["blocks.0.mlp.fc1.weight"].shape[0]
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[1] for name in meta if name.startswith("blocks.")}),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "mlp_ratio": round(hidden / width),
        "patch_size": patch,
        "image_size": patch * isqrt(meta["pos_embed"].shape[1] - 1),
        "use_swiglu_ffn": swiglu,
    }
    if "register_tokens" in meta:
        return Dinov2WithRegistersConfig.from_dict(fields | {"num_register_tokens": meta["register_tokens"].shape[1]})
    return Dinov2Config.from_dict(fields)


def _transformers_names(meta: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in meta.items():
        if not name.startswith("blocks."):
            yield _OUTER.get(name, name), value
            continue
        _, index, inner = name.split(".", 2)
        layer = f"encoder.layer.{index}"
        if inner.startswith("attn.qkv."):
            kind = inner.rpartition(".")[2]
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                yield f"{layer}.attention.attention.{part}.{kind}", piece.clone()
            continue
        for theirs, ours in _INNER.items():
            if inner.startswith(theirs):
                inner = inner.replace(theirs, ours, 1)
        yield f"{layer}.{inner}", value
