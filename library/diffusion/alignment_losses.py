"""Alignment losses between predicted tokens and the teacher's: cosine per token, and similarities between them.

All take and give float32 and normalise both sides themselves. Sources: REPA (arXiv 2410.06940) and U-REPA
(arXiv 2503.18414, equations 1, 3, 4; the minus sign printed before equation 3 is a misprint); the Gram matrices by
image and by random token follow Manifold Distillation (Hao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

EPSILON = 1e-6

Cost = Literal["l2", "l1"]
"""Of a difference of similarities: its square, or its amount."""

Gather = Callable[[torch.Tensor, int | None], torch.Tensor]
"""(rows of this process, how many processes share the loss; None: all) -> the rows of all, with gradients into these."""


@dataclass(frozen=True)
class Weights:
    """How much the pictures of a batch and the tokens of each count, where not all count alike. All float32.

    Means are over the real pictures and all their tokens: a weight below 1 makes a loss smaller, not others larger.
    """

    pictures: torch.Tensor
    """[B]"""
    real: torch.Tensor
    """[B]: 1 for pictures, 0 for what only fills the shape, whose weights are 0 too."""
    tokens: torch.Tensor | None = None
    """[B, N]; None where all count 1."""
    sharing: int = 1
    """Processes that have pictures in this turn."""
    turn_share: float = 1.0
    """By what a loss of all processes' pictures together is multiplied, for this process to weigh it as its own losses."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of a loss of each picture [B]."""
        return (values * self.pictures).sum() / self.real.sum().clamp(min=1.0)

    def of_tokens(self, count: int) -> torch.Tensor:
        """[B, N] within each picture."""
        return self.pictures.new_ones(len(self.pictures), count) if self.tokens is None else self.tokens


def normalize(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors along the last axis at unit length, x / max(|x|, 1e-6), float32."""
    return F.normalize(vectors.float(), dim=-1, eps=EPSILON)


def token_loss(predicted: torch.Tensor, target: torch.Tensor, weights: Weights | None = None) -> torch.Tensor:
    """Mean over samples and tokens of 1 - cos(predicted, target). Both [B, N, D]; result in [0, 2]."""
    cosines = (normalize(predicted) * normalize(target)).sum(dim=-1)  # [B, N]
    if weights is None:
        return 1.0 - cosines.mean()
    return weights.mean(((1.0 - cosines) * weights.of_tokens(cosines.shape[1])).mean(dim=1))


def similarity_difference(
    predicted: torch.Tensor, target: torch.Tensor, margin: float, cost: Cost = "l2"
) -> torch.Tensor:
    """Cost of the difference of two Gram matrices of unit vectors, elementwise: relu(|G_p - G_t| - margin), or its square.

    predicted: [..., K, D], target: [..., K, D'], unit length. Result [..., K, K].
    """
    difference = predicted @ predicted.transpose(-1, -2) - target @ target.transpose(-1, -2)
    if margin > 0:
        difference = F.relu(difference.abs() - margin)
    return difference.square() if cost == "l2" else difference.abs()


def spatially_normalised(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """(y - share * mean y) / (std y + 1e-6), mean and spread of a channel over the tokens of a picture (iREPA, arXiv 2512.10794).

    tokens: [B, N, D] float32; share 0 leaves them as they are. The spread is torch's, over N - 1, as in iREPA's code.
    """
    if share == 0:
        return tokens
    # Of one token there is no spread.
    spread = tokens.std(dim=1, keepdim=True) if tokens.shape[1] > 1 else torch.ones_like(tokens)
    return (tokens - share * tokens.mean(dim=1, keepdim=True)) / (spread + EPSILON)


def sample_manifold_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    margin: float = 0.0,
    gather: Gather | None = None,
    weights: Weights | None = None,
    cost: Cost = "l2",
) -> torch.Tensor:
    """Between samples: tokens mean-pooled per image, then the mean over the upper triangle of the B x B Gram difference.

    predicted, target: [B, N, D]; predicted is of unit length per token, as an AlignHead gives it, target is normalised
    here before pooling, so that both are pooled alike. gather: joins [B, D] of all processes to [W*B, D] with
    gradients; the Gram matrix is then over the global batch. A single sample has no pair: the loss is 0. weights: tokens are
    pooled by theirs, and a pair counts the product of its pictures'.
    """
    if weights is not None:
        return _weighted_sample_loss(predicted, target, margin, gather, weights, cost)
    pooled_predicted = normalize(normalize(predicted).mean(dim=1))
    pooled_target = normalize(normalize(target).mean(dim=1))
    if gather is not None:
        pooled_predicted, pooled_target = gather(pooled_predicted, None), gather(pooled_target, None)
    count = pooled_predicted.shape[0]
    if count < 2:
        return pooled_predicted.sum() * 0.0
    costs = similarity_difference(pooled_predicted, pooled_target, margin, cost)
    return costs.triu(diagonal=1).sum() / (count * (count - 1) / 2)


def _weighted_sample_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    margin: float,
    gather: Gather | None,
    weights: Weights,
    cost: Cost,
) -> torch.Tensor:
    of_tokens = weights.of_tokens(predicted.shape[1]).unsqueeze(-1)
    pooled_predicted = normalize((normalize(predicted) * of_tokens).mean(dim=1))
    pooled_target = normalize((normalize(target) * of_tokens).mean(dim=1))
    pictures, real = weights.pictures, weights.real
    if gather is not None:
        pooled_predicted = gather(pooled_predicted, weights.sharing)
        pooled_target, pictures, real = (gather(rows, None) for rows in (pooled_target, pictures, real))
    costs = similarity_difference(pooled_predicted, pooled_target, margin, cost) * torch.outer(pictures, pictures)
    count = real.sum()
    return costs.triu(diagonal=1).sum() / (count * (count - 1) / 2).clamp(min=1.0)


def token_manifold_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    margin: float = 0.0,
    weights: Weights | None = None,
    cost: Cost = "l2",
) -> torch.Tensor:
    """Within each image: mean cost of the N x N Gram difference, over images. Independent of the batch.

    weights: a pair of tokens counts the product of theirs, an image its own.
    """
    costs = similarity_difference(normalize(predicted), normalize(target), margin, cost)
    if weights is None:
        return costs.mean()
    of_tokens = weights.of_tokens(predicted.shape[1])
    return weights.mean((costs * of_tokens.unsqueeze(2) * of_tokens.unsqueeze(1)).mean(dim=(1, 2)))


def random_manifold_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    chosen: torch.Tensor,
    margin: float = 0.0,
    weights: Weights | None = None,
    cost: Cost = "l2",
) -> torch.Tensor:
    """Between tokens of the whole batch: mean cost of the K x K Gram difference of `chosen` of its B*N tokens.

    weights: a token counts the product of its own and its picture's, a pair of tokens the product of both.
    """
    count = predicted.shape[1]
    predicted = normalize(predicted.flatten(0, 1)[chosen])
    target = normalize(target.flatten(0, 1)[chosen])
    costs = similarity_difference(predicted, target, margin, cost)
    if weights is None:
        return costs.mean()
    of_tokens = (weights.of_tokens(count) * weights.pictures.unsqueeze(1)).flatten()[chosen]
    real = weights.real.repeat_interleave(count)[chosen].sum()
    return (costs * torch.outer(of_tokens, of_tokens)).sum() / real.square().clamp(min=1.0)


def clip_loss(loss: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`loss` scaled down to at most `cap`, its gradient with it (a plain clamp would cut the gradient off)."""
    if cap is None:
        return loss
    return loss * (cap / loss.detach().clamp(min=EPSILON * cap)).clamp(max=1.0)


def grid_ceiling(target: torch.Tensor, grid: tuple[int, int], tap: tuple[int, int]) -> torch.Tensor:
    """The highest mean token cosine that a map of `tap` (rows, columns) can reach by bilinear upsampling, roughly.

    target [B, N, D]: teacher tokens, row by row on `grid` (rows, columns). They are area-pooled to the tap's grid, upsampled
    bilinearly, as what an AlignHead predicts is (U-REPA, arXiv 2503.18414), and compared with themselves.
    """
    batch, _, width = target.shape
    places = normalize(target).transpose(1, 2).reshape(batch, width, *grid)
    pooled = F.adaptive_avg_pool2d(places, tap)
    back = F.interpolate(pooled, size=grid, mode="bilinear", align_corners=False)
    return (normalize(back.flatten(2).transpose(1, 2)) * normalize(target)).sum(dim=-1).mean()


@dataclass
class TokenConstants:
    """Token losses of the two best predictors that never look at a picture: one vector, and one per position of a grid."""

    positions: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """Grid -> sum of unit tokens [N, D]."""
    count: int = 0

    def add(self, target: torch.Tensor, grid: tuple[int, int]) -> None:
        """target: [B, N, D]."""
        unit = normalize(target).double().sum(dim=0)
        self.positions[grid] = self.positions[grid] + unit if grid in self.positions else unit
        self.count += target.shape[0] * target.shape[1]

    def losses(self) -> tuple[float, float]:
        """The mean of 1 - cos(u, normalised mean of u) is 1 - |mean of u|."""
        whole = torch.stack([unit.sum(dim=0) for unit in self.positions.values()]).sum(dim=0)
        each = sum(unit.norm(dim=-1).sum() for unit in self.positions.values())
        return 1.0 - float(whole.norm()) / self.count, 1.0 - float(each) / self.count
