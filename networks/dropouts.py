"""What training leaves out of adapters at random: outputs of the down matrix, ranks, whole adapters.

Everything is drawn on the device that computes, without a word to the host, and in training mode only. Source: kohya
sd-scripts, networks/lora.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def drop_ranks(hidden: Tensor, *, dropout: float, rank_dropout: float, axis: int) -> Tensor:
    """What a down matrix gave, dropped by value (`dropout`), and by sample and rank; what stays is scaled to make up.

    axis: of the ranks, -1 in [batch, ..., rank] of a Linear, 1 in [batch, rank, h, w] of a convolution.
    """
    hidden = F.dropout(hidden, dropout)
    if rank_dropout > 0:
        shape = [1] * hidden.ndim
        shape[0], shape[axis] = hidden.shape[0], hidden.shape[axis]
        hidden = hidden * kept(shape, rank_dropout, hidden) / (1 - rank_dropout)
    return hidden


def kept(shape: list[int], dropout: float, like: Tensor) -> Tensor:
    """1 with probability 1 - dropout, else 0; of the dtype and on the device of `like`."""
    return (torch.rand(shape, device=like.device) >= dropout).to(like.dtype)
