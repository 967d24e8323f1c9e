"""What every adapted layer of a network can do, whatever its kind of adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks import AdapterError
from networks.adapter_module import AdapterModule
from networks.dropouts import kept
from networks.spec import NetworkSpec
from networks.targets import weight_shape
from networks.trained_weights import draw_uniform

Sizes = Mapping[str, tuple[int, float]]
"""Path in a model -> rank and alpha."""
Draw = Callable[[str], torch.Generator]
"""Name of a weight within its layer -> the generator that its first values come from."""


class AdaptedLayer:
    """Mixed into the layers that stand in place of a model's Linear and Conv2d; each computes base + adapter.

    Weights are float32 whatever the dtype of the base, and computed with in the dtype of the input. Fresh from `reset`
    the output is the base's to the bit.
    """

    base_layer: Any
    """The model's own Linear or Conv2d."""
    training: bool
    adapter_rank: int
    adapter_alpha: float
    skip_rate: float
    """Probability that a pass goes without the adapter, while training."""
    multiplier: float
    _disable_adapters: bool
    """PEFT's name, so that what is PEFT's works too."""

    @classmethod
    def put_into(cls, model: nn.Module, sizes: Sizes, spec: NetworkSpec) -> dict[str, AdaptedLayer]:
        """Put one of these on the module of `model` at each path, in place. Weights are still to be made."""
        raise NotImplementedError

    def set_up(self, rank: int, alpha: float, spec: NetworkSpec) -> None:
        """Called once, when `base_layer` is there."""
        self.adapter_rank, self.adapter_alpha = rank, alpha
        self.skip_rate = spec.module_dropout
        self.enabled, self.multiplier = True, 1.0

    @property
    def enabled(self) -> bool:
        return not self._disable_adapters

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._disable_adapters = not value

    def set_scale(self, adapter: str, scale: float) -> None:
        """PEFT's and diffusers' way to set the multiplier of `adapter`, the only one."""
        self.multiplier = scale

    @property
    def weight_shape(self) -> torch.Size:
        """Of what it adds to."""
        return weight_shape(self.base_layer)

    @property
    def strength(self) -> float:
        """The scale as trained."""
        return self.adapter_alpha / self.adapter_rank

    @property
    def scale(self) -> float:
        return self.multiplier * self.strength

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Name within the layer -> trained weight."""
        raise NotImplementedError

    def reset(self, draw: Draw) -> None:
        """Make the weights anew, on the base layer's device."""
        raise NotImplementedError

    def to_module(self) -> AdapterModule:
        """The adapter as files and merging know it; its tensors are the weights themselves, not copies."""
        raise NotImplementedError

    def load_module(self, module: AdapterModule) -> None:
        """Take the weights over; a module of another alpha is scaled to the one here. Shapes have been checked."""
        raise NotImplementedError

    def is_up(self, name: str) -> bool:
        """Whether LoRA+ lets a weight learn faster."""
        return False

    def factors(self) -> list[nn.Parameter]:
        """Weights whose product the adapter's effect is; scaling each scales it. Of kinds that add."""
        raise NotImplementedError

    @staticmethod
    def norms(layers: Sequence[AdaptedLayer]) -> Tensor:
        """Frobenius norms of what layers of this kind add to their weights as trained, [layers]. Of kinds that add."""
        raise NotImplementedError

    @staticmethod
    def cast_together(layers: Sequence[AdaptedLayer], dtype: torch.dtype) -> None:
        """Cast the weights of layers of this kind for one pass in `dtype`, forward and backward, in a few operations.

        Without, each is cast where it is used, as those of other kinds always are.
        """

    def keeps_module(self, like: Tensor) -> Tensor | None:
        """1 or 0, drawn anew, for this pass of the layer; None where it is never left out."""
        return kept([], self.skip_rate, like) if self.training and self.skip_rate > 0 else None

    def _fresh(self, shape: torch.Size, generator: torch.Generator | None) -> nn.Parameter:
        """Drawn uniformly by its fan-in, or zero."""
        device = next(self.base_layer.parameters()).device
        values = torch.zeros(shape) if generator is None else draw_uniform(shape, generator)
        return nn.Parameter(values.to(device))


def copy_weights(into: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Take values over in place; those of a matrix serve a 1x1 convolution and the other way round."""
    with torch.no_grad():
        for name, parameter in into.items():
            if values[name].numel() != parameter.numel():
                raise AdapterError(f"{name} has the shape {list(values[name].shape)}, not {list(parameter.shape)}.")
            parameter.copy_(values[name].reshape(parameter.shape))
