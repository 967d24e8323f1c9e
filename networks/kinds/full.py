"""Differences that are stored whole: `diff` and `diff_b` (LyCORIS' full, ComfyUI), `w_norm` and `b_norm` (LyCORIS' norms).

For weights and biases of any layer, normalisations too. Trained are those of a U-Net's Linear layers and convolutions that have no
adapter, in the parts that `NetworkSpec.parts` names, beside adapters of another kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.adapted_layer import AdaptedLayer, Draw, Sizes, copy_weights
from networks.adapter_module import AdapterModule
from networks.injection import OwnLayer
from networks.kinds import READ_ONLY
from networks.names import Target
from networks.spec import NetworkSpec
from networks.targets import weight_shape

OF_BIASES = ("diff_b", "b_norm")


@dataclass(frozen=True)
class FullModule(AdapterModule):
    """T' = T + ratio * diff, T a weight or a bias."""

    kind = READ_ONLY["full"]
    parts = dict.fromkeys(("diff", "w_norm", *OF_BIASES), "diff")
    needed = ("diff",)

    diff: Tensor
    alpha: float = 0.0
    """Not used."""

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> FullModule:
        return cls(parts.pop("diff"))

    @property
    def rank(self) -> int:
        """There is none."""
        return 0

    @property
    def scale(self) -> None:
        return None

    @property
    def kernel(self) -> int:
        return self.diff.shape[-1] if self.diff.ndim == 4 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """A matrix serves a 1x1 convolution and the other way round."""
        return _without_ones(self.shape) == _without_ones(shape)

    def product(self) -> Tensor:
        """As of LoRA: what is added, float32, of `shape`."""
        return self.diff.float()

    def delta(self, weight: Tensor) -> Tensor:
        return self.diff.to(weight.device).float().reshape(weight.shape)

    def of_rows(self, rows: slice) -> FullModule:
        return replace(self, diff=self.diff[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.diff}


def _without_ones(shape: Sequence[int]) -> list[int]:
    return list(shape[:2]) if len(shape) == 4 and list(shape[2:]) == [1, 1] else list(shape)


class FullLayer(OwnLayer):
    """W + diff of a Linear layer or convolution, or bias + diff: a bias has a layer of its own around that of its weight."""

    diff: nn.Parameter
    of_bias: bool

    @classmethod
    def put_into(cls, model: nn.Module, sizes: Sizes, spec: NetworkSpec) -> dict[str, AdaptedLayer]:
        layers: dict[str, AdaptedLayer] = {}
        for path, (rank, alpha) in sizes.items():
            target = Target("", path)
            layer = cls(model.get_submodule(target.module), rank, alpha, spec)
            layer.of_bias = target == target.bias
            layers[path] = layer
            parent, _, name = target.module.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        return layers

    @property
    def _innermost(self) -> Any:
        return self.base_layer.base_layer if isinstance(self.base_layer, FullLayer) else self.base_layer

    @property
    def weight_shape(self) -> torch.Size:
        return self._innermost.bias.shape if self.of_bias else weight_shape(self._innermost)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {"diff": self.diff}

    def reset(self, draw: Draw) -> None:
        self.diff = self._fresh(self.weight_shape, None)

    def to_module(self) -> AdapterModule:
        return FullModule(self.diff.detach())

    def load_module(self, module: AdapterModule) -> None:
        copy_weights(self.weights, module.tensors())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x)
        if not self.enabled:
            return result
        base, diff = self._innermost, (self.multiplier * self.diff).to(x.dtype)
        convolves = isinstance(base, nn.Conv2d)
        if self.of_bias:
            return result + (diff.view(-1, 1, 1) if convolves else diff)
        if convolves:
            return result + F.conv2d(x, diff, None, base.stride, base.padding, base.dilation, base.groups)
        return result + F.linear(x, diff)
