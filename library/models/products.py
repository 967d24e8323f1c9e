"""Products and convolutions with weights that are not trained, and their gradients, by the faster of two kernels on a CPU.

torch computes float32 products with MKL, which leaves half of an AMD processor's vector units idle, and convolutions with oneDNN,
which brings the weights into an order of its own at each call: for few pixels that takes several times as long as the arithmetic.
Both are oneDNN products with the weights as they lie here. Measured at full-size SD1.5, batch 1, float32, LoRA on all of the
U-Net's transformers, one core with AVX-512, 256 px: 4.9 CPU-seconds a step by torch, 4.2 with products by oneDNN, 2.7 with
convolutions as products too. At 512 px 17.1 and 13.9; with AVX2 alone no difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

FEWEST = 1 << 21
"""Multiplications from which a oneDNN product is the faster one; below, the call itself costs more (12 us beside 3)."""


class Settings(NamedTuple):
    """Of a convolution, each [rows, columns], and its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], and bias [out]: F.linear within rounding."""
    if _is_for_onednn(x, weight):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient [..., in] for the input of `linear`, of that for its output [..., out]."""
    if _is_for_onednn(gradient, weight):
        return _onednn(gradient, weight.t(), None)
    return gradient @ weight


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """x [B, in, h, w] with weight [out, in, kh, kw]: F.conv2d within rounding."""
    size = _output_size(x.shape, weight.shape, settings)
    if not _is_product(x, weight, settings, len(x) * size[0] * size[1]):
        return F.conv2d(x, weight, bias, *settings)
    columns = x.flatten(2)
    if weight.shape[2:] != (1, 1):
        columns = F.unfold(x, weight.shape[2:], padding=settings.padding, stride=settings.stride)  # type: ignore[arg-type]
    return _onednn(columns.mT, weight.flatten(1), bias).mT.unflatten(2, size).contiguous()


def convolution_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, settings: Settings) -> Tensor:
    """Gradient for the input of `convolution`, of this shape, of that for its output [B, out, h, w]."""
    if not _is_product(gradient, weight, settings, len(gradient) * gradient[0, 0].numel()):
        # Only the shape of the input counts here; one element stretched to it takes no memory.
        input = gradient.new_empty(1).expand(shape)
        stride, padding, dilation, groups = settings
        whole = torch.ops.aten.convolution_backward(
            gradient, input, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return whole[0]
    columns = _onednn(gradient.flatten(2).mT, weight.flatten(1).t(), None).mT
    if weight.shape[2:] == (1, 1):
        return columns.reshape(shape)
    return F.fold(columns, shape[2:], weight.shape[2:], padding=settings.padding, stride=settings.stride)  # type: ignore[arg-type]


def _output_size(shape: torch.Size, kernel: torch.Size, settings: Settings) -> tuple[int, int]:
    stride, padding, dilation, _ = settings
    rows, columns = (
        (shape[i] + 2 * padding[i - 2] - dilation[i - 2] * (kernel[i] - 1) - 1) // stride[i - 2] + 1 for i in (2, 3)
    )
    return rows, columns


def _is_product(x: Tensor, weight: Tensor, settings: Settings, pixels: int) -> bool:
    """Whether a convolution to so many pixels is faster as a product: where its weights outweigh the pixels spread to columns."""
    is_plain = settings.groups == 1 and settings.dilation == (1, 1) and weight.is_contiguous()
    is_plain = is_plain and (weight.shape[2:] != (1, 1) or (settings.stride, settings.padding) == ((1, 1), (0, 0)))
    return is_plain and _computes(x, weight) and pixels <= weight.shape[0] and pixels * weight.numel() >= FEWEST


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return _computes(x, weight) and x.numel() // x.shape[-1] * weight.numel() >= FEWEST


def _computes(x: Tensor, weight: Tensor) -> bool:
    # torch's compiler has kernels of its own for products, and takes oneDNN's operation for packed constant weights only.
    on_cpu = not is_compiling() and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and x.dtype == weight.dtype == torch.float32


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
