"""Adapters in one form, whichever file they came from, and what each does to a weight.

Sources: LoRA (arXiv 2106.09685, section 4.1), the same product for Linear layers, 1x1 and 3x3 convolutions as in kohya's
networks.lora; CP-decomposed convolutions as in LyCORIS; DoRA (arXiv 2402.09353, equation 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from networks import AdapterError
from networks.names import SD15, SDXL, Family, Target, is_sdxl, kohya_name


@runtime_checkable
class AdapterModule(Protocol):
    """One module's adapter, of whichever kind."""

    @property
    def kind(self) -> str:
        """As a user calls it: LoRA, DoRA, LoHa, LoKr, OFT."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...

    @property
    def kernel(self) -> int:
        """Size of the convolution's kernel as far as the tensors tell; 1 for a Linear."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it is for, as far as the tensors tell."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is for a weight of this shape."""

    def delta(self, weight: Tensor) -> Tensor:
        """What the adapter at ratio 1 adds to `weight`, float32, of its shape and on its device."""


@dataclass(frozen=True)
class LoraModule:
    """One module's adapter: W' = W + ratio * alpha / rank * up @ down."""

    down: Tensor
    """[rank, in] or [rank, in, kh, kw]; with `mid` [rank, in, 1, 1]"""
    up: Tensor
    """[out, rank] or [out, rank, 1, 1]"""
    alpha: float
    mid: Tensor | None = None
    """[rank, rank, kh, kw] of a CP-decomposed convolution, else None"""
    magnitude: Tensor | None = None
    """DoRA's, [out, 1, ...] or [1, in, ...]: the axis that is not 1 keeps its norm apart. None: no DoRA."""

    @property
    def kind(self) -> str:
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def kernel(self) -> int:
        kernel = self.down if self.mid is None else self.mid
        return kernel.shape[-1] if kernel.ndim == 4 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it is for: [out, in], or [out, in, kh, kw]."""
        kernel = self.down if self.mid is None else self.mid
        return (self.up.shape[0], self.down.shape[1], *kernel.shape[2:])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is for a weight of this shape; a matrix serves a 1x1 convolution and the other way round."""
        return len(shape) >= 2 and _without_ones(self.shape) == _without_ones(shape)

    def without_mid(self) -> LoraModule:
        """The same product as plain down and up, float32: the kernel of a CP-decomposed convolution goes into down."""
        if self.mid is None:
            return self
        down = torch.einsum("mnhw,ni->mihw", self.mid.float(), self.down.flatten(1).float())
        return replace(self, down=down, up=self.up.float(), mid=None)

    def product(self, device: torch.device | str = "cpu") -> Tensor:
        """alpha / rank * up @ down, float32, of `shape`."""
        plain = self.without_mid()
        up, down = (part.to(device, torch.float32) for part in (plain.up, plain.down))
        whole = up.flatten(1) @ down.flatten(1)
        return (self.alpha / self.rank * whole).reshape(self.shape)

    def delta(self, weight: Tensor) -> Tensor:
        """What the adapter at ratio 1 adds to `weight`, float32, of its shape and on its device.

        DoRA: m * V / ||V|| - W with V = W + alpha / rank * up @ down; the norm is that of PEFT and LyCORIS, over everything
        but the axis that m keeps.
        """
        added = self.product(weight.device).reshape(weight.shape)
        if self.magnitude is None:
            return added
        before = weight.float()
        direction = before + added
        magnitude = self.magnitude.to(weight.device, torch.float32)
        magnitude = magnitude.reshape(*magnitude.shape[:2], *(1 for _ in direction.shape[2:]))
        other_axes = [axis for axis in range(direction.ndim) if magnitude.shape[axis] == 1]
        norm = torch.linalg.vector_norm(direction, dim=other_axes, keepdim=True)
        return magnitude * direction / norm.clamp(min=torch.finfo(torch.float32).tiny) - before


@dataclass(frozen=True)
class Adapter:
    """An adapter in one form, whichever it came in."""

    modules: Mapping[Target, AdapterModule]
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Keys that are no part of the adapter (AlignHeads in a training state)."""
    frozen: tuple[str, ...] = ()
    """Keys of the weights it was trained on, in a checkpoint of a whole model wrapped by PEFT. They are not read."""

    @property
    def family(self) -> Family:
        """SDXL where the metadata or the modules say so, else SD1.5."""
        said = (self.metadata.get("ss_base_model_version", ""), self.metadata.get("modelspec.architecture", ""))
        named = said[0].startswith("sdxl") or said[1].startswith("stable-diffusion-xl")
        return SDXL if named or is_sdxl(self.modules) else SD15

    def lora_modules(self, what: str) -> dict[Target, LoraModule]:
        """Its modules, all of them LoRA or DoRA. what: that needs such, "resizing". Raises AdapterError for others."""
        found = {target: module for target, module in self.modules.items() if isinstance(module, LoraModule)}
        if others := sorted({m.kind for m in self.modules.values() if not isinstance(m, LoraModule)}):
            raise AdapterError(
                f"{len(self.modules) - len(found)} of {len(self.modules)} modules are {' and '.join(others)}, and {what} is "
                "for LoRA. Merge the adapter into a base model instead."
            )
        return found

    def names(self) -> dict[Target, str]:
        """Kohya's name of each module, as users know it."""
        return {target: kohya_name(target, self.family) for target in self.modules}


def _without_ones(shape: Sequence[int]) -> list[int]:
    """A weight's shape without a kernel of 1x1."""
    return list(shape[:2]) if all(side == 1 for side in shape[2:]) else list(shape)
