"""LoHa and LoKr: a matrix made of factors is added to the weight.

Sources: FedPara (arXiv 2108.06098), LyCORIS (arXiv 2309.14859); files are read that way by ComfyUI and A1111.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha.layer import make_weight
from torch import Tensor, nn
from torch.nn import functional as F

from networks import AdapterError
from networks.adapted_layer import AdaptedLayer, Draw, copy_weights
from networks.adapter_module import AdapterModule, require_fit
from networks.dropouts import kept
from networks.injection import PeftLayer
from networks.kinds import KINDS, READ_ONLY, Kind
from networks.kinds.dora import magnitude_fits, read_magnitude, with_magnitude
from networks.spec import NetworkSpec
from networks.targets import ADAPTER, weight_shape

Factor = tuple[Tensor, ...]
"""A matrix whole, as (a, b) of which it is the product, or as (a, b, t) of a CP-decomposed convolution."""

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class ProductModule(AdapterModule):
    """A product of factors is added, perhaps with DoRA's magnitude around it."""

    in_float32 = ("dora_scale",)

    algo: ClassVar[str]
    magnitude: Tensor | None
    """DoRA's, [out, 1, ...] or [1, in, ...]. None: no DoRA."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.algo] if self.magnitude is None else READ_ONLY[f"dora-{self.algo}"]

    @property
    def label(self) -> str:
        return KINDS[self.algo].title if self.magnitude is None else f"DoRA {KINDS[self.algo].title}"

    def fits(self, shape: Sequence[int]) -> bool:
        return super().fits(shape) and magnitude_fits(self.magnitude, shape)

    def delta(self, weight: Tensor) -> Tensor:
        return with_magnitude(weight, self.product(weight), self.magnitude)

    def norm(self) -> float:
        return float(self.product(torch.zeros(self.shape)).norm())

    def product(self, like: Tensor) -> Tensor:
        """The product, float32, of the shape and on the device of the weight `like`."""
        raise NotImplementedError

    def _magnitude_tensors(self) -> dict[str, Tensor]:
        return {} if self.magnitude is None else {"dora_scale": self.magnitude}


@dataclass(frozen=True)
class LohaModule(ProductModule):
    """W' = W + ratio * alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry."""

    algo = "loha"
    parts = {name: name for name in (*_LOHA, "hada_t1", "hada_t2")} | {"dora_scale": "magnitude"}

    w1: Factor
    """(w1_a [out, rank], w1_b [rank, in * kh * kw]), or with t1 [rank, rank, kh, kw] ([rank, out], [rank, in])"""
    w2: Factor
    alpha: float
    magnitude: Tensor | None = None

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> LohaModule:
        """Without alpha the scale is 1."""
        w1, w2 = (_read_factor(name, parts, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        if _shape_of(w1) != _shape_of(w2):
            raise AdapterError(
                f"{name} has w1 {list(_shape_of(w1))} and w2 {list(_shape_of(w2))}, which do not fit together."
            )
        module = cls(w1, w2, 0.0)
        magnitude = _read_magnitude(name, parts, module.shape)
        return replace(module, alpha=float(module.rank) if alpha is None else alpha, magnitude=magnitude)

    @property
    def rank(self) -> int:
        return self.w1[1].shape[0]

    @property
    def kernel(self) -> int:
        return _kernel_of(self.w1)

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape_of(self.w1)

    def product(self, like: Tensor) -> Tensor:
        w1, w2 = (_whole(factor, like.device).reshape(like.shape) for factor in (self.w1, self.w2))
        return self.alpha / self.rank * w1 * w2

    def tensors(self) -> dict[str, Tensor]:
        factors = {**_named("hada_w1", "hada_t1", self.w1), **_named("hada_w2", "hada_t2", self.w2)}
        return {**factors, **self._magnitude_tensors()}


@dataclass(frozen=True)
class LokrModule(ProductModule):
    """W' = W + ratio * alpha / rank * kron(w1, w2); where neither is decomposed, alpha counts for nothing."""

    algo = "lokr"
    parts = {name: name for name in (*_LOKR, "lokr_t2")} | {"dora_scale": "magnitude"}

    w1: Factor
    """Whole [a, c], or ([a, rank], [rank, c]); the weight is [a * b, c * d, kh, kw]"""
    w2: Factor
    """Whole [b, d] or [b, d, kh, kw], ([b, rank], [rank, d * kh * kw]), or ([rank, b], [rank, d], [rank, rank, kh, kw])"""
    alpha: float
    magnitude: Tensor | None = None

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> LokrModule:
        """Without alpha the scale is 1."""
        w1, w2 = _read_factor(name, parts, "lokr_w1", None), _read_factor(name, parts, "lokr_w2", "lokr_t2")
        require_fit(name, w1[0].ndim == 2, lokr_w1=w1[0])
        module = cls(w1, w2, 0.0)
        magnitude = _read_magnitude(name, parts, module.shape)
        own = float(module.rank) if alpha is None or module.is_whole else alpha
        return replace(module, alpha=own, magnitude=magnitude)

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
        return _kernel_of(self.w2)

    @property
    def shape(self) -> tuple[int, ...]:
        (a, c), (b, d, *kernel) = _shape_of(self.w1), _shape_of(self.w2)
        return (a * b, c * d, *kernel)

    def product(self, like: Tensor) -> Tensor:
        w1, w2 = _whole(self.w1, like.device), _whole(self.w2, like.device).flatten(1)
        scale = 1.0 if self.is_whole else self.alpha / self.rank
        return scale * torch.kron(w1, w2).reshape(like.shape)

    def tensors(self) -> dict[str, Tensor]:
        factors = {**_named("lokr_w1", "lokr_t1", self.w1), **_named("lokr_w2", "lokr_t2", self.w2)}
        return {**factors, **self._magnitude_tensors()}


def _read_magnitude(name: str, parts: dict[str, Tensor], shape: Sequence[int]) -> Tensor | None:
    return read_magnitude(name, parts.pop("magnitude"), shape) if "magnitude" in parts else None


def _read_factor(name: str, parts: dict[str, Tensor], part: str, core: str | None) -> Factor:
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


def _named(name: str, core: str, factor: Factor) -> dict[str, Tensor]:
    """What `_read_factor` reads."""
    names = (name,) if len(factor) == 1 else (f"{name}_a", f"{name}_b", core)
    return dict(zip(names, factor, strict=False))


def _whole(factor: Factor, device: torch.device | str = "cpu") -> Tensor:
    """The matrix of a factor, float32."""
    parts = [part.to(device, torch.float32) for part in factor]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0] @ parts[1].flatten(1)
    return torch.einsum("ijhw,ip,jr->prhw", parts[2], parts[0], parts[1])


def _shape_of(factor: Factor) -> tuple[int, ...]:
    """As far as the tensors tell: a kernel without t is one with the inputs."""
    if len(factor) == 1:
        return tuple(factor[0].shape)
    if len(factor) == 2:
        return (factor[0].shape[0], math.prod(factor[1].shape[1:]))
    return (factor[0].shape[1], factor[1].shape[1], *factor[2].shape[2:])


def _kernel_of(factor: Factor) -> int:
    return factor[-1].shape[-1] if factor[-1].ndim == 4 else 1


# ------------------------------------------------------------------------------------------------ as they are trained


class ProductLayer(PeftLayer):
    """PEFT's layer, of which only the forward pass is another: weights are multiplied out in float32 and used in the dtype of the
    input, and what is dropped is drawn on the device.

    They start from PEFT's values, one factor zero, not from LyCORIS' (standard normal ones), so that learning rates of LoRA do.
    """

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
        delta = self.multiplier * self.delta().reshape(weight_shape(base))
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


class LohaLayer(ProductLayer):
    names = _LOHA
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


class LokrLayer(ProductLayer):
    names = _LOKR
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
