"""LoRA, on 3x3 convolutions too (LoCon), and DoRA.

Sources: LoRA (arXiv 2106.09685, section 4.1), the same product for Linear layers, 1x1 and 3x3 convolutions as in kohya's
networks.lora; CP-decomposed convolutions as in LyCORIS; DoRA (arXiv 2402.09353, equation 5, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from networks import AdapterError
from networks.adapted_layer import AdaptedLayer, Draw, Sizes, copy_weights
from networks.adapter_module import AdapterModule
from networks.dropouts import drop_ranks
from networks.injection import PeftLayer
from networks.kinds import KINDS, Kind
from networks.kinds.dora import read_magnitude, with_magnitude
from networks.kinds.lora_products import AtWork, LoraLinears
from networks.spec import NetworkSpec
from networks.targets import ADAPTER, with_one_input


@dataclass(frozen=True)
class LoraModule(AdapterModule):
    """One module's adapter: W' = W + ratio * alpha / rank * up @ down."""

    parts = {
        "lora_down.weight": "down",
        "lora_up.weight": "up",
        "lora_mid.weight": "mid",
        "dora_scale": "magnitude",
    }
    needed = ("down", "up")
    in_float32 = ("dora_scale",)  # what it differs by from the norms is small

    down: Tensor
    """[rank, in] or [rank, in, kh, kw]; with `mid` [rank, in, 1, 1]"""
    up: Tensor
    """[out, rank] or [out, rank, 1, 1]"""
    alpha: float
    mid: Tensor | None = None
    """[rank, rank, kh, kw] of a CP-decomposed convolution, else None"""
    magnitude: Tensor | None = None
    """DoRA's, [out, 1, ...] or [1, in, ...]: the axis that is not 1 keeps its norm apart. None: no DoRA."""

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> LoraModule:
        """`vector` is a part too: the magnitude in PEFT's form. Without alpha the scale is 1."""
        down, up, mid = parts.pop("down"), parts.pop("up"), parts.pop("mid", None)
        _check_shapes(name, down, up, mid)
        module = cls(down, up, float(down.shape[0]) if alpha is None else alpha, mid)
        for part in ("magnitude", "vector"):
            if part in parts:
                module = replace(
                    module, magnitude=read_magnitude(name, parts.pop(part), module.shape, part == "vector")
                )
        return module

    @property
    def kind(self) -> Kind:
        return KINDS["lora" if self.magnitude is None else "dora"]

    @property
    def label(self) -> str:
        """LoRA (Linear or 1x1 convolution), LoCon (3x3 convolution), CP (the same in three factors), with DoRA before."""
        plain = "CP" if self.mid is not None else "LoCon" if self.kernel > 1 else "LoRA"
        return plain if self.magnitude is None else f"DoRA {plain}"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def kernel(self) -> int:
        kernel = self.down if self.mid is None else self.mid
        return kernel.shape[-1] if kernel.ndim == 4 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it is for: [out, in], or [out, in, kh, kw]."""
        kernel = self.down if self.mid is None else self.mid
        return (self.up.shape[0], self.down.shape[1], *kernel.shape[2:])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is for a weight of this shape; a matrix serves a 1x1 convolution and the other way round."""
        return len(shape) >= 2 and _without_ones(self.shape) == _without_ones(shape)

    def without_mid(self) -> LoraModule:
        """The same product as plain down and up, float32: the kernel of a CP-decomposed convolution goes into down."""
        if self.mid is None:
            return self
        down = torch.einsum("mnhw,ni->mihw", self.mid.float(), self.down.flatten(1).float())
        return replace(self, down=down, up=self.up.float(), mid=None)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """up [out, rank] and down [rank, in * kh * kw], float64."""
        plain = self.without_mid()
        return plain.up.flatten(1).double(), plain.down.flatten(1).double()

    def product(self, device: torch.device | str = "cpu") -> Tensor:
        """alpha / rank * up @ down, float32, of `shape`."""
        plain = self.without_mid()
        up, down = (part.to(device, torch.float32) for part in (plain.up, plain.down))
        whole = up.flatten(1) @ down.flatten(1)
        return (self.alpha / self.rank * whole).reshape(self.shape)

    def delta(self, weight: Tensor) -> Tensor:
        added = self.product(weight.device).reshape(weight.shape)
        return with_magnitude(weight, added, self.magnitude)

    def of_rows(self, rows: slice) -> LoraModule | None:
        return replace(self, up=self.up[rows]) if self.magnitude is None else None

    def norm(self) -> float:
        """Of alpha / rank * up @ down (of DoRA: before the magnitude): sqrt(trace((up^T up) (down down^T)))."""
        up, down = self.matrices()
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.alpha / self.rank) * max(squared, 0.0) ** 0.5

    def tensors(self) -> dict[str, Tensor]:
        """CP-decomposed convolutions as ordinary ones, which every program reads."""
        plain = self.without_mid()
        tensors = {"lora_down.weight": plain.down, "lora_up.weight": plain.up}
        return tensors if self.magnitude is None else {**tensors, "dora_scale": self.magnitude}


def _check_shapes(name: str, down: Tensor, up: Tensor, mid: Tensor | None) -> None:
    shapes = f"down {list(down.shape)} and up {list(up.shape)}"
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or down.numel() == 0 or any(side != 1 for side in up.shape[2:]):
        raise AdapterError(f"{name} has {shapes}, which are of no Linear layer and of no convolution.")
    if up.shape[1] != down.shape[0]:
        raise AdapterError(f"{name} has {shapes}, whose ranks differ.")
    if mid is not None:
        kernel = list(down.shape[2:])
        if mid.ndim != 4 or list(mid.shape[:2]) != [down.shape[0]] * 2 or any(side != 1 for side in kernel):
            raise AdapterError(f"{name} has {shapes}, to which mid {list(mid.shape)} does not belong.")


def _without_ones(shape: Sequence[int]) -> list[int]:
    """A weight's shape without a kernel of 1x1."""
    return list(shape[:2]) if all(side == 1 for side in shape[2:]) else list(shape)


# ------------------------------------------------------------------------------------------------ as it is trained

LORA_DOWN, _UP, _MAGNITUDE = f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight", "dora_scale"


class _Together:
    """Layers that are given the same input: the first that is called computes for all.

    That they will be is told by their places (`targets.with_one_input`); whether they are is seen at each call.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = tuple(layers)
        self.forget()

    def forget(self) -> None:
        self.downs: Tensor | None = None
        """At work behind each other, [sum of ranks, in], while they are."""
        self.input: Tensor | None = None
        self.results: dict[LoraLayer, Tensor] = {}

    def product(self, layer: LoraLayer, x: Tensor) -> Tensor:
        if x is not self.input or layer not in self.results:
            parts = [part for one in self.layers for part in one.parts_at_work(x.dtype)]
            self.input = x
            self.results = dict(zip(self.layers, LoraLinears.apply(x, self.downs, *parts), strict=True))
        result = self.results.pop(layer)
        if not self.results:
            self.input = None
        return result


def _is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether the base's product can be made together with the adapter's: with weights that need no decoding and, on a CPU, a layer
    that has no kernels of its own."""
    if type(base) is nn.Linear:
        return True
    return isinstance(base, nn.Linear) and "weight" in base._parameters and not x.is_cpu


class LoraLayer(PeftLayer):
    """PEFT's layer, of which only the forward pass is another."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    drops: tuple[float, float]
    """Of what the down matrix gives: by value, and by sample and rank."""
    at_work: tuple[Tensor, Tensor] | None
    """Down, and up times the scale, as they were cast for the pass that runs; see `cast_together`."""
    together: _Together | None
    """With the layers that are given the same input."""

    @classmethod
    def configuration(cls, spec: NetworkSpec, alpha: float, **common: Any) -> LoraConfig:
        return LoraConfig(lora_alpha=alpha, **common)  # type: ignore[arg-type]  # annotated int, used as a number

    @classmethod
    def put_into(cls, model: nn.Module, sizes: Sizes, spec: NetworkSpec) -> dict[str, AdaptedLayer]:
        layers: dict[str, Any] = super().put_into(model, sizes, spec)
        for paths in with_one_input(model, sizes):
            together = _Together([layers[path] for path in paths])
            for layer in together.layers:
                layer.together = together
        return layers

    def set_up(self, rank: int, alpha: float, spec: NetworkSpec) -> None:
        super().set_up(rank, alpha, spec)
        self.drops, self.at_work, self.together = (spec.dropout, spec.rank_dropout), None, None
        if isinstance(self.base_layer, nn.Conv2d):  # PEFT makes the parts of the base layer's own class
            for part in (self.lora_A, self.lora_B):
                part[ADAPTER].__class__ = nn.Conv2d

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return dict(zip((LORA_DOWN, _UP), self.factors(), strict=True))

    def reset(self, draw: Draw) -> None:
        down: Any = self.lora_A[ADAPTER]
        up: Any = self.lora_B[ADAPTER]
        down.weight = self._fresh(down.weight.shape, draw(LORA_DOWN))
        up.weight = self._fresh(up.weight.shape, None)

    def to_module(self) -> AdapterModule:
        down, up = (factor.detach() for factor in self.factors())
        return LoraModule(down, up, self.adapter_alpha, magnitude=self._magnitude())

    def load_module(self, module: AdapterModule) -> None:
        assert isinstance(module, LoraModule)
        plain = module.without_mid()
        values = {LORA_DOWN: plain.down, _UP: plain.up.float() * (module.alpha / self.adapter_alpha)}
        if module.magnitude is not None:
            values[_MAGNITUDE] = module.magnitude
        copy_weights(self.weights, values)

    def is_up(self, name: str) -> bool:
        return name == _UP

    def factors(self) -> list[nn.Parameter]:
        return [self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight]  # type: ignore[list-item]

    @staticmethod
    def norms(layers: Sequence[AdaptedLayer]) -> Tensor:
        groups: dict[tuple[torch.Size, ...], list[int]] = {}
        for place, layer in enumerate(layers):
            groups.setdefault(tuple(factor.shape for factor in layer.factors()), []).append(place)
        found: dict[int, Tensor] = {}
        for places in groups.values():
            pairs = zip(*(layers[place].factors() for place in places), strict=True)
            down, up = (torch.stack([factor.detach() for factor in factors]).float().flatten(2) for factors in pairs)
            # |up @ down| by the small products: no matrix of the weight's size.
            squared = ((up.mT @ up) * (down @ down.mT)).sum(dim=(1, 2))
            found |= zip(places, squared.clamp(min=0).sqrt().unbind(), strict=True)
        return torch.stack([layer.strength * found[place] for place, layer in enumerate(layers)])

    def _magnitude(self) -> Tensor | None:
        return None

    @staticmethod
    def cast_together(layers: Sequence[AdaptedLayer], dtype: torch.dtype) -> None:
        of_lora = [layer for layer in layers if isinstance(layer, LoraLayer)]
        places = {layer: 2 * place for place, layer in enumerate(of_lora)}
        joined = list(dict.fromkeys(layer.together for layer in of_lora if layer.together is not None))
        joined = [one for one in joined if all(layer.is_plain(layer.factors()[0]) for layer in one.layers)]

        def forget() -> None:
            for layer in of_lora:
                layer.at_work = None
            for together in joined:
                together.forget()

        forget()
        copies = AtWork.apply(
            forget,
            dtype,
            [factor for layer in of_lora for factor in (1.0, layer.scale)],
            [[places[layer] for layer in together.layers] for together in joined],
            *(weight for layer in of_lora for weight in layer.factors()),
        )
        for layer, place in places.items():
            layer.at_work = copies[place : place + 2]
        for together, downs in zip(joined, copies[2 * len(of_lora) :], strict=True):
            together.downs = downs

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # transformers and older diffusers pass a scale of their own to layers that they think PEFT's; there is none here.
        base = self.base_layer
        if self.is_plain(x):
            together = self.together
            # A compiler takes each layer as it is, and a pass without a backward pass the weights as they are.
            if together is not None and together.downs is not None and self._is_at_work(x.dtype) and not is_compiling():
                return together.product(self, x)
            parts = self.parts_at_work(x.dtype)
            product: Tensor = LoraLinears.apply(x, parts[2], *parts)[0]
            return product
        result: Tensor = base(x)
        if not self.enabled:
            return result
        added = self._added(x)
        keeps = self.keeps_module(added)
        return result + (added if keeps is None else added * keeps)

    def is_plain(self, x: Tensor) -> bool:
        """Whether the whole layer is its base's product and the adapter's."""
        leaves_out = self.training and (self.skip_rate > 0 or any(self.drops))
        return (
            type(self).forward is LoraLayer.forward
            and self.enabled
            and not leaves_out
            and _is_plain(self.base_layer, x)
        )

    def parts_at_work(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Weight and bias of the base layer, and those of the adapter as products take them."""
        return self.base_layer.weight, self.base_layer.bias, *self._weights_at_work(dtype)

    def _is_at_work(self, dtype: torch.dtype) -> bool:
        return self.at_work is not None and torch.is_grad_enabled() and self.at_work[0].dtype == dtype

    def _weights_at_work(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Down, and up times the scale, in the dtype of an input; copies are only for passes that have a backward pass."""
        if self.at_work is not None and self._is_at_work(dtype):
            return self.at_work
        down, up = self.factors()
        return down.to(dtype), (up * self.scale).to(dtype)

    def _added(self, x: Tensor) -> Tensor:
        """scale * up @ down @ x, with what is dropped, but for whole modules."""
        down, up = self._weights_at_work(x.dtype)
        if isinstance(self.base_layer, nn.Conv2d):
            base = self.base_layer
            hidden = F.conv2d(x, down, None, base.stride, base.padding, base.dilation)
            return F.conv2d(self._dropped(hidden, axis=1), up)
        return F.linear(self._dropped(F.linear(x, down), axis=-1), up)

    def _dropped(self, hidden: Tensor, axis: int) -> Tensor:
        if not (self.training and any(self.drops)):
            return hidden
        dropout, rank_dropout = self.drops
        return drop_ranks(hidden, dropout=dropout, rank_dropout=rank_dropout, axis=axis)


class DoraLayer(LoraLayer):
    """W' = m * (W + scale * up @ down) / |W + scale * up @ down|, norms over all but the axis of the inputs.

    That axis is the paper's (m is [1, in] for a weight [out, in]), LyCORIS's, A1111's, and the only one that ComfyUI and
    A1111 compute alike; PEFT's own DoRA keeps the norms of the outputs. As one factor per input it is applied to the
    inputs. The gradient takes the norm for a constant (section 4.3).
    """

    dora_scale: nn.Parameter

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {**super().weights, _MAGNITUDE: self.dora_scale}

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        self.dora_scale = nn.Parameter(self._norms())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.enabled:
            result: Tensor = self.base_layer(x)
            return result
        factor = self.dora_scale / self._norms()  # [1, in, ...], float32
        if (keeps := self.keeps_module(factor)) is not None:
            factor = torch.where(keeps > 0, factor, 1.0)
        base_factor = factor if self.multiplier == 1 else 1 + self.multiplier * (factor - 1)
        added = self._added(self._scaled(x, factor))
        result = self.base_layer(self._scaled(x, base_factor))
        return result + (added if keeps is None else added * keeps.to(added.dtype))

    def _scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        # In float32: half precision would swallow what little a factor differs from 1.
        return (x * (factor if isinstance(self.base_layer, nn.Conv2d) else factor[0])).to(x.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        weight = self.base_layer.weight.float()
        down, up = (factor.float().flatten(1) for factor in self.factors())
        whole = weight + self.strength * (up @ down).reshape(weight.shape)
        axes = [axis for axis in range(whole.ndim) if axis != 1]
        norms = torch.linalg.vector_norm(whole, dim=axes, keepdim=True)
        return norms.clamp(min=torch.finfo(torch.float32).tiny)

    def _magnitude(self) -> Tensor:
        return self.dora_scale.detach()
