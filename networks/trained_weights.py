"""How trained weights are kept, used and drawn: float32 at rest, the input's dtype at work, random by name."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """A Conv2d whose float32 weights are cast to the dtype of each input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return self._conv_forward(input, self.weight.to(input.dtype), bias)


class Linear(nn.Linear):
    """A Linear whose float32 weights are cast to the dtype of each input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `name` alone.

    A tensor drawn from it is the same on every device, and whatever else was or was not drawn before.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # manual_seed takes 63 bits


def draw_uniform(shape: torch.Size, generator: torch.Generator, *, fan_in: int | None = None) -> Tensor:
    """Float32 values on the CPU, uniform within +-1/sqrt(fan_in).

    That is kaiming_uniform(a=sqrt(5)), the default of nn.Linear and nn.Conv2d. `fan_in` is that of `shape` as a weight
    [out, in, ...] unless given (for biases).
    """
    bound = 1 / math.sqrt(fan_in or math.prod(shape[1:]))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
