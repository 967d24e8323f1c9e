"""Baseline predictors of teacher tokens: constants, a random trunk, a fitted head, and the ceiling of the trunk's grid.

All take and return unit tokens [n, N, D] of a square grid, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.diffusion.alignment_losses import normalize
from library.errors import UserError
from library.evaluation.probes import split_by_hash
from library.evaluation.similarity import token_cosine
from networks.align_head import resize_bilinear

RIDGE_GRID = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
"""Ridge penalties to choose from, for standardised channels."""
CHUNK = 64
"""Pictures whose upsampled maps are held in memory at once."""


def mean_token(fit: Tensor, count: int) -> Tensor:
    """The mean unit token of the fitted pictures, `count` times: the best constant."""
    return normalize(normalize(fit).mean(dim=(0, 1))).expand(count, fit.shape[1], -1)


def position_mean(fit: Tensor, count: int) -> Tensor:
    """The mean unit token at each position, `count` times: the best prediction from the position alone."""
    return normalize(normalize(fit).mean(dim=0)).expand(count, -1, -1)


def pooled_to_grid(target: Tensor, side: int) -> Tensor:
    """Teacher tokens pooled to a map of side x side and upsampled: about the best that a trunk of that grid can predict.

    An AlignHead's map is upsampled to the teacher's grid after the head (U-REPA, arXiv 2503.18414), so that a map with fewer
    positions than the teacher has tokens cannot match all of them.
    """
    grid = _as_map(normalize(target))
    back = resize_bilinear(F.adaptive_avg_pool2d(grid, side), *grid.shape[-2:])
    return normalize(back.flatten(2).transpose(1, 2))


def best_on_grid(target: Tensor, side: int, iterations: int = 50) -> Tensor:
    """The tokens of highest mean cosine with `target` that bilinear upsampling of a side x side map can give.

    Found by L-BFGS, starting at the least-squares map. No AlignHead on that map can exceed it by more than the per mille to which
    the search converges.
    """
    unit = normalize(target)
    grid = int(unit.shape[1] ** 0.5)
    upsample = _upsampling(side, grid).to(unit)  # [N, side * side]
    codes = (torch.linalg.pinv(upsample) @ unit).requires_grad_()  # [n, side * side, D]
    optimizer = torch.optim.LBFGS([codes], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = -(F.normalize(upsample @ codes, dim=-1, eps=1e-6) * unit).sum(dim=-1).sum()
            value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]  # annotated for a closure that returns a float
    return normalize((upsample @ codes).detach())


def random_trunk(unet: Any, seed: int) -> Any:
    """A U-Net of the same configuration with random weights from `seed`; the global random state is not changed."""
    like = next(unet.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(unet).from_config(unet.config)
    return nn.Module.to(fresh, like.device, like.dtype).requires_grad_(False).eval()  # diffusers' own warns of nothing


@dataclass
class RidgeHead:
    """A linear AlignHead fitted in closed form: ridge regression of unit tokens on the upsampled, standardised map.

    A substitute for training a head, to compare trunks with each other. It is linear, minimises the squared error of unit tokens
    instead of 1 - cosine, and is fitted for one timestep, where an AlignHead serves all; a trained MLP head can score higher.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    grid: int
    l2: float

    @staticmethod
    def fit(maps: Tensor, target: Tensor, ids: Sequence[str]) -> RidgeHead:
        """maps [n, C, h, w] and unit tokens [n, N, D], both of the pictures `ids`.

        Of `RIDGE_GRID`, the penalty with the highest token cosine on a fifth of the pictures, chosen by a hash.
        """
        if len(maps) != len(target) or len(maps) != len(ids):
            raise UserError(f"A head needs maps and tokens of the same pictures; got {len(maps)} and {len(target)}.")
        inner = split_by_hash(ids, 0.2, "ridge")
        sums = _Sums.of(maps[~inner], target[~inner])
        heads = [sums.solve(l2) for l2 in RIDGE_GRID]
        cosines = [token_cosine(head(maps[inner]), target[inner]) for head in heads]
        chosen = RIDGE_GRID[cosines.index(max(cosines))]
        return _Sums.of(maps, target).solve(chosen)

    def __call__(self, maps: Tensor) -> Tensor:
        """Maps [n, C, h, w] -> unit tokens [n, N, D] float32."""
        return torch.cat(
            [
                normalize((x - self.mean) * self.scale @ self.weights + self.bias)
                for x, _ in _rows(maps, None, self.grid)
            ]
        ).unflatten(0, (len(maps), -1))


@dataclass
class _Sums:
    """Moments of channels x and tokens y, float64: sums of 1, x, y, x x^T and x^T y."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    grid: int

    @staticmethod
    def of(maps: Tensor, target: Tensor) -> _Sums:
        channels, width = maps.shape[1], target.shape[2]
        zeros = {"dtype": torch.float64, "device": maps.device}
        sums = _Sums(
            0,
            torch.zeros(channels, **zeros),  # type: ignore[call-overload]
            torch.zeros(width, **zeros),  # type: ignore[call-overload]
            torch.zeros(channels, channels, **zeros),  # type: ignore[call-overload]
            torch.zeros(channels, width, **zeros),  # type: ignore[call-overload]
            int(target.shape[1] ** 0.5),
        )
        for x, y in _rows(maps, target, sums.grid):
            x, y = x.double(), y.double()
            sums.count += len(x)
            sums.x += x.sum(dim=0)
            sums.y += y.sum(dim=0)
            sums.xx += x.T @ x
            sums.xy += x.T @ y
        return sums

    def solve(self, l2: float) -> RidgeHead:
        mean, bias = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0)
        # Constant channels are left out.
        scale = torch.where(variance > 1e-12 * (1 + mean.square()), variance.rsqrt(), 0.0)
        correlation = covariance * torch.outer(scale, scale)
        cross = (self.xy / self.count - torch.outer(mean, bias)) * scale[:, None]
        penalty = l2 * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        weights = torch.linalg.solve(correlation + penalty, cross)
        return RidgeHead(mean.float(), scale.float(), weights.float(), bias.float(), self.grid, l2)


def _rows(maps: Tensor, target: Tensor | None, grid: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Upsampled channels [m, C] and unit tokens [m, D], CHUNK pictures at a time."""
    for start in range(0, len(maps), CHUNK):
        x = resize_bilinear(maps[start : start + CHUNK].float(), grid, grid).flatten(2).transpose(1, 2).flatten(0, 1)
        yield x, x if target is None else normalize(target[start : start + CHUNK]).flatten(0, 1)


def _upsampling(side: int, grid: int) -> Tensor:
    """The matrix [grid * grid, side * side] of bilinear upsampling."""
    units = torch.eye(side * side).reshape(side * side, 1, side, side)
    return resize_bilinear(units, grid, grid).flatten(1).T


def _as_map(tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))
