"""The layers of a model that adapters can sit on, by the classes of the modules around them as kohya's networks.lora has it."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn

ADAPTER = "default"  # PEFT's name for the only adapter of a model
# Classes are compared by name, as kohya does: the ones of diffusers are the originals, forks keep the names.
TRANSFORMER_PARENTS = frozenset({"Transformer2DModel"})
CONV_PARENTS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})


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


def weight_shape(layer: nn.Linear | nn.Conv2d) -> torch.Size:
    """Of the weight, which a layer that keeps it in another form would have to decode to show."""
    if isinstance(layer, nn.Conv2d):
        return torch.Size((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))
    return torch.Size((layer.out_features, layer.in_features))


def kernel_of(module: nn.Module) -> int:
    return module.kernel_size[0] if isinstance(module, nn.Conv2d) else 1
