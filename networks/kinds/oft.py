"""OFT (arXiv 2306.07280) in the form of kohya's networks.oft and LyCORIS' diag-oft, which ComfyUI and A1111 read.

Not PEFT's OFT: that one turns the inputs of a layer, and no other program reads such a file. This one turns the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks import AdapterError
from networks.adapted_layer import Draw, copy_weights
from networks.adapter_module import AdapterModule, require_fit
from networks.injection import OwnLayer
from networks.kinds import KINDS
from networks.spec import NetworkSpec
from networks.targets import weight_shape

NO_BOUND = 1000.0
"""alpha in a file where nothing is bound: no rotation comes near it, and programs differ in how they read 0 or none."""


@dataclass(frozen=True)
class OftModule(AdapterModule):
    """W' = W + ratio * (R^T - 1) W by blocks of output rows, R = (1 + Q)(1 - Q)^-1 with Q = blocks - blocks^T."""

    kind = KINDS["oft"]
    parts = {"oft_blocks": "oft_blocks", "rescale": "rescale"}
    prefixes = ("lora_", "oft_")

    blocks: Tensor
    """[blocks, size, size]; blocks * size rows"""
    alpha: float = 0.0
    """Bound on |Q| over all blocks, times the number of outputs (kohya, LyCORIS, A1111; ComfyUI: times one); 0: none."""
    rescale: Tensor | None = None
    """LyCORIS': a factor for each row of R^T W, [out, 1, ...]"""

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> OftModule:
        """Without alpha nothing is bound."""
        if "oft_blocks" not in parts:
            raise AdapterError(f"{name} has {' and '.join(parts)}, and not what belongs to it: it is incomplete.")
        blocks, rescale = parts.pop("oft_blocks"), parts.pop("rescale", None)
        if blocks.ndim == 4:
            raise AdapterError(f"{name} is BOFT, which is not supported.")
        require_fit(name, blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2], oft_blocks=blocks)
        module = cls(blocks, alpha or 0.0, rescale)
        if rescale is not None:
            require_fit(name, rescale.numel() == module.shape[0], rescale=rescale)
        return module

    @property
    def rank(self) -> int:
        return self.blocks.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outputs alone."""
        return (self.blocks.shape[0] * self.blocks.shape[1],)

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[0] == self.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
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
        """With the bound applied, for programs differ in what alpha bounds."""
        tensors = {"oft_blocks": self.bounded(self.blocks.device) / 2}  # Q - Q^T is twice Q
        return tensors if self.rescale is None else {**tensors, "rescale": self.rescale}

    @property
    def alpha_in_file(self) -> float:
        """A bound of 0 would be no rotation at all to kohya's networks.oft and A1111 1.7, and none is an error there."""
        return NO_BOUND


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


class OftLayer(OwnLayer):
    """OFT on the outputs of a Linear or a convolution: base without bias, turned by blocks, and the bias."""

    def set_up(self, rank: int, alpha: float, spec: NetworkSpec) -> None:
        outputs = weight_shape(self.base_layer)[0]
        blocks = next(count for count in range(min(rank, outputs), 0, -1) if outputs % count == 0)
        super().set_up(blocks, 0.0, spec)
        self.bound = (spec.constraint or 0.0) * outputs
        size = outputs // blocks
        self.oft_blocks = nn.Parameter(torch.empty(blocks, size, size, device="meta"))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {"oft_blocks": self.oft_blocks}

    def reset(self, draw: Draw) -> None:
        self.oft_blocks = self._fresh(self.oft_blocks.shape, None)

    def to_module(self) -> AdapterModule:
        return OftModule(self.oft_blocks.detach(), self.bound / weight_shape(self.base_layer)[0])

    def load_module(self, module: AdapterModule) -> None:
        assert isinstance(module, OftModule)
        if module.rescale is not None:
            raise AdapterError("An OFT that rescales its outputs as well (LyCORIS' rescaled) cannot be trained here.")
        copy_weights(self.weights, module.tensors())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x)
        if not self.enabled:
            return result
        r = rotation(skew(self.oft_blocks.float(), self.bound)) * self.multiplier
        if (keeps := self.keeps_module(r)) is not None:
            r = r * keeps
        bias = self.base_layer.bias
        if isinstance(self.base_layer, nn.Conv2d):
            channels = result if bias is None else result - bias[:, None, None]
            return result + turn(channels.movedim(1, -1), r).movedim(-1, 1)
        return result + turn(result if bias is None else result - bias, r)
