"""How a frozen weight is kept between its uses: a table of formats, each with the way there and back.

Layers that keep their weights so are in `frozen.py`: they decode where they compute, once more in the backward pass, and never
keep what they decoded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.quiet import let_in

Kept = tuple[Tensor, Tensor | None]
"""What is kept of a weight: numbers, and scales where there are any."""


@dataclass(frozen=True)
class Format:
    encode: Callable[[Tensor], Kept]
    decode: Callable[[Tensor, Tensor | None, torch.Size, torch.dtype], Tensor]
    """Numbers, scales, shape of the weight, dtype to compute in -> the weight, as long as no other is decoded."""


# ------------------------------------------------------------------------------------------ one number for one number

_GREATEST = torch.finfo(torch.float8_e4m3fn).max


def _as_it_is(weight: Tensor) -> Kept:
    return weight, None


def _to_float8(weight: Tensor) -> Kept:
    """As kohya's fp8_base: rounded to e4m3 without a scale; values beyond 448 become 448."""
    return weight.clamp(-_GREATEST, _GREATEST).to(torch.float8_e4m3fn), None


class _Room(threading.local):
    """Memory of the CPU that each decoded weight lies in, until the next one does."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def like(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        size = numbers.numel() * dtype.itemsize
        if self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory[:size].view(dtype).as_strided(numbers.shape, numbers.stride())


_room = _Room()


def _cast(numbers: Tensor, scales: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if numbers.device.type != "cpu" or torch.compiler.is_compiling():
        return numbers.to(dtype)
    # Fresh memory for each weight: 2.25 s instead of 2.15 for a pass through SD1.5's U-Net and back (256 px, float32, two cores,
    # stored in float16; 1.98 s stored in float32), and a peak of 3.7 GB instead of 2.8 (4.3).
    return _room.like(numbers, dtype).copy_(numbers)


# ------------------------------------------------------------------------------------------------ with scales beside it


def _to_int8(weight: Tensor) -> Kept:
    """A scale for each output, the largest magnitude of its row / 127, as in LLM.int8() (arXiv 2208.07339, section 2.1)."""
    rows = weight.float()
    scales = (
        rows.abs().amax(dim=tuple(range(1, rows.ndim)), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    )
    return (rows / scales).round().to(torch.int8), scales


def _from_int8(numbers: Tensor, scales: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    assert scales is not None
    return (numbers * scales).to(dtype)


NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA (arXiv 2305.14314, section 3)."""


def _to_nf4(weight: Tensor) -> Kept:
    """16 quantiles of a normal distribution, two to a byte, [n / 2, 1], and the largest magnitude of each block, [n / 64]."""
    let_in("bitsandbytes")
    from bitsandbytes.functional import quantize_4bit

    numbers, state = quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return numbers, state.absmax


def _from_nf4(numbers: Tensor, scales: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    # bitsandbytes' function around this operation takes objects that torch.compile cannot look into.
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(numbers, scales, NF4_BLOCK, "nf4", shape, dtype)
    return weight


STORED = "stored"

FORMATS: dict[str, Format] = {
    STORED: Format(_as_it_is, _cast),
    "fp8": Format(_to_float8, _cast),
    "int8": Format(_to_int8, _from_int8),
    "nf4": Format(_to_nf4, _from_nf4),
}
"""By the values of --base_quantization; stored: in the file's own numbers, where these are shorter than what is computed in."""

OF_CONVOLUTIONS = {"nf4": "int8"}
"""Where convolutions are kept otherwise: in int8 they take what float8 takes, at a third of its error (normal values)."""
