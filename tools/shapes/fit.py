"""The loop that all parts of the tiny base are trained by: AdamW, warm-up and cosine, averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from library.files import whole_file
from library.training.ema import ExponentialAverage, fill

WARMUP = 0.05
LOG_EVERY, KEEP_EVERY = 50, 100


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
    kept: Path | None = None,
) -> Record:
    """Train the models on `loss_at(step, indices)`, one step a batch; they end with their averaged weights.

    rate: peak learning rate, reached after 5 % of the steps and brought to 0 along a cosine. average: decay of the
    exponential average. kept: file of the state every `KEEP_EVERY` steps, from which an interrupted run goes on; exactly
    where `loss_at` draws from the step alone.
    """
    parameters = {
        f"{model}.{key}": value for model, module in models.items() for key, value in module.named_parameters()
    }
    optimizer = torch.optim.AdamW(parameters.values(), rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    averaged = ExponentialAverage(parameters, average)
    record = Record(len(batches), len(batches[0]))
    first = _resume(kept, parameters, averaged, optimizer, record) if kept and kept.exists() else 0
    begin, window = time.perf_counter() - record.seconds, []
    for step, indices in enumerate(batches[first:], first):
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
            if kept and (step + 1) % KEEP_EVERY == 0:
                _keep(kept, step + 1, parameters, averaged, optimizer, record)
            print(
                f"{name} {step + 1}/{len(batches)}  loss {record.losses[step + 1]:.4f}  {record.seconds:.0f} s",
                flush=True,
            )
    fill(parameters, averaged.shadows)
    return record


Parameters = dict[str, nn.Parameter]


def _keep(
    file: Path,
    step: int,
    parameters: Parameters,
    averaged: ExponentialAverage,
    optimizer: torch.optim.Optimizer,
    record: Record,
) -> None:
    weights = {name: value.detach() for name, value in parameters.items()}
    state = {"step": step, "weights": weights, "averages": averaged.shadows, "optimizer": optimizer.state_dict()}
    with whole_file(file) as temporary:
        torch.save(state | {"record": asdict(record)}, temporary)


def _resume(
    file: Path,
    parameters: Parameters,
    averaged: ExponentialAverage,
    optimizer: torch.optim.Optimizer,
    record: Record,
) -> int:
    """Take up what `_keep` left; the step to go on with."""
    state = torch.load(file, weights_only=True)
    fill(parameters, state["weights"])
    averaged.shadows = state["averages"]
    optimizer.load_state_dict(state["optimizer"])
    record.seconds, record.losses = state["record"]["seconds"], state["record"]["losses"]
    return int(state["step"])


def _share(step: int, steps: int) -> float:
    """Part of the peak learning rate."""
    warmup = max(1, round(steps * WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
