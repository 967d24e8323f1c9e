"""LoKr. Source: LyCORIS (arXiv 2309.14859); read that way by ComfyUI and A1111."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoKrConfig
from torch import Tensor, nn

from networks import AdapterError
from networks.adapted_layer import copy_weights
from networks.adapter_module import AdapterModule, require_fit
from networks.kinds import KINDS, Kind
from networks.kinds.products import Factor, ProductLayer, kernel_of, named, read_factor, same_size, shape_of, whole
from networks.lora import ADAPTER
from networks.spec import NetworkSpec

_WEIGHTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True)
class LokrModule(AdapterModule):
    """W' = W + ratio * alpha / rank * kron(w1, w2); where neither is decomposed, alpha counts for nothing."""

    parts = {name: name for name in (*_WEIGHTS, "lokr_t2")}

    w1: Factor
    """Whole [a, c], or ([a, rank], [rank, c]); the weight is [a * b, c * d, kh, kw]"""
    w2: Factor
    """Whole [b, d] or [b, d, kh, kw], ([b, rank], [rank, d * kh * kw]), or ([rank, b], [rank, d], [rank, rank, kh, kw])"""
    alpha: float

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> LokrModule:
        """Without alpha the scale is 1."""
        w1, w2 = read_factor(name, parts, "lokr_w1", None), read_factor(name, parts, "lokr_w2", "lokr_t2")
        require_fit(name, w1[0].ndim == 2, lokr_w1=w1[0])
        module = cls(w1, w2, 0.0)
        return replace(module, alpha=float(module.rank) if alpha is None or module.is_whole else alpha)

    @property
    def kind(self) -> Kind:
        return KINDS["lokr"]

    @property
    def is_whole(self) -> bool:
        return len(self.w1) == len(self.w2) == 1

    @property
    def rank(self) -> int:
        """Of w2 where it is decomposed, else of w1, as ComfyUI and A1111 take it; else one that decomposes nothing."""
        if len(self.w2) > 1:
            return self.w2[1].shape[0]
        return self.w1[1].shape[0] if len(self.w1) > 1 else max(self.w2[0].shape[:2])

    @property
    def kernel(self) -> int:
        return kernel_of(self.w2)

    @property
    def shape(self) -> tuple[int, ...]:
        (a, c), (b, d, *kernel) = shape_of(self.w1), shape_of(self.w2)
        return (a * b, c * d, *kernel)

    def fits(self, shape: Sequence[int]) -> bool:
        return same_size(self.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = whole(self.w1, weight.device), whole(self.w2, weight.device).flatten(1)
        scale = 1.0 if self.is_whole else self.alpha / self.rank
        return scale * torch.kron(w1, w2).reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {**named("lokr_w1", "lokr_t1", self.w1), **named("lokr_w2", "lokr_t2", self.w2)}


class LokrLayer(ProductLayer):
    names = _WEIGHTS
    starts_at_zero = ("lokr_w1", "lokr_w1_a")

    @classmethod
    def configuration(cls, spec: NetworkSpec, alpha: float, **common: Any) -> LoKrConfig:
        return LoKrConfig(
            alpha=alpha,  # type: ignore[arg-type]  # annotated int, used as a number
            decompose_both=spec.decompose_both,
            decompose_factor=spec.factor,
            **common,
        )

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
