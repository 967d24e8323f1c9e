"""Differences that are stored whole: `diff` and `diff_b` (LyCORIS' full, ComfyUI), `w_norm` and `b_norm` (LyCORIS' norms).

For weights and biases of any layer, normalisations too. Read, merged and drawn with; not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from networks.adapter_module import AdapterModule
from networks.kinds import READ_ONLY

OF_BIASES = ("diff_b", "b_norm")


@dataclass(frozen=True)
class FullModule(AdapterModule):
    """T' = T + ratio * diff, T a weight or a bias."""

    kind = READ_ONLY["full"]
    parts = dict.fromkeys(("diff", "w_norm", *OF_BIASES), "diff")
    needed = ("diff",)

    diff: Tensor
    alpha: float = 0.0
    """Not used."""

    @classmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> FullModule:
        return cls(parts.pop("diff"))

    @property
    def rank(self) -> int:
        """There is none."""
        return 0

    @property
    def scale(self) -> None:
        return None

    @property
    def kernel(self) -> int:
        return self.diff.shape[-1] if self.diff.ndim == 4 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """A matrix serves a 1x1 convolution and the other way round."""
        return _without_ones(self.shape) == _without_ones(shape)

    def product(self) -> Tensor:
        """As of LoRA: what is added, float32, of `shape`."""
        return self.diff.float()

    def delta(self, weight: Tensor) -> Tensor:
        return self.diff.to(weight.device).float().reshape(weight.shape)

    def of_rows(self, rows: slice) -> FullModule:
        return replace(self, diff=self.diff[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.diff}


def _without_ones(shape: Sequence[int]) -> list[int]:
    return list(shape[:2]) if len(shape) == 4 and list(shape[2:]) == [1, 1] else list(shape)
