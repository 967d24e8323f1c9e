"""LoRA in few operations: all weights cast together, a base and its adapter in one function, one input in one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class AtWork(torch.autograd.Function):
    """Weights as products take them, times their factors and in `dtype`, in a few operations for all.

    stacks: places of weights [rank, in] whose copies are to lie behind each other; each stack [sum of ranks, in] comes after the
    copies, in the same memory and without a gradient. forget: called at the end of the backward pass, when the copies belong to
    the weights as they were.
    """

    @staticmethod
    def forward(
        ctx: Any,
        forget: Callable[[], None],
        dtype: torch.dtype,
        factors: list[float],
        stacks: Sequence[Sequence[int]],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.forget, ctx.factors, ctx.dtype = forget, factors, weights[0].dtype
        ctx.set_materialize_grads(False)
        copies = list(torch._foreach_mul(weights, factors))
        if not stacks:
            return tuple(_cast(copies, dtype))
        targets = [torch.empty_like(copy, dtype=dtype) for copy in copies]
        stacked = []
        for places in stacks:
            ranks = [len(copies[place]) for place in places]
            stacked.append(targets[places[0]].new_empty(sum(ranks), copies[places[0]].shape[1]))
            for place, part in zip(places, stacked[-1].split(ranks), strict=True):
                targets[place] = part
        torch._foreach_copy_(targets, copies)
        ctx.mark_non_differentiable(*stacked)
        return *targets, *stacked

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.forget()
        results: list[Tensor | None] = [None] * len(ctx.factors)
        there = [(place, gradient) for place, gradient in enumerate(gradients[: len(results)]) if gradient is not None]
        # Not in place: a gradient in the dtype of its weight may be another one's too.
        scaled = _cast([gradient for _, gradient in there], ctx.dtype)
        scaled = list(torch._foreach_mul(scaled, [ctx.factors[place] for place, _ in there]))
        for (place, _), value in zip(there, scaled, strict=True):
            results[place] = value
        return None, None, None, None, *results


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class LoraLinears(torch.autograd.Function):
    """x W^T + bias + x down^T up^T of layers that are given the same x, with frozen Ws [out, in].

    stacked: their downs, [sum of ranks, in]. parts: weight, bias, down and up of each layer. One layer takes three products, and
    five in the backward pass; of several, what goes through `stacked` is one product for all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stacked: Tensor, *parts: Any) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = (parts[i::4] for i in range(4))
        ctx.ranks = [len(down) for down in downs]
        hidden = x.flatten(0, -2) @ stacked.T  # [rows, sum of ranks]
        results = []
        for weight, bias, up, own in zip(weights, biases, ups, hidden.split(ctx.ranks, dim=1), strict=True):
            result = F.linear(x, weight, bias)
            result.view(-1, result.shape[-1]).addmm_(own, up.T)
            results.append(result)
        ctx.save_for_backward(x, hidden, stacked, *weights, *ups)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, stacked, *rest = ctx.saved_tensors
        weights, ups = rest[: len(ctx.ranks)], rest[len(ctx.ranks) :]
        flat = [gradient.flatten(0, -2) for gradient in gradients]  # [rows, out]
        of_hidden = torch.empty_like(hidden)
        for gradient, up, own in zip(flat, ups, of_hidden.split(ctx.ranks, dim=1), strict=True):
            torch.mm(gradient, up, out=own)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = flat[0] @ weights[0]
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                of_x.addmm_(gradient, weight)
            of_x = of_x.addmm_(of_hidden, stacked).view(x.shape)
        of_downs = (of_hidden.T @ x.flatten(0, -2)).split(ctx.ranks)
        of_ups = [gradient.T @ own for gradient, own in zip(flat, hidden.split(ctx.ranks, dim=1), strict=True)]
        of_parts = [part for pair in zip(of_downs, of_ups, strict=True) for part in (None, None, *pair)]
        return of_x, None, *of_parts
