"""Frozen Linear and convolution layers whose weights are kept in float8 and computed with in the format of the input.

The backward pass converts a weight once more instead of keeping the converted one, so that half of what a bfloat16 model
takes is saved during the whole step, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STORED = torch.float8_e4m3fn
_GREATEST = torch.finfo(STORED).max

# First and last layers are small and change everything behind them; what a model says its dtype is, the first one is.
_KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "text_projection")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(input, weight.to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings, ctx.shape = settings, input.shape
        stride, padding, dilation, groups = settings
        return F.conv2d(input, weight.to(input.dtype), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Only the shape of the input counts here; one element stretched to it takes no memory.
        input = gradient.new_empty(1).expand(ctx.shape)
        of_input = torch.ops.aten.convolution_backward(
            gradient, input, weight.to(gradient.dtype), None, stride, padding, dilation, False, [0, 0], groups,
            [True, False, False],
        )[0]  # fmt: skip
        return of_input, None, None, None


class Float8Linear(nn.Linear):
    """A frozen Linear with float8 weights."""

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _Linear.apply(input, self.weight, self.bias)
        return result


class Float8Conv2d(nn.Conv2d):
    """A frozen convolution with zero padding and float8 weights."""

    def forward(self, input: Tensor) -> Tensor:
        settings = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = _Convolution.apply(input, self.weight, self.bias, settings)
        return result


def keep_in_float8(model: nn.Module) -> int:
    """Round the weights of the frozen plain Linear and Conv2d layers of `model` to float8 (e4m3), in place; how many.

    Biases, norms, embeddings, and the first and last layers stay as they are. Values beyond 448 become 448.
    """
    found = 0
    for path, module in model.named_modules():
        kind = {nn.Linear: Float8Linear, nn.Conv2d: Float8Conv2d}.get(type(module))
        if kind is None or any(part in _KEPT for part in path.split(".")) or module.weight.requires_grad:
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue
        module.weight.data = module.weight.data.clamp(-_GREATEST, _GREATEST).to(STORED)
        module.__class__ = kind
        found += 1
    return found
