"""Classifiers on frozen features: the linear probe and nearest neighbours.

Both are fitted on training pictures and judged on held-out ones. The standard error of an accuracy p over n pictures is
sqrt(p (1 - p) / n): 0.05 at 0.8 and n = 64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from library.diffusion.alignment_losses import normalize
from library.errors import UserError

L2_GRID = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
"""Penalties to choose from, the strongest first: each fit starts from the one before."""
TEMPERATURE = 0.07
"""Temperature of the neighbours' votes (DINOv2, arXiv 2304.07193, appendix; from instance discrimination)."""


def split_by_hash(ids: Sequence[str], share: float, purpose: str = "split") -> Tensor:
    """Which of `ids` are in the split, [n] bool: the share of them with the lowest hashes of id and `purpose`.

    Independent of the order; adding ids moves only those at the border. At least one id is on either side.
    Raises UserError for fewer than two.
    """
    if len(ids) < 2:
        raise UserError(f"{len(ids)} pictures cannot be split in two.")
    keys = [hashlib.blake2b(f"{purpose}/{id_}".encode(), digest_size=8).digest() for id_ in ids]
    size = min(max(round(share * len(ids)), 1), len(ids) - 1)
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    chosen[sorted(range(len(ids)), key=keys.__getitem__)[:size]] = True
    return chosen


@dataclass(frozen=True)
class ProbeAccuracy:
    accuracy: float
    """On the held-out pictures."""
    fit_accuracy: float
    """On the training pictures; far above the other accuracy where there are too few of them."""
    l2: float


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on features [n, D], standardised by the fitted pictures' mean and deviation."""

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    classes: Tensor
    l2: float

    @classmethod
    def fit(
        cls, features: Tensor, labels: Tensor, ids: Sequence[str] = (), grid: Sequence[float] = L2_GRID
    ) -> LinearProbe:
        """Of the penalties in `grid`, that with the lowest log loss on a fifth of the pictures, chosen by a hash of their ids; the
        final fit includes that fifth. With one penalty there is nothing to choose, and no ids are needed.

        REPA's probe (batch norm without parameters, then a linear layer) except for the optimizer: here L-BFGS, to convergence. A
        class without pictures is never predicted. Raises UserError for pictures of one class.
        """
        classes, targets = labels.unique(return_inverse=True)
        if len(classes) < 2:
            raise UserError("A probe needs training pictures of at least two classes, and all are of one.")
        mean, scale = _standard(features)
        x = (features.float() - mean) * scale
        chosen = grid[0]
        if len(grid) > 1:
            inner = split_by_hash(ids, 0.2, "probe").to(x.device)
            losses = _path(x[~inner], targets[~inner], len(classes), grid, x[inner], targets[inner])
            chosen = grid[losses.index(min(losses))]
        weights, bias = _fit_logistic(x, targets, len(classes), chosen)
        return cls(mean, scale, weights, bias, classes, chosen)

    def __call__(self, features: Tensor) -> Tensor:
        """The predicted labels, [n]."""
        x = (features.float() - self.mean) * self.scale
        return self.classes[(x @ self.weights + self.bias).argmax(dim=1)]

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        return (self(features) == labels).float().mean().item()


def linear_probe(
    fit: Tensor, fit_labels: Tensor, test: Tensor, test_labels: Tensor, fit_ids: Sequence[str]
) -> ProbeAccuracy:
    """How well a `LinearProbe` fitted on one set classifies another.

    Chance is the share of the commonest class. More training pictures give a higher accuracy: compare at equal n.
    """
    probe = LinearProbe.fit(fit, fit_labels, fit_ids)
    return ProbeAccuracy(probe.accuracy(test, test_labels), probe.accuracy(fit, fit_labels), probe.l2)


def knn_accuracy(fit: Tensor, fit_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 10) -> float:
    """Share of held-out pictures whose k nearest training pictures, by cosine, vote for their class, with weights exp(cos / 0.07).

    DINOv2's protocol. Raises UserError where there are fewer than k training pictures. Nothing is fitted, so that, unlike the
    linear probe, it suffers from anisotropic features; it also rises with the number of training pictures.
    """
    if not 1 <= k <= len(fit):
        raise UserError(
            f"{k} neighbours of {len(fit)} pictures are impossible: k must be at least 1 and at most {len(fit)}."
        )
    classes, targets = fit_labels.unique(return_inverse=True)
    near = (normalize(test) @ normalize(fit).T).topk(k, dim=1)
    votes = torch.zeros(len(test), len(classes), device=fit.device)
    votes.scatter_add_(1, targets[near.indices], (near.values / TEMPERATURE).exp())
    return _accuracy(votes, classes, test_labels)


def chance_accuracy(fit_labels: Tensor, test_labels: Tensor) -> float:
    """Accuracy of always predicting the commonest training class (of equally common ones, that of the lowest id)."""
    return (test_labels == fit_labels.mode().values).float().mean().item()


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each channel, and by what to multiply it for a deviation of 1."""
    features = features.float()
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    # Constant channels become 0: dividing by their deviation would amplify rounding errors.
    return mean, torch.where(deviation > 1e-6 * features.abs().amax(dim=0), 1.0 / deviation, 0.0)


def _path(
    x: Tensor, targets: Tensor, classes: int, grid: Sequence[float], judged: Tensor, judged_targets: Tensor
) -> list[float]:
    """Log loss on the judged features after fitting with each penalty, every fit started from the one before."""
    losses, start = [], None
    for l2 in grid:
        start = _fit_logistic(x, targets, classes, l2, start)
        losses.append(F.cross_entropy(judged @ start[0] + start[1], judged_targets).item())
    return losses


def _fit_logistic(
    x: Tensor, targets: Tensor, classes: int, l2: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [D, classes] and bias [classes] of the lowest mean log loss + l2 / 2 * squared weights."""
    if start is None:
        start = x.new_zeros(x.shape[1], classes), x.new_zeros(classes)
    weights, bias = (value.clone().requires_grad_() for value in start)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = F.cross_entropy(x @ weights + bias, targets) + l2 / 2 * weights.square().sum()
            value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]  # annotated for a closure that returns a float
    return weights.detach(), bias.detach()


def _accuracy(scores: Tensor, classes: Tensor, labels: Tensor) -> float:
    return (classes[scores.argmax(dim=1)] == labels).float().mean().item()
