"""The loop that all parts of the tiny base are trained by: AdamW, warm-up and cosine, averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from library.training.ema import ExponentialAverage, fill

WARMUP = 0.05
LOG_EVERY = 50


@dataclass
class Record:
    """What the model card says of a training run."""

    steps: int
    batch: int
    seconds: float = 0.0
    losses: dict[int, float] = field(default_factory=dict)
    """step -> mean loss of the steps since the entry before."""


def fit(
    name: str,
    models: Mapping[str, nn.Module],
    loss_at: Callable[[int, Tensor], Tensor],
    batches: list[Tensor],
    rate: float,
    average: float = 0.995,
) -> Record:
    """Train the models on `loss_at(step, indices)`, one step a batch; they end with their averaged weights.

    rate: peak learning rate, reached after 5 % of the steps and brought to 0 along a cosine. average: decay of the
    exponential average.
    """
    parameters = {
        f"{model}.{key}": value for model, module in models.items() for key, value in module.named_parameters()
    }
    optimizer = torch.optim.AdamW(parameters.values(), rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    averaged = ExponentialAverage(parameters, average)
    record = Record(len(batches), len(batches[0]))
    begin, window = time.perf_counter(), []
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * _share(step, len(batches))
        loss = loss_at(step, indices)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        averaged.update()
        window.append(loss.detach())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == len(batches):
            record.seconds, record.losses[step + 1] = time.perf_counter() - begin, float(torch.stack(window).mean())
            window = []
            print(
                f"{name} {step + 1}/{len(batches)}  loss {record.losses[step + 1]:.4f}  {record.seconds:.0f} s",
                flush=True,
            )
    fill(parameters, averaged.shadows)
    return record


def _share(step: int, steps: int) -> float:
    """Part of the peak learning rate."""
    warmup = max(1, round(steps * WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
