"""Frozen layers that keep nothing of their input for the backward pass, and compute by the faster kernels of products.py.

torch's convolution saves its input whether or not the weight is trained; with a frozen weight only the weight is needed
for the gradient of the input. In a U-Net with adapters in few places that input is a third of all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.models import products


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return products.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return products.linear_gradient(gradient, weight), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, settings: products.Settings) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings, ctx.shape = settings, input.shape
        return products.convolution(input, weight, bias, settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return products.convolution_gradient(gradient, weight, ctx.shape, ctx.settings), None, None, None


class FrozenLinear(nn.Linear):
    """A Linear whose weights are never trained."""

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return products.linear(input, self.weight, self.bias)
        result: Tensor = _Linear.apply(input, self.weight, self.bias)
        return result


class FrozenConv2d(nn.Conv2d):
    """A Conv2d with zero padding whose weights are never trained."""

    def forward(self, input: Tensor) -> Tensor:
        settings = products.Settings(self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        if not (torch.is_grad_enabled() and input.requires_grad):
            return products.convolution(input, self.weight, self.bias, settings)
        result: Tensor = _Convolution.apply(input, self.weight, self.bias, settings)
        return result


def freeze_layers(model: nn.Module) -> int:
    """Turn the frozen plain Linear layers and convolutions of `model` into these, in place; how many there were."""
    found = 0
    for module in model.modules():
        kind = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}.get(type(module))
        if kind is None or any(p.requires_grad for p in module.parameters()):
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue
        module.__class__ = kind
        found += 1
    return found
