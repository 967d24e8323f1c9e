"""Exponential moving average of the trained weights only: the frozen ones are their own average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def restored(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """After the context the parameters hold, to the bit, what they held before it; the context gets a copy of that."""
    live = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield live
    finally:
        fill(parameters, live)


@torch.no_grad()
def fill(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


class ExponentialAverage:
    """shadow <- decay * shadow + (1 - decay) * weight, float32, for named parameters."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.shadows = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.shadows.values()), list(self.parameters.values()), 1.0 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the parameters hold the average; afterwards what they held before."""
        with restored(self.parameters):
            fill(self.parameters, self.shadows)
            yield
