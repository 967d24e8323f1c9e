"""How the tiny models come to behave: synthetic pictures, and output convolutions solved by least squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def synthetic_pictures(count: int, size: int) -> Tensor:
    """Pictures [count, 3, size, size] in [-1, 1]: coloured clouds cut by hard edges.

    The octaves from 4 pixels up have equal energy, as in photographs (Field 1987), so that what is calibrated on these
    holds roughly on photographs too. Drawn from torch's global generator.
    """
    octaves = [2**k for k in range(1, 12) if 2**k <= size // 4]

    def clouds(channels: int) -> Tensor:
        layers = [torch.randn(count, channels, cells, cells) for cells in octaves]
        resized = [F.interpolate(layer, size=(size, size), mode="bicubic") for layer in layers]
        return torch.stack(resized).sum(dim=0) / len(octaves) ** 0.5

    def tint() -> Tensor:
        return torch.randn(count, 3, 1, 1)

    return torch.tanh(torch.where(clouds(1) > 0.3, clouds(3), clouds(3) + tint()) * 0.45 + tint() * 0.3)


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What `module` receives while `run` is called."""
    received: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0].detach()))
    try:
        run()
    finally:
        handle.remove()
    return received[-1]


def fit_convolution(conv: nn.Conv2d, features: Tensor, target: Tensor, ridge: float = 1e-4) -> None:
    """Set the first output channels of a 3x3 convolution so that it maps `features` to `target` as well as it can.

    `features` is [B, C, H, W], `target` [B, K, H, W] with K <= conv.out_channels. Ridge regression in float64;
    `ridge` is relative to the features' mean square.
    """
    patches = F.unfold(features, 3, padding=1).transpose(1, 2).flatten(0, 1)  # [B*H*W, C*9]
    design = torch.cat([patches, torch.ones(len(patches), 1)], dim=1).double()
    wanted = target.permute(0, 2, 3, 1).flatten(0, 2).double()  # [B*H*W, K]
    normal = design.T @ design
    normal.diagonal().add_(ridge * normal.diagonal().mean())
    solution = torch.linalg.solve(normal, design.T @ wanted).float()  # [C*9 + 1, K]
    rows = target.shape[1]
    with torch.no_grad():
        conv.weight[:rows] = solution[:-1].T.reshape(rows, conv.in_channels, 3, 3)
        bias = conv.bias
        assert bias is not None
        bias[:rows] = solution[-1]
