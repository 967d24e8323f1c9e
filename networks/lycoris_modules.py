"""LoHa, LoKr and OFT as LyCORIS' files hold them, and what each does to a weight.

Sources: FedPara (arXiv 2108.06098) and LyCORIS (arXiv 2309.14859) for LoHa and LoKr; OFT (arXiv 2306.07280) in the form of
kohya's networks.oft and LyCORIS' diag-oft. Read that way by ComfyUI (comfy/weight_adapter) and A1111 (extensions-builtin/Lora).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factor = tuple[Tensor, ...]
"""A matrix whole, as (a, b) of which it is the product, or as (a, b, t) of a CP-decomposed convolution."""

NO_BOUND = 1000.0
"""OFT's alpha where nothing is bound: no rotation comes near it, and programs differ in how they read 0 or none."""


@dataclass(frozen=True)
class LohaModule:
    """W' = W + ratio * alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry."""

    w1: Factor
    """(w1_a [out, rank], w1_b [rank, in * kh * kw]), or with t1 [rank, rank, kh, kw] ([rank, out], [rank, in])"""
    w2: Factor
    alpha: float

    @property
    def kind(self) -> str:
        return "LoHa"

    @property
    def rank(self) -> int:
        return self.w1[1].shape[0]

    @property
    def kernel(self) -> int:
        return _kernel(self.w1)

    @property
    def shape(self) -> tuple[int, ...]:
        """As far as the tensors tell: a kernel without t is one with the inputs."""
        return _shape(self.w1)

    def fits(self, shape: Sequence[int]) -> bool:
        return _same_size(self.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        """What the adapter at ratio 1 adds to `weight`, float32, of its shape and on its device."""
        w1, w2 = (whole(factor, weight.device).reshape(weight.shape) for factor in (self.w1, self.w2))
        return self.alpha / self.rank * w1 * w2

    def tensors(self) -> dict[str, Tensor]:
        """Suffix of the key in a file -> tensor, but for alpha."""
        return {**_named("hada_w1", "hada_t1", self.w1), **_named("hada_w2", "hada_t2", self.w2)}


@dataclass(frozen=True)
class LokrModule:
    """W' = W + ratio * alpha / rank * kron(w1, w2); where neither is decomposed, alpha counts for nothing."""

    w1: Factor
    """Whole [a, c], or ([a, rank], [rank, c]); the weight is [a * b, c * d, kh, kw]"""
    w2: Factor
    """Whole [b, d] or [b, d, kh, kw], ([b, rank], [rank, d * kh * kw]), or ([rank, b], [rank, d], [rank, rank, kh, kw])"""
    alpha: float

    @property
    def kind(self) -> str:
        return "LoKr"

    @property
    def is_whole(self) -> bool:
        return len(self.w1) == len(self.w2) == 1

    @property
    def rank(self) -> int:
        """Of w2 where it is decomposed, else of w1, as ComfyUI and A1111 take it; else one that decomposes nothing."""
        if len(self.w2) > 1:
            return self.w2[1].shape[0]
        return self.w1[1].shape[0] if len(self.w1) > 1 else max(self.w2[0].shape[:2])

    @property
    def kernel(self) -> int:
        return _kernel(self.w2)

    @property
    def shape(self) -> tuple[int, ...]:
        (a, c), (b, d, *kernel) = _shape(self.w1), _shape(self.w2)
        return (a * b, c * d, *kernel)

    def fits(self, shape: Sequence[int]) -> bool:
        return _same_size(self.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        """What the adapter at ratio 1 adds to `weight`, float32, of its shape and on its device."""
        w1, w2 = whole(self.w1, weight.device), whole(self.w2, weight.device).flatten(1)
        scale = 1.0 if self.is_whole else self.alpha / self.rank
        return scale * torch.kron(w1, w2).reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {**_named("lokr_w1", "lokr_t1", self.w1), **_named("lokr_w2", "lokr_t2", self.w2)}


@dataclass(frozen=True)
class OftModule:
    """W' = W + ratio * (R^T - 1) W by blocks of output rows, R = (1 + Q)(1 - Q)^-1 with Q = blocks - blocks^T."""

    blocks: Tensor
    """[blocks, size, size]; blocks * size rows"""
    alpha: float = 0.0
    """Bound on |Q| over all blocks, times the number of outputs (kohya, LyCORIS, A1111; ComfyUI: times one); 0: none."""
    rescale: Tensor | None = None
    """LyCORIS': a factor for each row of R^T W, [out, 1, ...]"""

    @property
    def kind(self) -> str:
        return "OFT"

    @property
    def rank(self) -> int:
        return self.blocks.shape[0]

    @property
    def kernel(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outputs alone."""
        return (self.blocks.shape[0] * self.blocks.shape[1],)

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[0] == self.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        """What the adapter at ratio 1 adds to `weight`, float32, of its shape and on its device."""
        before = weight.float()
        turned = turn(before.flatten(1).T, rotation(self.bounded(weight.device))).T.reshape(weight.shape)
        if self.rescale is None:
            return turned
        rescale = self.rescale.to(weight.device, torch.float32).reshape(-1, *(1 for _ in weight.shape[1:]))
        return rescale * (before + turned) - before

    def bounded(self, device: torch.device | str) -> Tensor:
        """Q, float32."""
        return skew(self.blocks.to(device, torch.float32), self.alpha * self.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """With the bound applied, for programs differ in what alpha bounds; alpha is to be NO_BOUND then."""
        tensors = {"oft_blocks": self.bounded(self.blocks.device) / 2}  # Q - Q^T is twice Q
        return tensors if self.rescale is None else {**tensors, "rescale": self.rescale}


def skew(blocks: Tensor, bound: float) -> Tensor:
    """Q = blocks - blocks^T, scaled down to a norm of `bound` over all blocks where that is not 0. [blocks, size, size]"""
    q = blocks - blocks.transpose(1, 2)
    if bound <= 0:
        return q
    return q * (bound / (torch.linalg.vector_norm(q) + 1e-8)).clamp(max=1.0)


def rotation(q: Tensor) -> Tensor:
    """R - 1 = 2 Q (1 - Q)^-1, so that it is 0 where Q is; no wait for the host. [blocks, size, size]"""
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    result: Tensor = torch.linalg.solve_ex(eye - q, 2 * q, left=False)[0]
    return result


def turn(values: Tensor, r: Tensor) -> Tensor:
    """(R^T - 1) applied to the last axis, by blocks. r: R - 1."""
    blocks = values.unflatten(-1, r.shape[:2])
    return torch.einsum("...kn,knm->...km", blocks, r.to(values.dtype)).flatten(-2)


def whole(factor: Factor, device: torch.device | str = "cpu") -> Tensor:
    """The matrix of a factor, float32."""
    parts = [part.to(device, torch.float32) for part in factor]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0] @ parts[1].flatten(1)
    return torch.einsum("ijhw,ip,jr->prhw", parts[2], parts[0], parts[1])


def _named(name: str, core: str, factor: Factor) -> dict[str, Tensor]:
    names = (name,) if len(factor) == 1 else (f"{name}_a", f"{name}_b", core)
    return dict(zip(names, factor, strict=False))


def _shape(factor: Factor) -> tuple[int, ...]:
    if len(factor) == 1:
        return tuple(factor[0].shape)
    if len(factor) == 2:
        return (factor[0].shape[0], math.prod(factor[1].shape[1:]))
    return (factor[0].shape[1], factor[1].shape[1], *factor[2].shape[2:])


def _kernel(factor: Factor) -> int:
    return factor[-1].shape[-1] if factor[-1].ndim == 4 else 1


def _same_size(found: Sequence[int], shape: Sequence[int]) -> bool:
    return len(shape) >= 2 and found[0] == shape[0] and math.prod(found[1:]) == math.prod(shape[1:])
