"""Noise levels drawn in proportion to how hard they are: the weighted buckets of Lune's card, as far as it defines them.

What a process draws (uniform, shifted, between two timesteps, ...) is cut into N bins of equal probability, and these are drawn
with p = (1 - floor) w / sum(w) + floor / N, w = difficulty^power: a bin that is never drawn would never be measured again. Losses
are multiplied by 1 / (N p), so that their mean stays what it is without bins, and only its variance changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9
"""Of the average of a bin's losses: the last ten count, as in OpenAI's loss-aware sampler (Nichol and Dhariwal 2021)."""
JITTER_UNIT = 1 / 1000
"""Jitter is said in timesteps."""


@dataclass(eq=False)
class TimestepBins:
    """Everything lies on the device, and nothing of it is read there.

    total, weight, usable: [N] float32. The difficulty of a bin is total / weight; one without a weight is taken for as hard as the
    others on average. Bins that are not usable are drawn with the floor's probability alone. jitter: half of the width that a
    bin is drawn over, in thousandths of the whole; up to twice that for the hardest bin. learns: difficulties are losses.
    """

    total: Tensor
    weight: Tensor
    usable: Tensor
    power: float = 1.0
    floor: float = 0.2
    jitter: float = 5.0
    corrects: bool = True
    learns: bool = True
    seen: Tensor = field(init=False)
    """[2, N]: of this step and process, the sum of each bin's losses and their number."""

    def __post_init__(self) -> None:
        self.seen = torch.zeros_like(self.total).repeat(2, 1)

    @classmethod
    def learning(cls, count: int, device: torch.device | str, **settings: Any) -> TimestepBins:
        """Bins of which nothing is known."""
        zeros = torch.zeros(count, device=device)
        return cls(zeros, zeros.clone(), torch.ones_like(zeros), **settings)

    @classmethod
    def known(cls, difficulty: Tensor, usable: Tensor, **settings: Any) -> TimestepBins:
        """Bins whose difficulty stays what it is."""
        return cls(difficulty.float(), torch.ones_like(usable), usable.float(), learns=False, **settings)

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, between steps."""
        return {"total": self.total, "weight": self.weight, "usable": self.usable}

    @property
    def difficulty(self) -> Tensor:
        """[N]"""
        known = self.weight > 0
        each = torch.where(known, self.total / self.weight, 0.0)
        mean = each.sum() / known.sum()
        return torch.where(known, each, torch.where(known.any(), mean, 1.0))

    @property
    def probabilities(self) -> Tensor:
        """[N], their sum 1."""
        hard = self.difficulty**self.power * self.usable
        whole, count = hard.sum(), len(hard)
        return (1 - self.floor) * torch.where(whole > 0, hard / whole, 1 / count) + self.floor / count

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Quantiles of what the process draws, in 0..1, and the bin of each; both [count]. By one torch.rand each."""
        uniform = torch.rand(count, generator=generator, device=generator.device)
        chances, bins = self.probabilities, len(self.total)
        # A sum of rows: torch.cumsum of a GPU is another one each time.
        ends = chances.expand(bins, bins).tril().sum(dim=1)
        chosen = torch.searchsorted(ends, uniform, right=True).clamp(max=bins - 1)
        inside = 1 - (ends[chosen] - uniform) / chances[chosen]  # uniform in 0..1
        hardest = self.difficulty.max().clamp(min=torch.finfo(torch.float32).tiny)
        half = self.jitter * JITTER_UNIT * (1 + self.difficulty / hardest)
        places = (chosen + 0.5) / bins + (2 * inside - 1) * half[chosen]
        # What reaches beyond either end comes back.
        return (1 - (1 - places.abs()).abs()).clamp(0, 1), chosen

    def corrections(self, chosen: Tensor) -> Tensor:
        """By what losses of these bins are multiplied, [B]: at most 1 / floor."""
        return 1 / (len(self.total) * self.probabilities[chosen])

    @torch.no_grad()
    def note(self, chosen: Tensor, losses: Tensor, real: Tensor | None = None) -> None:
        """Remember the unweighted losses of a batch, [B]. real: 1 for each that counts, default all."""
        if self.learns:
            # Products with ones and zeros: scattered additions of a GPU come in another order each time.
            hits = (chosen[:, None] == torch.arange(len(self.total), device=chosen.device)).float()
            hits = hits if real is None else hits * real[:, None]
            self.seen += torch.stack([(hits * losses.detach().float()[:, None]).sum(dim=0), hits.sum(dim=0)])

    @torch.no_grad()
    def update(self, across: Callable[[Tensor], Tensor]) -> None:
        """Learn from the losses of a step. across: sums a tensor over processes, so that all go on with the same bins."""
        if self.learns:
            sums, counts = across(self.seen)
            kept = DECAY**counts
            self.total.mul_(kept).add_(sums / counts.clamp(min=1) * (1 - kept))
            self.weight.mul_(kept).add_(1 - kept)
            self.forget()

    def forget(self) -> None:
        """Drop what was noted since the last update."""
        self.seen.zero_()
