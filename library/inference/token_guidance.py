"""Steers a picture towards a photo: AlignHeads read the teacher's tokens off noisy latents, and these are moved to read more alike.

The heads know noise, for they were trained at every level: their similarity to the photo's tokens is a classifier of noisy latents,
and what is added is the step of classifier guidance (arXiv 2105.05233, algorithm 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.diffusion.parametrisation import Parametrisation
from networks.align_head import AlignHeads
from networks.features import capture_alone


@dataclass(frozen=True)
class TokenGuidance:
    """target: the photo's tokens [N, D], unit vectors, on `grid` rows and columns. window: as `Parametrisation.time` counts."""

    heads: AlignHeads
    target: Tensor
    grid: tuple[int, int]
    strength: float
    window: tuple[float, float]

    def acts_at(self, level: float, process: Parametrisation) -> bool:
        low, high = self.window
        # Of noise alone no picture can be read.
        return self.strength > 0 and low <= process.time(level) <= high and process.signal(level) > 0

    def step(
        self, unet: Any, run: Callable[[Tensor], object], x: Tensor, level: float, process: Parametrisation
    ) -> Tensor:
        """What to add to the clean latents that are predicted at a level, [B, C, h, w] float32.

        x: the sampler's latents. run: passes them through `unet`, under the prompt alone and without guidance, for there the heads
        were trained; the pass ends at their last tap. The gradient gives the direction. The length is `strength` times that of the
        noise, whose numbers have variance 1: the noise that a network predicts is turned by the same share of itself at every
        level, whatever it predicts it by, with guidance by the prompt and without. A share of what is still undecided of the
        latents (of v) comes too late for the layout, which is decided at the highest levels.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            with capture_alone(unet, self.heads.captured) as features:
                run(x)
            found = [self.heads.tokens(tap, features, self.grid) * self.target for tap in self.heads]
            # Sums, not means: in float16 the gradient of a mean would be too small.
            (gradient,) = torch.autograd.grad(torch.stack([each.sum() for each in found]).sum(), x)
        length = self.strength * math.sqrt(x[0].numel()) * level / process.signal(level)
        return length * F.normalize(gradient.flatten(1), dim=1).view_as(x)
