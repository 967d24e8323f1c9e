"""A picture as a training shows it, and which pictures may stand in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from library.data.buckets import Fitted, Size
from library.data.dataset_schema import Dataset
from library.data.order import Group
from library.data.training_images import TrainingImage


@dataclass(frozen=True, slots=True)
class TrainedImage:
    """A picture, where it was cut for its bucket, and how much its loss counts."""

    image: TrainingImage
    dataset: Dataset
    fitted: Fitted
    repeats: int = 1
    """Showings in an epoch."""
    loss_weight: float = 1.0
    """prior_loss_weight for regularisation pictures."""
    class_id: int | None = None
    """Of class pictures, whose caption is their class's prompt."""

    @property
    def has_mask(self) -> bool:
        return self.image.mask is not None or self.image.subset.alpha_mask


def groups_of(images: Sequence[TrainedImage]) -> list[Group]:
    """Pictures that may stand in one batch: of one data set and one bucket, each as often as it is shown."""
    members: dict[tuple[int, Size], list[int]] = {}
    datasets: dict[int, Dataset] = {}
    for index, one in enumerate(images):
        key = (id(one.dataset), one.fitted.bucket)
        datasets[id(one.dataset)] = one.dataset
        members.setdefault(key, []).extend([index] * one.repeats)
    return [
        Group(np.array(indices, np.int64), datasets[dataset].batch_size) for (dataset, _), indices in members.items()
    ]
