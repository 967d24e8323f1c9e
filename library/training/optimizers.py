"""Optimizer and learning-rate schedule, from torch and diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from library.options.training import OptimizerOptions
from library.training.plan import Plan


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay; `name` is their tag in the metrics."""

    name: str
    parameters: Sequence[torch.nn.Parameter]
    learning_rate: float
    weight_decay: float


def make_optimizer(groups: Sequence[ParameterGroup], options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), one fused kernel for all weights where the device has it."""
    return torch.optim.AdamW(
        [
            {
                "params": list(group.parameters),
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
                "name": group.name,
            }
            for group in groups
        ],
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=all(p.device.type == "cuda" for group in groups for p in group.parameters),
    )


def rate_multiplier(options: OptimizerOptions, plan: Plan) -> Callable[[int], float]:
    """step -> share of the peak learning rate: linear warm-up, then diffusers' schedule of that name.

    A pure function of the step: there is no scheduler state to save.
    """
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        options.lr_scheduler, dummy, num_warmup_steps=plan.warmup_steps, num_training_steps=plan.last_step
    )
    return scheduler.lr_lambdas[0]


def set_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float], multiplier: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * multiplier
