"""What the loop asks of what it works with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from library.data.batches import AnyBatch
from library.training.alignment_end import GradientCosine
from library.training.optimizers import ParameterGroup


class Batches(Protocol):
    """An endless iterator of batches that knows how long it kept the step waiting, in seconds."""

    waited: float

    def __next__(self) -> AnyBatch: ...

    def close(self) -> None: ...


class Task(Protocol):
    """What a run trains."""

    groups: list[ParameterGroup]

    def losses(self, batch: Any, generator: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        """Loss parts of a batch, scalars on the device; "loss" is the one to minimise."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the validation set with the weights as they are; the same call gives the same numbers."""
        ...

    def sample_ids(self, indices: np.ndarray) -> list[str]: ...


class Watch(Protocol):
    """Decides by the metrics of steps, which come in order, how the run goes on."""

    def due(self, step: int) -> bool:
        """Whether the metrics of all steps before this one have to be seen before it begins."""
        ...

    def see(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The metrics of one step; further ones of its own for the next row."""
        ...

    def measures(self, step: int) -> GradientCosine | None:
        """What measures the gradients of this step, if anything."""
        ...


class Look(Protocol):
    """Draws pictures after a step where they are due."""

    def due(self, step: int, finished: bool) -> bool: ...

    def __call__(self, step: int, finished: bool) -> None: ...


class Watched(Protocol):
    """The page that people watch a run by."""

    def due(self, step: int) -> bool:
        """Whether it is old, though nothing has happened."""
        ...

    def __call__(self, step: int) -> None: ...
