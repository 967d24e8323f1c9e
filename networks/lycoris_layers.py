"""LoHa, LoKr and OFT as a network trains them.

LoHa and LoKr are PEFT's layers, of which only the forward pass is another: weights are multiplied out in float32, used in the
dtype of the input, and what is dropped is drawn on the device. They start from PEFT's values, one factor zero, not from
LyCORIS' (standard normal ones), so that learning rates of LoRA do for them.

OFT is not PEFT's: that one turns the inputs of a layer, and no other program reads such a file. What kohya's networks.oft and
LyCORIS' diag-oft train, and ComfyUI and A1111 read, turns the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.loha import layer as peft_loha
from peft.tuners.lokr import layer as peft_lokr
from torch import Tensor, nn
from torch.nn import functional as F

from networks import AdapterError
from networks.adapted_layer import AdaptedLayer, Draw, copy_weights
from networks.adapters import AdapterModule
from networks.dropouts import kept
from networks.lora import ADAPTER
from networks.lycoris_modules import LohaModule, LokrModule, OftModule, rotation, skew, turn
from networks.spec import NetworkSpec


class _Product(AdaptedLayer):
    """An adapter that adds to the weight."""

    names: tuple[str, ...]
    """Weights that there may be."""
    starts_at_zero: tuple[str, ...]
    rank_dropout: Any
    """PEFT's, a dictionary; not used."""
    row_dropout: float

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
        return torch.stack([layer.norm() for layer in layers if isinstance(layer, _Product)])

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


class _Loha(_Product):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    starts_at_zero = ("hada_w2_b",)

    def delta(self) -> Tensor:
        # PEFT's function keeps only the small factors for the backward pass.
        w1_a, w1_b, w2_a, w2_b = self.factors()
        product: Tensor = peft_loha.make_weight(w1_a, w1_b, w2_a, w2_b, torch.tensor(self.strength))
        return product

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.delta().detach())

    def to_module(self) -> AdapterModule:
        w1_a, w1_b, w2_a, w2_b = (factor.detach() for factor in self.factors())
        return LohaModule((w1_a, w1_b), (w2_a, w2_b), self.adapter_alpha)

    def load_module(self, module: AdapterModule) -> None:
        assert isinstance(module, LohaModule)
        values = {f"{name}.{ADAPTER}": value for name, value in module.tensors().items()}
        first = f"hada_w1_a.{ADAPTER}"
        copy_weights(self.weights, {**values, first: values[first].float() * (module.alpha / self.adapter_alpha)})


class _Lokr(_Product):
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    starts_at_zero = ("lokr_w1", "lokr_w1_a")

    def delta(self) -> Tensor:
        w1, w2 = self._matrices()
        return torch.kron(w1, w2.flatten(1)) * self.strength

    def norm(self) -> Tensor:
        w1, w2 = (torch.linalg.vector_norm(matrix.detach()) for matrix in self._matrices())
        return self.strength * w1 * w2

    def to_module(self) -> AdapterModule:
        w1, w2 = (tuple(part.detach() for part in self._parts(name)) for name in ("lokr_w1", "lokr_w2"))
        module = LokrModule(w1, w2, self.adapter_alpha)
        if module.is_whole:  # without a rank in the file there is no scale either
            return LokrModule((w1[0] * self.strength,), w2, float(module.rank))
        return module

    def load_module(self, module: AdapterModule) -> None:
        assert isinstance(module, LokrModule)
        values = {f"{name}.{ADAPTER}": value for name, value in module.tensors().items()}
        if values.keys() != self.weights.keys():
            raise AdapterError(
                f"A LoKr module has {', '.join(module.tensors())} where {', '.join(self.weights)} are to be trained. "
                "Give the factor and decompose_both that it was trained with in --network_args."
            )
        first = next(iter(self.weights))
        theirs = 1.0 if module.is_whole else module.alpha / module.rank
        copy_weights(self.weights, {**values, first: values[first].float() * (theirs / self.strength)})

    def _matrices(self) -> tuple[Tensor, Tensor]:
        w1, w2 = (self._parts(name) for name in ("lokr_w1", "lokr_w2"))
        return (w1[0] if len(w1) == 1 else w1[0] @ w1[1]), (w2[0] if len(w2) == 1 else w2[0] @ w2[1])

    def _parts(self, name: str) -> list[nn.Parameter]:
        names = (name,) if self._has(name) else (f"{name}_a", f"{name}_b")
        return [self._weight(part) for part in names]


class LohaLinear(_Loha, peft_loha.Linear):
    """LoHa on a Linear."""


class LohaConv2d(_Loha, peft_loha.Conv2d):
    """LoHa on a convolution."""


class LokrLinear(_Lokr, peft_lokr.Linear):
    """LoKr on a Linear."""


class LokrConv2d(_Lokr, peft_lokr.Conv2d):
    """LoKr on a convolution."""


class OftLayer(nn.Module, AdaptedLayer):
    """OFT on the outputs of a Linear or a convolution: base without bias, turned by blocks, and the bias."""

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, rank: int, spec: NetworkSpec) -> None:
        super().__init__()
        self.base_layer = base_layer
        outputs = base_layer.weight.shape[0]
        blocks = next(count for count in range(min(rank, outputs), 0, -1) if outputs % count == 0)
        self.set_up(blocks, 0.0, spec.module_dropout)
        self.bound = (spec.constraint or 0.0) * outputs
        size = outputs // blocks
        self.oft_blocks = nn.Parameter(torch.empty(blocks, size, size, device="meta"))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {"oft_blocks": self.oft_blocks}

    def reset(self, draw: Draw) -> None:
        self.oft_blocks = self._fresh(self.oft_blocks.shape, None)

    def factors(self) -> list[nn.Parameter]:
        return [self.oft_blocks]

    @staticmethod
    def norms(layers: Sequence[AdaptedLayer]) -> Tensor:
        raise AdapterError("OFT turns weights and adds nothing whose norm could be bound. Its bound is constraint.")

    def to_module(self) -> AdapterModule:
        return OftModule(self.oft_blocks.detach(), self.bound / self.base_layer.weight.shape[0])

    def load_module(self, module: AdapterModule) -> None:
        assert isinstance(module, OftModule)
        if module.rescale is not None:
            raise AdapterError("An OFT that rescales its outputs as well (LyCORIS' rescaled) cannot be trained here.")
        copy_weights(self.weights, module.tensors())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x)
        if not self.enabled:
            return result
        r = rotation(skew(self.oft_blocks.float(), self.bound)) * self.multiplier
        if (keeps := self.keeps_module(r)) is not None:
            r = r * keeps
        bias = self.base_layer.bias
        if isinstance(self.base_layer, nn.Conv2d):
            channels = result if bias is None else result - bias[:, None, None]
            return result + turn(channels.movedim(1, -1), r).movedim(-1, 1)
        return result + turn(result if bias is None else result - bias, r)


def to_adapted(layer: Any, spec: NetworkSpec, rank: int, alpha: float) -> AdaptedLayer:
    """PEFT's LoHa or LoKr layer, turned in place into one of these. Its weights are still to be made."""
    kinds = {"loha": (LohaLinear, LohaConv2d), "lokr": (LokrLinear, LokrConv2d)}[spec.algo]
    layer.__class__ = kinds[isinstance(layer.base_layer, nn.Conv2d)]
    adapted: AdaptedLayer = layer
    adapted.set_up(rank, alpha, spec.module_dropout)
    layer.row_dropout = spec.rank_dropout
    return adapted
