"""What LoHa and LoKr share: weights made of factors, and a layer that adds such a product to its base's weight.

Format of the factors: LyCORIS (arXiv 2309.14859). Weights are multiplied out in float32 and used in the dtype of the input, and
what is dropped is drawn on the device. They start from PEFT's values, one factor zero, not from LyCORIS' (standard normal ones),
so that learning rates of LoRA do for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import AdapterError
from networks.adapted_layer import AdaptedLayer, Draw
from networks.adapter_module import require_fit
from networks.dropouts import kept
from networks.injection import PeftLayer
from networks.lora import ADAPTER
from networks.spec import NetworkSpec

Factor = tuple[Tensor, ...]
"""A matrix whole, as (a, b) of which it is the product, or as (a, b, t) of a CP-decomposed convolution."""


def read_factor(name: str, parts: dict[str, Tensor], part: str, core: str | None) -> Factor:
    """A factor out of a file's parts: `part`, or `part`_a and `part`_b with or without `core`. Errors as AdapterModule.read."""
    if part in parts:
        whole = parts.pop(part)
        require_fit(name, whole.ndim in (2, 4) and whole.numel() > 0, **{part: whole})
        return (whole,)
    if missing := [half for half in (f"{part}_a", f"{part}_b") if half not in parts]:
        raise AdapterError(f"{name} has no {' and no '.join(missing)}: it is incomplete.")
    a, b = parts.pop(f"{part}_a"), parts.pop(f"{part}_b")
    if core is None or core not in parts:
        fits = a.ndim == 2 and b.ndim in (2, 4) and a.shape[1] == b.shape[0] > 0
        require_fit(name, fits, **{f"{part}_a": a, f"{part}_b": b})
        return a, b
    t = parts.pop(core)
    fits = a.ndim == b.ndim == 2 and t.ndim == 4 and a.shape[0] == t.shape[0] > 0 and b.shape[0] == t.shape[1] > 0
    require_fit(name, fits, **{f"{part}_a": a, f"{part}_b": b, core: t})
    return a, b, t


def named(name: str, core: str, factor: Factor) -> dict[str, Tensor]:
    """What `read_factor` reads."""
    names = (name,) if len(factor) == 1 else (f"{name}_a", f"{name}_b", core)
    return dict(zip(names, factor, strict=False))


def whole(factor: Factor, device: torch.device | str = "cpu") -> Tensor:
    """The matrix of a factor, float32."""
    parts = [part.to(device, torch.float32) for part in factor]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0] @ parts[1].flatten(1)
    return torch.einsum("ijhw,ip,jr->prhw", parts[2], parts[0], parts[1])


def shape_of(factor: Factor) -> tuple[int, ...]:
    """As far as the tensors tell: a kernel without t is one with the inputs."""
    if len(factor) == 1:
        return tuple(factor[0].shape)
    if len(factor) == 2:
        return (factor[0].shape[0], math.prod(factor[1].shape[1:]))
    return (factor[0].shape[1], factor[1].shape[1], *factor[2].shape[2:])


def kernel_of(factor: Factor) -> int:
    return factor[-1].shape[-1] if factor[-1].ndim == 4 else 1


def same_size(found: Sequence[int], shape: Sequence[int]) -> bool:
    return len(shape) >= 2 and found[0] == shape[0] and math.prod(found[1:]) == math.prod(shape[1:])


class ProductLayer(PeftLayer):
    """An adapter that adds to the weight: PEFT's layer, of which only the forward pass is another."""

    names: tuple[str, ...]
    """Weights that there may be."""
    starts_at_zero: tuple[str, ...]
    rank_dropout: Any
    """PEFT's, a dictionary; not used."""
    row_dropout: float

    def set_up(self, rank: int, alpha: float, spec: NetworkSpec) -> None:
        super().set_up(rank, alpha, spec)
        self.row_dropout = spec.rank_dropout

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{ADAPTER}": self._weight(name) for name in self.names if self._has(name)}

    def reset(self, draw: Draw) -> None:
        for name in self.names:
            if self._has(name):
                generator = None if name in self.starts_at_zero else draw(f"{name}.{ADAPTER}")
                getattr(self, name)[ADAPTER] = self._fresh(self._weight(name).shape, generator)

    def factors(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def delta(self) -> Tensor:
        """What is added to the weight as trained, float32."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """Of `delta`, 0-dim."""
        raise NotImplementedError

    @staticmethod
    def norms(layers: Sequence[AdaptedLayer]) -> Tensor:
        return torch.stack([layer.norm() for layer in layers if isinstance(layer, ProductLayer)])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        result: Tensor = base(x)
        if not self.enabled:
            return result
        delta = self.multiplier * self.delta().reshape(base.weight.shape)
        if self.training and self.row_dropout > 0:
            rows = kept([delta.shape[0], *(1 for _ in delta.shape[1:])], self.row_dropout, delta)
            delta = delta * rows / (1 - self.row_dropout)
        if (keeps := self.keeps_module(delta)) is not None:
            delta = delta * keeps
        delta = delta.to(x.dtype)
        if isinstance(base, nn.Conv2d):
            return result + F.conv2d(x, delta, None, base.stride, base.padding, base.dilation, base.groups)
        return result + F.linear(x, delta)

    def _has(self, name: str) -> bool:
        return ADAPTER in getattr(self, name)

    def _weight(self, name: str) -> nn.Parameter:
        weight: nn.Parameter = getattr(self, name)[ADAPTER]
        return weight
