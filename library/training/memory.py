"""How much device memory a step will need, counted on the meta device; nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn


class _FusedAttention(torch.autograd.Function):
    """Stands for a fused attention kernel, which keeps its inputs and output and no attention matrix."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def kept_bytes(models: Iterable[nn.Module], forward: Callable[[], object]) -> int:
    """Bytes that `forward` leaves for the backward pass beside the models' own weights; everything on the meta device."""
    weights = {p.untyped_storage()._cdata for model in models for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        return _FusedAttention.apply(query, key, value)

    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
