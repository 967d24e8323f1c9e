"""Frozen Linear and convolution layers: what the backward pass needs of them is the weight alone, as it is at rest.

torch's convolution saves its input whether or not the weight is trained. In a U-Net with adapters in few places that input is
a third of all that is kept. Weights at rest in another format (`at_rest.py`) are decoded once more in the backward pass, so
that what this saves is saved during the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.models import products
from library.models.at_rest import FORMATS, OF_CONVOLUTIONS, STORED

# First and last layers are small and change everything behind them; what a model says its dtype is, the first one is.
_LEFT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "text_projection")

AtRest = tuple[str | None, Tensor, Tensor | None, torch.Size]
"""Format, numbers, scales, and shape of the weight. Without a format the numbers are the weight."""


def _decoded(
    format: str | None, numbers: Tensor, scales: Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    return numbers if format is None else FORMATS[format].decode(numbers, scales, shape, dtype)


class _Frozen(torch.autograd.Function):
    """A Linear layer, or with `settings` a convolution, that keeps nothing of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        settings: products.Settings | None,
        format: str | None,
        numbers: Tensor,
        scales: Tensor | None,
        shape: torch.Size,
    ) -> Tensor:
        ctx.save_for_backward(numbers, scales)
        ctx.settings, ctx.format, ctx.shape, ctx.input_shape = settings, format, shape, input.shape
        weight = _decoded(format, numbers, scales, shape, input.dtype)
        if settings is None:
            return products.linear(input, weight, bias)
        return products.convolution(input, weight, bias, settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (numbers, scales) = gradients, ctx.saved_tensors
        weight = _decoded(ctx.format, numbers, scales, ctx.shape, gradient.dtype)
        if ctx.settings is None:
            of_input = products.linear_gradient(gradient, weight)
        else:
            of_input = products.convolution_gradient(gradient, weight, ctx.input_shape, ctx.settings)
        return of_input, None, None, None, None, None, None


class _FrozenLayer(nn.Module):
    weight: Tensor

    def at_rest(self) -> AtRest:
        return None, self.weight, None, self.weight.shape


class FrozenLinear(_FrozenLayer, nn.Linear):
    """A Linear layer whose weight is never trained."""

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _Frozen.apply(input, self.bias, None, *self.at_rest())
        return result


class FrozenConv2d(_FrozenLayer, nn.Conv2d):
    """A Conv2d with zero padding whose weight is never trained."""

    def forward(self, input: Tensor) -> Tensor:
        settings = products.Settings(self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        result: Tensor = _Frozen.apply(input, self.bias, settings, *self.at_rest())
        return result


class _Encoded(_FrozenLayer):
    """The weight is at rest in one of FORMATS."""

    format: str
    numbers: nn.Parameter
    scales: nn.Parameter | None
    shape: torch.Size
    """Of the weight."""
    dtype: torch.dtype
    """That the model computes in."""

    def at_rest(self) -> AtRest:
        return self.format, self.numbers, self.scales, self.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Decoded anew for who asks, which takes its time."""
        return _decoded(*self.at_rest(), self.dtype).clone()


class EncodedLinear(_Encoded, FrozenLinear):  # type: ignore[override]  # the weight is not set
    pass


class EncodedConv2d(_Encoded, FrozenConv2d):  # type: ignore[override]
    pass


@dataclass
class Encoded:
    """What encoding a model has come to."""

    layers: int = 0
    plain_bytes: int = 0
    """Of their weights in the format that is computed in."""
    bytes: int = 0
    """At rest."""
    squared_error: Tensor | float = 0.0
    squared: Tensor | float = 0.0

    @property
    def error(self) -> float | None:
        """Norm of what the weights have changed by, relative to their own; None on the meta device."""
        return float(self.squared_error / self.squared) ** 0.5 if isinstance(self.squared, Tensor) else None


_FROZEN = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}


def frozen_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> Linear or Conv2d with zero padding whose weight is not trained, in whatever form; no layers of adapters."""
    kinds = (*_FROZEN, *_FROZEN.values(), EncodedLinear, EncodedConv2d)
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) in kinds
        and not any(parameter.requires_grad for parameter in module.parameters())
        and (isinstance(module, nn.Linear) or (module.padding_mode == "zeros" and not isinstance(module.padding, str)))
    }


def at_rest(layer: nn.Module) -> list[nn.Parameter]:
    """What there is of the weight of a frozen layer."""
    parts = layer.at_rest()[1:3] if isinstance(layer, _FrozenLayer) else (layer.weight,)
    return [part for part in parts if isinstance(part, nn.Parameter)]


def freeze_layers(model: nn.Module, *, linear: bool = False) -> int:
    """Turn the frozen plain convolutions of `model`, and maybe Linear layers, into these, in place; how many there were.

    linear: worth it on a CPU, for the kernels (`products.py`), and where weights are moved during a step.
    """
    plain = [
        layer
        for layer in frozen_layers(model).values()
        if type(layer) is nn.Conv2d or (linear and type(layer) is nn.Linear)
    ]
    for layer in plain:
        layer.__class__ = _FROZEN[type(layer)]
    return len(plain)


@torch.no_grad()
def encode(model: nn.Module, name: str, dtype: torch.dtype) -> Encoded:
    """Keep the weights of the frozen Linear and Conv2d layers of `model` in the format of this name, in place.

    dtype: that it computes in, in which all else is kept: biases, norms, embeddings, the first and the last layers; and, in
    the format `stored`, weights that are no longer than that.
    """
    result = Encoded()
    for path, layer in frozen_layers(model).items():
        weight = layer.weight
        if any(part in _LEFT for part in path.split(".")):
            continue
        if name == STORED and weight.element_size() >= dtype.itemsize:
            continue
        convolves = isinstance(layer, nn.Conv2d)
        format = OF_CONVOLUTIONS.get(name, name) if convolves else name
        numbers, scales = FORMATS[format].encode(weight)
        del layer.weight
        layer.__class__ = EncodedConv2d if convolves else EncodedLinear
        layer.format, layer.shape, layer.dtype = format, weight.shape, dtype
        layer.numbers = nn.Parameter(numbers, requires_grad=False)
        layer.scales = None if scales is None else nn.Parameter(scales, requires_grad=False)
        if name != STORED and not weight.is_meta:
            result.squared_error += (layer.weight.float() - weight.float()).square().sum()
            result.squared += weight.float().square().sum()
        result.layers += 1
        result.plain_bytes += weight.numel() * dtype.itemsize
        result.bytes += numbers.nbytes + (0 if scales is None else scales.nbytes)
    encoded = {id(part) for module in model.modules() if isinstance(module, _Encoded) for part in at_rest(module)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and not tensor.requires_grad and id(tensor) not in encoded:
            tensor.data = tensor.data.to(dtype)
    return result
