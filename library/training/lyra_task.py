"""What train_lyra.py trains: a Lyra on cached states of text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from library.caching.prompt_cache import PromptCache
from library.data.batches import AnyBatch, Prefetcher
from library.data.order import BatchOrder
from library.options.lyra import LyraModelOptions
from library.training.optimizers import ParameterGroup
from networks.lyra import Lyra, has_text, lyra_losses

MOST_MEASURED = 2048
"""Captions whose states give the means and deviations: they are known to about 1 % then."""


@dataclass
class LyraBatch(AnyBatch):
    """states: float16 [B, T, sum of widths], the encoders' side by side."""

    states: Tensor


class LyraSamples:
    """Captions in batches. caches: what encoders say of them, one or several side by side in each."""

    def __init__(self, captions: Sequence[str], caches: Sequence[PromptCache]) -> None:
        self.captions, self.caches = list(captions), list(caches)
        self._rows = [cache.rows(self.captions) for cache in caches]
        self._widths = [cache.states.meta.shape[1] for cache in caches]

    def __len__(self) -> int:
        return len(self.captions)

    def empty_batch(self, request: np.ndarray, pin: bool) -> LyraBatch:
        shape = len(request), self.caches[0].states.meta.shape[0], sum(self._widths)
        return LyraBatch(request, torch.empty(shape, dtype=torch.float16, pin_memory=pin))

    def relabel(self, batch: LyraBatch, request: np.ndarray) -> LyraBatch | None:
        return LyraBatch(request, batch.states) if len(batch) == len(request) else None

    def fill(self, batch: LyraBatch, part: slice) -> None:
        out, start = batch.states.numpy()[part], 0
        for cache, rows, width in zip(self.caches, self._rows, self._widths, strict=True):
            said = np.empty((*out.shape[:2], width), np.float16)
            cache.read_into(rows[batch.indices[part]], said, None)
            out[..., start : start + width] = said
            start += width

    def read(self, indices: np.ndarray) -> LyraBatch:
        batch = self.empty_batch(indices, pin=False)
        self.fill(batch, slice(len(indices)))
        return batch

    def in_order(self, size: int, indices: np.ndarray | None = None) -> Iterator[LyraBatch]:
        """Batches of these captions, or of all, in order."""
        chosen = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(chosen), size):
            yield self.read(chosen[start : start + size])


@dataclass
class LyraTask:
    """The Task of the loop. names: of the encoders, in the Lyra's order. last_step: of the run, for the warm-up of the KL."""

    lyra: Lyra
    names: Sequence[str]
    groups: list[ParameterGroup]
    options: LyraModelOptions
    last_step: int
    batch_size: int
    device: torch.device
    training: LyraSamples
    validation: LyraSamples | None

    def sample_ids(self, indices: np.ndarray) -> list[str]:
        return [self.training.captions[index] for index in indices]

    def batches(self, order: BatchOrder, step: int) -> Prefetcher[np.ndarray]:
        """Those from a step on, without end."""
        requests = (micro.indices for of_step in order.from_step(step) for micro in of_step.micro_batches)
        return Prefetcher(self.training, requests, self.device, workers=1)

    def kl_weight(self, step: int) -> float:
        warmup = self.options.kl_warmup * self.last_step
        return self.options.kl_weight * min(1.0, (step + 1) / warmup if warmup else 1.0)

    def losses(self, batch: LyraBatch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Loss parts of a batch, with latents drawn from the posterior by `generator`."""
        states = self.states(batch)
        posterior = self.lyra.encode(states)
        losses = lyra_losses(self.lyra, states, posterior, posterior.sample(generator))
        loss = losses.reconstruction + self.kl_weight(step) * losses.kl + self.options.cross_weight * losses.cross
        return {"loss": loss, **losses._asdict()}

    def states(self, batch: LyraBatch) -> list[Tensor]:
        """Of each encoder, [B, T, width] float32."""
        return list(batch.states.float().split(self.lyra.spec.widths, dim=-1))

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The loss of the held-out captions by their latents' means, its parts, and of each encoder the mean cosine between its
        states and those decoded, where it has text. Every process computes all of it."""
        assert self.validation is not None
        sums: dict[str, float] = {}
        for batch in self.validation.in_order(self.batch_size):
            states = self.states(batch.to(self.device))
            posterior = self.lyra.encode(states)
            losses = lyra_losses(self.lyra, states, posterior, posterior.mean)
            total = (
                losses.reconstruction + self.options.kl_weight * losses.kl + self.options.cross_weight * losses.cross
            )
            values = {"loss": total, **losses._asdict()}
            for name, own, decoded in zip(self.names, states, self.lyra.decode(posterior.mean), strict=True):
                values[f"cosine_{name}"] = mean_cosine(own, decoded)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(batch) / len(self.validation)
        return {f"val/{name}": value for name, value in sums.items()}


def mean_cosine(states: Tensor, others: Tensor) -> Tensor:
    """Mean cosine between states [B, T, D] and others, where there is text."""
    where = has_text(states)
    return (F.cosine_similarity(states, others, dim=-1) * where).sum() / where.sum().clamp(min=1)


@torch.no_grad()
def measure(lyra: Lyra, samples: LyraSamples, batch_size: int) -> None:
    """Give the Lyra the means and deviations of each encoder's channels, over evenly spread captions where there is text."""
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(MOST_MEASURED, len(samples))).astype(int))
    widths = lyra.spec.widths
    count = [0.0] * len(widths)
    sums, squares = ([torch.zeros(width, dtype=torch.float64) for width in widths] for _ in range(2))
    for batch in samples.in_order(batch_size, chosen):
        for place, own in enumerate(batch.states.double().split(widths, dim=-1)):
            count[place] += float(has_text(own).sum())
            sums[place] += own.sum(dim=(0, 1))  # zeros where there is no text
            squares[place] += own.square().sum(dim=(0, 1))
    means = [total / max(n, 1.0) for total, n in zip(sums, count, strict=True)]
    spread = [
        (total / max(n, 1.0) - mean.square()).clamp(min=0).sqrt()
        for total, n, mean in zip(squares, count, means, strict=True)
    ]
    lyra.measure([mean.float() for mean in means], [one.float() for one in spread])
