"""LoRA and DoRA as a network trains them, on the layers that PEFT has put into the model.

Sources: LoRA (arXiv 2106.09685); DoRA (arXiv 2402.09353, equation 5, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn

from networks.adapted_layer import AdaptedLayer, Draw, copy_weights
from networks.adapters import AdapterModule, LoraModule
from networks.dropouts import drop_ranks
from networks.lora import ADAPTER
from networks.spec import NetworkSpec
from networks.trained_weights import Conv2d, Linear

LORA_DOWN, _UP, _MAGNITUDE = f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight", "dora_scale"


class _Lora(AdaptedLayer):
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

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
            down, up = (torch.stack([one.detach() for one in factors]).float().flatten(2) for factors in pairs)
            # |up @ down| by the small products: no matrix of the weight's size.
            squared = ((up.mT @ up) * (down @ down.mT)).sum(dim=(1, 2))
            found |= zip(places, squared.clamp(min=0).sqrt().unbind(), strict=True)
        return torch.stack([layer.strength * found[place] for place, layer in enumerate(layers)])

    def _magnitude(self) -> Tensor | None:
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # transformers and older diffusers pass a scale of their own to layers that they think PEFT's; there is none here.
        result: Tensor = self.base_layer(x)
        return result + self._added(x) if self.enabled else result

    def _added(self, x: Tensor) -> Tensor:
        added: Tensor = self.lora_B[ADAPTER](self.lora_A[ADAPTER](x)) * self.scale
        keeps = self.keeps_module(added)
        return added if keeps is None else added * keeps


class _Dora(_Lora):
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
        added = self.lora_B[ADAPTER](self.lora_A[ADAPTER](self._scaled(x, factor))) * self.scale
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


class LoraLinear(_Lora, peft_layers.Linear):
    """LoRA on a Linear."""


class LoraConv2d(_Lora, peft_layers.Conv2d):
    """LoRA on a convolution, of any kernel size."""


class DoraLinear(_Dora, peft_layers.Linear):
    """DoRA on a Linear."""


class DoraConv2d(_Dora, peft_layers.Conv2d):
    """DoRA on a convolution, of any kernel size."""


def to_adapted(layer: Any, spec: NetworkSpec, rank: int, alpha: float) -> AdaptedLayer:
    """PEFT's LoRA layer, turned in place into one of these. Its weights are still to be made."""
    is_conv = isinstance(layer.base_layer, nn.Conv2d)
    for part in (layer.lora_A, layer.lora_B):
        # The same module with another forward; a new class keeps the names in the state dict.
        part[ADAPTER].__class__ = Conv2d if is_conv else Linear
    kinds = (DoraLinear, DoraConv2d) if spec.algo == "dora" else (LoraLinear, LoraConv2d)
    layer.__class__ = kinds[is_conv]
    adapted: AdaptedLayer = layer
    adapted.set_up(rank, alpha, spec.module_dropout)
    drop_ranks(layer.lora_A[ADAPTER], dropout=spec.dropout, rank_dropout=spec.rank_dropout)
    return adapted
