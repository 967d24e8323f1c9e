"""What training leaves out of adapters at random: outputs of the down matrix, ranks, whole adapters.

Everything is drawn on the device that computes, without a word to the host, and in training mode only. Source: kohya
sd-scripts, networks/lora.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def drop_ranks(down: nn.Module, *, dropout: float, rank_dropout: float) -> None:
    """Let what `down` gives be dropped by value (`dropout`), and by sample and rank; what stays is scaled to make up."""

    def drop(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not module.training:
            return output
        output = F.dropout(output, dropout)
        if rank_dropout > 0:
            # [batch, ..., rank] of a Linear, [batch, rank, h, w] of a convolution
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            shape = [1] * output.ndim
            shape[0], shape[axis] = output.shape[0], output.shape[axis]
            output = output * kept(shape, rank_dropout, output) / (1 - rank_dropout)
        return output

    if dropout > 0 or rank_dropout > 0:
        down.register_forward_hook(drop)


def kept(shape: list[int], dropout: float, like: Tensor) -> Tensor:
    """1 with probability 1 - dropout, else 0; of the dtype and on the device of `like`."""
    return (torch.rand(shape, device=like.device) >= dropout).to(like.dtype)
