"""Frozen convolutions that keep nothing of their input for the backward pass.

torch's convolution saves its input whether or not the weight is trained; with a frozen weight only the weight is needed
for the gradient of the input. In a U-Net with adapters in few places that input is a third of all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _FrozenConvolution(torch.autograd.Function):
    """conv2d whose backward is the transposed convolution of the gradient alone."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: tuple[Any, ...]
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.settings, ctx.shape = settings, input.shape
        stride, padding, dilation, groups = settings
        return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Only the shape of the input counts here; one element stretched to it takes no memory.
        input = gradient.new_empty(1).expand(ctx.shape)
        of_input = torch.ops.aten.convolution_backward(
            gradient, input, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )[0]
        return of_input, None, None, None


class FrozenConv2d(nn.Conv2d):
    """A Conv2d with zero padding whose weights are never trained."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return _FrozenConvolution.apply(input, self.weight, self.bias, settings)


def save_no_inputs(model: nn.Module) -> int:
    """Turn the frozen plain convolutions of `model` into FrozenConv2d, in place; how many there were."""
    found = 0
    for module in model.modules():
        frozen = type(module) is nn.Conv2d and not any(p.requires_grad for p in module.parameters())
        if frozen and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = FrozenConv2d
            found += 1
    return found
