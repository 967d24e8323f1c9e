"""Predictors of teacher tokens that give a checkpoint's numbers a meaning: constants, a fitted head, the grid's own limit.

All work on unit tokens [n, N, D] of a square grid, row by row, and give such tokens.
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
"""Penalties tried, relative to standardised channels."""
CHUNK = 64
"""Pictures whose upsampled maps are in memory together."""


def mean_token(fit: Tensor, count: int) -> Tensor:
    """The mean unit token of the fitted pictures, `count` times: what can be said without looking at all."""
    return normalize(normalize(fit).mean(dim=(0, 1))).expand(count, fit.shape[1], -1)


def position_mean(fit: Tensor, count: int) -> Tensor:
    """The mean unit token at each position, `count` times: what the place alone says."""
    return normalize(normalize(fit).mean(dim=0)).expand(count, -1, -1)


def pooled_to_grid(target: Tensor, side: int) -> Tensor:
    """Teacher tokens pooled to a map of side x side and back: about what a trunk of that grid can say.

    An AlignHead's map is upsampled to the teacher's grid behind the head (U-REPA, arXiv 2503.18414), so a map of fewer places
    than the teacher has tokens cannot reach each of them.
    """
    grid = _as_map(normalize(target))
    back = resize_bilinear(F.adaptive_avg_pool2d(grid, side), *grid.shape[-2:])
    return normalize(back.flatten(2).transpose(1, 2))


def best_on_grid(target: Tensor, side: int, iterations: int = 50) -> Tensor:
    """The tokens of highest mean cosine with `target` among all that a side x side map gives by bilinear upsampling.

    Found by L-BFGS from the least-squares map; no AlignHead without a wider view than its map can be above it, but for the
    last per mille that the search leaves.
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
    """A U-Net of the same configuration with fresh weights drawn from `seed`; global random state is left as it was."""
    like = next(unet.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(unet).from_config(unet.config)
    return nn.Module.to(fresh, like.device, like.dtype).requires_grad_(False).eval()  # diffusers' own warns of nothing


@dataclass
class RidgeHead:
    """A linear AlignHead fitted in closed form: ridge regression of unit tokens on the upsampled, standardised map.

    Stands in for training a head. It is of the kind "linear" and minimises the squared error of unit tokens, not 1 - cosine;
    fitted for one timestep, where an AlignHead serves them all. So trunks are compared by it with each other; a trained
    head of kind mlp may well be above it.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    grid: int
    l2: float

    @staticmethod
    def fit(maps: Tensor, target: Tensor, ids: Sequence[str]) -> RidgeHead:
        """maps [n, C, h, w] and unit tokens [n, N, D] of the same pictures `ids`.

        The penalty is that of `RIDGE_GRID` with the highest token cosine on a fifth of the pictures, chosen by a hash.
        """
        if len(maps) != len(target) or len(maps) != len(ids):
            raise UserError(f"A head is fitted on maps and tokens of the same pictures: {len(maps)} and {len(target)}.")
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
        # A channel that never changes is left out.
        scale = torch.where(variance > 1e-12 * (1 + mean.square()), variance.rsqrt(), 0.0)
        correlation = covariance * torch.outer(scale, scale)
        cross = (self.xy / self.count - torch.outer(mean, bias)) * scale[:, None]
        penalty = l2 * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        weights = torch.linalg.solve(correlation + penalty, cross)
        return RidgeHead(mean.float(), scale.float(), weights.float(), bias.float(), self.grid, l2)


def _rows(maps: Tensor, target: Tensor | None, grid: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Upsampled channels [m, C] and unit tokens [m, D] of a few pictures at a time."""
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
