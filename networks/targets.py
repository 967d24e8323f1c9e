"""The layers of a model that adapters can sit on, by the classes of the modules around them as kohya's networks.lora has it."""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import nn

ADAPTER = "default"  # PEFT's name for the only adapter of a model
# Classes are compared by name, as kohya does: the ones of diffusers are the originals, forks keep the names.
TRANSFORMER_PARENTS = frozenset({"Transformer2DModel"})
CONV_PARENTS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
_QUERY, _KEY_AND_VALUE = ("to_q", "q_proj"), ("to_k", "to_v", "k_proj", "v_proj")


def layers_inside(model: nn.Module, parents: Set[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Path -> Linear or Conv2d inside modules whose classes have these names, in the model's order.

    Inside transformers only 1x1 convolutions count.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for parent_path, parent in model.named_modules():
        kind = type(parent).__name__
        if kind not in parents:
            continue
        for path, child in parent.named_modules(prefix=parent_path):
            if isinstance(child, (nn.Linear, nn.Conv2d)) and (kind not in TRANSFORMER_PARENTS or kernel_of(child) == 1):
                found[path] = child
    return found


def with_one_input(model: nn.Module, paths: Iterable[str]) -> list[list[str]]:
    """Of the layers at `paths` those that are given the same tensor: q, k and v of self attention, k and v of cross attention."""
    inside: dict[str, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        is_cross = getattr(model.get_submodule(parent), "is_cross_attention", False)  # diffusers' attention says so
        if name in _KEY_AND_VALUE or (name in _QUERY and not is_cross):
            inside.setdefault(parent, []).append(path)
    return [members for members in inside.values() if len(members) > 1]


def weight_shape(layer: nn.Linear | nn.Conv2d) -> torch.Size:
    """Of the weight, which a layer that keeps it in another form would have to decode to show."""
    if isinstance(layer, nn.Conv2d):
        return torch.Size((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))
    return torch.Size((layer.out_features, layer.in_features))


def kernel_of(module: nn.Module) -> int:
    return module.kernel_size[0] if isinstance(module, nn.Conv2d) else 1
