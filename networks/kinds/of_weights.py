"""GLoRA and IA3, which add what depends on the weight itself. Read, merged and drawn with; not trained.

Sources: GLoRA (arXiv 2306.07967), IA3 (arXiv 2205.05638), both as LyCORIS has them in its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from networks import AdapterError
from networks.adapter_module import AdapterModule, require_fit
from networks.kinds import READ_ONLY
from networks.kinds.lora import LoraModule


@dataclass(frozen=True)
class GloraModule(AdapterModule):
    """W' = W + ratio * alpha / rank * (b1 @ b2 + W @ a1 @ a2), the second on the inputs of W, at each place of a kernel."""

    kind = READ_ONLY["glora"]
    parts = {f"{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")}
    needed = ("a1", "a2", "b1", "b2")

    a1: Tensor
    """[in, rank]"""
    a2: Tensor
    """[rank, in]"""
    added: LoraModule
    """b1 as up, b2 as down, bm as mid; its alpha is that of both."""

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> GloraModule:
        """Without alpha, or with 0, the scale is 1. LyCORIS before 2.0 called each first matrix the second."""
        a1, a2, b1, b2 = (parts.pop(part) for part in cls.needed)
        orders = [order for order in ((a1, a2, b1, b2), (a2, a1, b2, b1)) if _chained(*order)]
        # Of a square weight both are chains, one over its sides: the rank is the smaller.
        a1, a2, b1, b2 = min(orders, key=lambda order: order[0].shape[1], default=(a1, a2, b1, b2))
        require_fit(name, _chained(a1, a2, b1, b2), a1=a1, a2=a2, b1=b1, b2=b2)
        factors = {"down": b2, "up": b1, **({"mid": parts.pop("bm")} if "bm" in parts else {})}
        added = LoraModule.read(name, factors, alpha or None)
        require_fit(name, a1.shape[0] == a2.shape[1] == added.shape[1], a1=a1, a2=a2, b2=b2)
        return cls(a1.flatten(1), a2.flatten(1), added)

    @property
    def alpha(self) -> float:  # type: ignore[override]  # read alone
        return self.added.alpha

    @property
    def rank(self) -> int:
        return self.added.rank

    @property
    def kernel(self) -> int:
        return self.added.kernel

    @property
    def shape(self) -> tuple[int, ...]:
        return self.added.shape

    def fits(self, shape: Sequence[int]) -> bool:
        return self.added.fits(shape)

    def delta(self, weight: Tensor) -> Tensor:
        a1, a2 = (part.to(weight.device, torch.float32) for part in (self.a1, self.a2))
        mixed = torch.einsum("oi...,ir,rj->oj...", weight.float(), a1, a2)
        return self.added.product(weight.device).reshape(weight.shape) + self.added.alpha / self.rank * mixed

    def tensors(self) -> dict[str, Tensor]:
        plain = self.added.without_mid()
        return {"a1.weight": self.a1, "a2.weight": self.a2, "b1.weight": plain.up, "b2.weight": plain.down}


def _chained(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Whether these are two products over one rank."""
    if any(part.ndim not in (2, 4) or part.numel() == 0 for part in (a1, a2, b1, b2)):
        return False
    return a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]


@dataclass(frozen=True)
class Ia3Module(AdapterModule):
    """W' = W * (1 + ratio * factors), a factor for each output, or for each input."""

    kind = READ_ONLY["ia3"]
    parts = {"weight": "factors", "on_input": "on_input"}
    needed = ("factors", "on_input")

    factors: Tensor
    """[n]"""
    on_input: bool
    alpha: float = 0.0
    """Not used."""

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> Ia3Module:
        factors, on_input = parts.pop("factors"), parts.pop("on_input")
        if on_input.numel() != 1 or factors.numel() not in factors.shape:
            raise AdapterError(
                f"{name} has factors {list(factors.shape)} and on_input {list(on_input.shape)}, which are of no IA3."
            )
        return cls(factors.flatten(), bool(on_input))

    @property
    def rank(self) -> int:
        """There is none."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[out], or [0, in] where the tensors tell the inputs alone."""
        return (0, self.factors.numel()) if self.on_input else (self.factors.numel(),)

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) >= 2 and self.factors.numel() == shape[1 if self.on_input else 0]

    def delta(self, weight: Tensor) -> Tensor:
        axis = 1 if self.on_input else 0
        sides = [-1 if place == axis else 1 for place in range(weight.ndim)]
        return weight.float() * self.factors.to(weight.device, torch.float32).reshape(sides)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.factors, "on_input": torch.tensor(int(self.on_input))}
