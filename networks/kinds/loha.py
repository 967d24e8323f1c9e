"""LoHa. Sources: FedPara (arXiv 2108.06098), LyCORIS (arXiv 2309.14859); read that way by ComfyUI and A1111."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoHaConfig
from peft.tuners.loha.layer import make_weight
from torch import Tensor

from networks import AdapterError
from networks.adapted_layer import copy_weights
from networks.adapter_module import AdapterModule
from networks.kinds import KINDS, Kind
from networks.kinds.products import Factor, ProductLayer, kernel_of, named, read_factor, same_size, shape_of, whole
from networks.lora import ADAPTER
from networks.spec import NetworkSpec

_WEIGHTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class LohaModule(AdapterModule):
    """W' = W + ratio * alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry."""

    parts = {name: name for name in (*_WEIGHTS, "hada_t1", "hada_t2")}

    w1: Factor
    """(w1_a [out, rank], w1_b [rank, in * kh * kw]), or with t1 [rank, rank, kh, kw] ([rank, out], [rank, in])"""
    w2: Factor
    alpha: float

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> LohaModule:
        """Without alpha the scale is 1."""
        w1, w2 = (read_factor(name, parts, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        if shape_of(w1) != shape_of(w2):
            raise AdapterError(
                f"{name} has w1 {list(shape_of(w1))} and w2 {list(shape_of(w2))}, which do not fit together."
            )
        module = cls(w1, w2, 0.0)
        return replace(module, alpha=float(module.rank) if alpha is None else alpha)

    @property
    def kind(self) -> Kind:
        return KINDS["loha"]

    @property
    def rank(self) -> int:
        return self.w1[1].shape[0]

    @property
    def kernel(self) -> int:
        return kernel_of(self.w1)

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.w1)

    def fits(self, shape: Sequence[int]) -> bool:
        return same_size(self.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = (whole(factor, weight.device).reshape(weight.shape) for factor in (self.w1, self.w2))
        return self.alpha / self.rank * w1 * w2

    def tensors(self) -> dict[str, Tensor]:
        return {**named("hada_w1", "hada_t1", self.w1), **named("hada_w2", "hada_t2", self.w2)}


class LohaLayer(ProductLayer):
    names = _WEIGHTS
    starts_at_zero = ("hada_w2_b",)

    @classmethod
    def configuration(cls, spec: NetworkSpec, alpha: float, **common: Any) -> LoHaConfig:
        return LoHaConfig(alpha=alpha, **common)  # type: ignore[arg-type]  # annotated int, used as a number

    def delta(self) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = self.factors()
        # PEFT's function keeps only the small factors for the backward pass.
        product: Tensor = make_weight(w1_a, w1_b, w2_a, w2_b, torch.tensor(self.strength))
        return product

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.delta().detach())

    def to_module(self) -> AdapterModule:
        w1_a, w1_b, w2_a, w2_b = (factor.detach() for factor in self.factors())
        return LohaModule((w1_a, w1_b), (w2_a, w2_b), self.adapter_alpha)

    def load_module(self, module: AdapterModule) -> None:
        values = {f"{name}.{ADAPTER}": value for name, value in module.tensors().items()}
        first = f"hada_w1_a.{ADAPTER}"
        copy_weights(self.weights, {**values, first: values[first].float() * (module.alpha / self.adapter_alpha)})
