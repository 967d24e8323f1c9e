"""Alignment losses between predicted tokens and the teacher's: cosine per token, and similarities between them.

All take and give float32 and normalise both sides themselves. Sources: REPA (arXiv 2410.06940) and U-REPA
(arXiv 2503.18414, equations 1, 3, 4; the minus sign printed before equation 3 is a misprint); the Gram matrices by
image and by random token follow Manifold Distillation (Hao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EPSILON = 1e-6


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


def similarity_difference(predicted: torch.Tensor, target: torch.Tensor, margin: float) -> torch.Tensor:
    """Squared difference of two Gram matrices of unit vectors, elementwise: relu(|G_p - G_t| - margin)^2.

    predicted, target: [..., K, D], unit length. Result [..., K, K].
    """
    difference = predicted @ predicted.transpose(-1, -2) - target @ target.transpose(-1, -2)
    if margin > 0:
        difference = F.relu(difference.abs() - margin)
    return difference.square()


def sample_manifold_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    margin: float = 0.0,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    weights: Weights | None = None,
) -> torch.Tensor:
    """Between samples: tokens mean-pooled per image, then the mean over the upper triangle of the B x B Gram difference.

    predicted, target: [B, N, D]; predicted is of unit length per token, as an AlignHead gives it, target is normalised
    here before pooling, so that both are pooled alike. gather: joins [B, D] of all processes to [W*B, D] with
    gradients; the Gram matrix is then over the global batch. A single sample has no pair: the loss is 0. weights, without
    gather: tokens are pooled by theirs, and a pair counts the product of its pictures'.
    """
    if weights is not None:
        return _weighted_sample_loss(predicted, target, margin, weights)
    pooled_predicted = normalize(normalize(predicted).mean(dim=1))
    pooled_target = normalize(normalize(target).mean(dim=1))
    if gather is not None:
        pooled_predicted, pooled_target = gather(pooled_predicted), gather(pooled_target)
    count = pooled_predicted.shape[0]
    if count < 2:
        return pooled_predicted.sum() * 0.0
    squares = similarity_difference(pooled_predicted, pooled_target, margin)
    return squares.triu(diagonal=1).sum() / (count * (count - 1) / 2)


def _weighted_sample_loss(
    predicted: torch.Tensor, target: torch.Tensor, margin: float, weights: Weights
) -> torch.Tensor:
    of_tokens = weights.of_tokens(predicted.shape[1]).unsqueeze(-1)
    pooled_predicted = normalize((normalize(predicted) * of_tokens).mean(dim=1))
    pooled_target = normalize((normalize(target) * of_tokens).mean(dim=1))
    squares = similarity_difference(pooled_predicted, pooled_target, margin) * torch.outer(
        weights.pictures, weights.pictures
    )
    count = weights.real.sum()
    return squares.triu(diagonal=1).sum() / (count * (count - 1) / 2).clamp(min=1.0)


def token_manifold_loss(
    predicted: torch.Tensor, target: torch.Tensor, margin: float = 0.0, weights: Weights | None = None
) -> torch.Tensor:
    """Within each image: mean of squares of the N x N Gram difference, over images. Independent of the batch.

    weights: a pair of tokens counts the product of theirs, an image its own.
    """
    squares = similarity_difference(normalize(predicted), normalize(target), margin)
    if weights is None:
        return squares.mean()
    of_tokens = weights.of_tokens(predicted.shape[1])
    return weights.mean((squares * of_tokens.unsqueeze(2) * of_tokens.unsqueeze(1)).mean(dim=(1, 2)))


def random_manifold_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    chosen: torch.Tensor,
    margin: float = 0.0,
    weights: Weights | None = None,
) -> torch.Tensor:
    """Between tokens of the whole batch: mean of squares of the K x K Gram difference of `chosen` of its B*N tokens.

    weights: a token counts the product of its own and its picture's, a pair of tokens the product of both.
    """
    count = predicted.shape[1]
    predicted = normalize(predicted.flatten(0, 1)[chosen])
    target = normalize(target.flatten(0, 1)[chosen])
    squares = similarity_difference(predicted, target, margin)
    if weights is None:
        return squares.mean()
    of_tokens = (weights.of_tokens(count) * weights.pictures.unsqueeze(1)).flatten()[chosen]
    real = weights.real.repeat_interleave(count)[chosen].sum()
    return (squares * torch.outer(of_tokens, of_tokens)).sum() / real.square().clamp(min=1.0)


def clip_loss(loss: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`loss` scaled down to at most `cap`, its gradient with it (a plain clamp would cut the gradient off)."""
    if cap is None:
        return loss
    return loss * (cap / loss.detach().clamp(min=EPSILON * cap)).clamp(max=1.0)


def align_coefficient(step: int, coeff: float, schedule: str, warmup_steps: int, cutoff_step: int | None) -> float:
    """lambda at an optimizer step: coeff * min(1, step / warmup_steps), or constant, or risen and 0 from cutoff on."""
    if schedule == "cutoff" and cutoff_step is not None and step >= cutoff_step:
        return 0.0
    if schedule == "constant" or step >= warmup_steps:
        return coeff
    return coeff * step / warmup_steps


def grid_ceiling(target: torch.Tensor, tap_side: int) -> torch.Tensor:
    """The highest mean token cosine that a map of tap_side x tap_side can reach by bilinear upsampling, roughly.

    target [B, N, D]: teacher tokens, row-major on a square grid. They are area-pooled to the tap's grid, upsampled
    bilinearly, as what an AlignHead predicts is (U-REPA, arXiv 2503.18414), and compared with themselves.
    """
    batch, count, width = target.shape
    side = int(count**0.5)
    grid = normalize(target).transpose(1, 2).reshape(batch, width, side, side)
    pooled = F.adaptive_avg_pool2d(grid, tap_side)
    back = F.interpolate(pooled, size=(side, side), mode="bilinear", align_corners=False)
    return (normalize(back.flatten(2).transpose(1, 2)) * normalize(target)).sum(dim=-1).mean()


def constant_baselines(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses of the two best predictors that never look at the image: one vector, and one vector per position."""
    unit = normalize(target)
    overall = normalize(unit.mean(dim=(0, 1)))
    positional = normalize(unit.mean(dim=0))
    return 1.0 - (unit * overall).sum(dim=-1).mean(), 1.0 - (unit * positional).sum(dim=-1).mean()
