"""AlignHead: projects a feature map of the U-Net onto the token grid of a vision encoder.

Source: U-REPA (arXiv 2503.18414, section 3.2, "upsample after the MLP"); the kind conv3x3 is iREPA's projector
(arXiv 2512.10794).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import AdapterError
from networks.trained_weights import Conv2d, draw_uniform, generator_for

HeadKind = Literal["mlp", "linear", "conv3x3"]


class AlignHead(nn.Module):
    """Feature map [B, in_channels, h, w] -> tokens [B, grid * grid, out_dim], float32, of length 1, row by row.

    Of maps that are no squares, tokens are asked for on a grid of their own. The projection computes in the dtype of the
    feature map from float32 weights; all that follows is float32. The initial weights depend on `seed` and `name` alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_dim: int,
        *,
        grid: int = 16,
        kind: HeadKind = "mlp",
        seed: int = 0,
        name: str = "mid",
    ) -> None:
        super().__init__()
        self.grid = grid
        self.proj = _projection(in_channels, out_dim, kind)
        self._draw_weights(seed, name)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """grid: rows and columns of the tokens; None is the head's own square."""
        projected = self.proj(features)  # [B, D, h, w]
        # The meta device, on which memory is forecast, knows no autocast.
        device = "cpu" if projected.is_meta else projected.device.type
        with torch.autocast(device, enabled=False):
            rows, columns = (self.grid, self.grid) if grid is None else grid
            tokens = resize_bilinear(projected.float(), rows, columns).flatten(2).transpose(1, 2)  # [B, N, D]
            return F.normalize(tokens, dim=-1, eps=1e-6)  # a zero token gets a gradient of 1e6 at most, not 1e12

    def _draw_weights(self, seed: int, name: str) -> None:
        generator = generator_for(seed, f"align_heads.{name}")
        for layer in self.proj:
            if isinstance(layer, Conv2d):
                layer.weight = nn.Parameter(draw_uniform(layer.weight.shape, generator))
                if layer.bias is not None:
                    fan_in = layer.weight[0].numel()
                    layer.bias = nn.Parameter(draw_uniform(layer.bias.shape, generator, fan_in=fan_in))


class AlignHeads(nn.ModuleDict):
    """One AlignHead per tap; {tap: feature map} -> {tap: tokens}.

    `channels` maps taps to the channels of their feature maps (see `features.tap_channels`). A tap's initial weights do
    not depend on the other taps.
    """

    def __init__(
        self, channels: Mapping[str, int], out_dim: int, *, grid: int = 16, kind: HeadKind = "mlp", seed: int = 0
    ) -> None:
        heads = {tap: AlignHead(n, out_dim, grid=grid, kind=kind, seed=seed, name=tap) for tap, n in channels.items()}
        super().__init__(heads)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {tap: head(features[tap]) for tap, head in self.items()}


def resize_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w] -> [B, C, height, width], as F.interpolate(mode="bilinear", align_corners=False).

    Done as two small matrix products, because the backward pass of F.interpolate adds up in random order on CUDA.
    """
    rows, columns = (_interpolation(*lengths, x) for lengths in zip(x.shape[-2:], (height, width), strict=True))
    return rows @ x @ columns.T


def _interpolation(length: int, size: int, like: Tensor) -> Tensor:
    """The matrix [size, length] of linear interpolation: that of the unit vectors."""
    identity = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size=size, mode="linear", align_corners=False)[0].T


def _projection(in_channels: int, out_dim: int, kind: HeadKind) -> nn.Sequential:
    # On the meta device, so that no layer draws weights of its own from the global generator.
    with torch.device("meta"):
        if kind == "mlp":
            return nn.Sequential(Conv2d(in_channels, out_dim, 1), nn.GELU(), Conv2d(out_dim, out_dim, 1, bias=False))
        if kind == "linear":
            return nn.Sequential(Conv2d(in_channels, out_dim, 1))
        if kind == "conv3x3":
            return nn.Sequential(Conv2d(in_channels, out_dim, 3, padding=1))
    raise AdapterError(f"align_head must be one of {', '.join(get_args(HeadKind))}, got {kind!r}.")
