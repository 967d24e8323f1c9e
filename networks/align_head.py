"""AlignHead: projects a feature map of the U-Net onto the token grid of a vision encoder.

Source: U-REPA (arXiv 2503.18414, section 3.2, "upsample after the MLP", and its time-aware projector: scale and shift of the
output by the timestep, FiLM); the kind conv3x3 is iREPA's projector (arXiv 2512.10794).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import AdapterError
from networks.features import TIME
from networks.trained_weights import Conv2d, Linear, draw_uniform, generator_for

HeadKind = Literal["mlp", "linear", "conv3x3"]


class AlignHead(nn.Module):
    """Feature map [B, in_channels, h, w] -> tokens [B, grid * grid, out_dim], float32, of length 1, row by row.

    Of maps that are no squares, tokens are asked for on a grid of their own. The projection computes in the dtype of the
    feature map from float32 weights; all that follows is float32. The initial weights depend on `seed` and `name` alone.

    time_width: of the embedding of the timesteps, by which the projection's output is scaled and shifted, at first by 1 and 0;
    None: the head is the same at all timesteps.
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
        time_width: int | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.proj = _projection(in_channels, out_dim, kind)
        self._draw_weights(seed, name)
        self.film = None
        if time_width is not None:
            with torch.device("meta"):
                self.film = Linear(time_width, 2 * out_dim)
            for name, weight in self.film.named_parameters():
                setattr(self.film, name, nn.Parameter(torch.zeros(weight.shape)))

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None, time: Tensor | None = None) -> Tensor:
        """grid: rows and columns of the tokens; None is the head's own square. time: [B, T], which a head with FiLM needs."""
        projected = self.proj(features)  # [B, D, h, w]
        # The meta device, on which memory is forecast, knows no autocast.
        device = "cpu" if projected.is_meta else projected.device.type
        with torch.autocast(device, enabled=False):
            rows, columns = (self.grid, self.grid) if grid is None else grid
            projected = projected.float()
            if self.film is not None:
                assert time is not None
                scale, shift = self.film(F.silu(time.float()))[..., None, None].chunk(2, dim=1)  # [B, D, 1, 1]
                projected = projected * (1.0 + scale) + shift
            tokens = resize_bilinear(projected, rows, columns).flatten(2).transpose(1, 2)  # [B, N, D]
            return F.normalize(tokens, dim=-1, eps=1e-6)  # a zero token gets a gradient of 1e6 at most, not 1e12

    def _draw_weights(self, seed: int, name: str) -> None:
        generator = generator_for(seed, f"align_heads.{name}")
        for layer in self.proj:
            if isinstance(layer, Conv2d):
                layer.weight = nn.Parameter(draw_uniform(layer.weight.shape, generator))
                if layer.bias is not None:
                    fan_in = layer.weight[0].numel()
                    layer.bias = nn.Parameter(draw_uniform(layer.bias.shape, generator, fan_in=fan_in))


def head_name(tap: str, teacher: str | None = None) -> str:
    """What a head's weights are drawn by, and where they are kept: those of the first teacher, None, as where there is no other."""
    return tap if teacher is None else f"{tap}_{teacher}"


def head_key(name: str) -> str:
    """First word of a head's weights: modules have names without a dot."""
    return name.replace(".", "_")


class AlignHeads(nn.ModuleDict):
    """An AlignHead for each tap and teacher, which turns the tap's feature map into that teacher's tokens.

    Its keys are the taps, its values the heads of the first teacher.

    `channels` maps taps to the channels of their feature maps (see `taps.tap_channels`), `widths` teachers to those of their
    tokens. A head's initial weights do not depend on the other heads. time_width: see `AlignHead`.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        widths: Mapping[str, int],
        *,
        grid: int = 16,
        kind: HeadKind = "mlp",
        seed: int = 0,
        time_width: int | None = None,
    ) -> None:
        super().__init__()
        self.timed = time_width is not None
        self._taps, self.teachers = tuple(channels), tuple(widths)
        for (teacher, width), (tap, count) in product(widths.items(), channels.items()):
            name = self._name(tap, teacher)
            head = AlignHead(count, width, grid=grid, kind=kind, seed=seed, name=name, time_width=time_width)
            self.add_module(head_key(name), head)

    def __getitem__(self, tap: str) -> nn.Module:
        return self.head(tap)

    def head(self, tap: str, teacher: str | None = None) -> nn.Module:
        """Of a teacher; None: of the first."""
        return super().__getitem__(head_key(self._name(tap, teacher)))

    def _name(self, tap: str, teacher: str | None) -> str:
        return head_name(tap, None if teacher in self.teachers[:1] else teacher)

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __contains__(self, tap: object) -> bool:
        return tap in self._taps

    @property
    def captured(self) -> list[str]:
        """What of a U-Net's pass the heads need; see `features.capture`."""
        return [*self, TIME] if self.timed else [*self]

    def tokens(
        self,
        tap: str,
        features: Mapping[str, Tensor],
        grid: tuple[int, int] | None = None,
        teacher: str | None = None,
    ) -> Tensor:
        """What the head of a teacher (None: the first) at `tap` makes of the features that were captured."""
        tokens: Tensor = self.head(tap, teacher)(features[tap], grid, features[TIME] if self.timed else None)
        return tokens


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
