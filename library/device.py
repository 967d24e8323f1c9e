"""Which device a script computes on, and in which numbers."""

from __future__ import annotations

import os

import torch

from library.errors import UserError
from library.precision import TORCH_DTYPES, Precision


def choose_device(name: str | None, *, needs: torch.dtype = torch.float32) -> torch.device:
    """The named device, or the best there is. Raises UserError where torch cannot compute in `needs` on it."""
    candidates = ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())
    best = next((kind for kind, there in candidates if there and (kind == "cuda" or needs != torch.float64)), "cpu")
    try:
        device = torch.device(name or best)
        torch.empty(1, device=device, dtype=needs)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def device_name(device: torch.device) -> str:
    """As results of benchmarks name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def choose_dtype(name: Precision | None, device: torch.device) -> torch.dtype:
    """The named format, or for drawing the usual one: half precision on a GPU, float32 elsewhere."""
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    return named_dtype(name)


def named_dtype(name: str) -> torch.dtype:
    """Of a name of --mixed_precision or --save_precision."""
    return getattr(torch, TORCH_DTYPES[name])
