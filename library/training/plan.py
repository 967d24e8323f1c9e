"""The arithmetic of a run: how many samples, steps and epochs."""

from __future__ import annotations

from dataclasses import dataclass

from library.data.collect import TrainingData
from library.data.order import BatchOrder
from library.data.trained_image import groups_of
from library.options.run import RunOptions
from library.options.training import OptimizerOptions, TrainingOptions


@dataclass(frozen=True)
class Plan:
    """samples: in the training set. Steps are optimizer steps; a sample seen is one forward and backward of it."""

    samples: int
    batch_size: int
    accumulation: int
    world_size: int
    steps_per_epoch: int
    last_step: int
    warmup_steps: int

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    @property
    def epochs(self) -> float:
        return self.last_step / self.steps_per_epoch


def make_order(data: TrainingData, options: RunOptions, rank: int = 0, world_size: int = 1) -> BatchOrder:
    training = options.training
    return BatchOrder(
        groups_of(data.training),
        training.seed,
        rank,
        world_size,
        training.gradient_accumulation_steps,
        pad_short=options.speed.compile != "none" and data.classes is None,
        whole_steps=data.classes is not None,
    )


def make_plan(order: BatchOrder, training: TrainingOptions, optimizer: OptimizerOptions) -> Plan:
    """Steps of the run. A step has batch_size x accumulation x processes pictures, and may have fewer at the end of an epoch."""
    if training.max_train_steps is not None:
        last_step = training.max_train_steps
    else:
        assert training.max_train_epochs is not None
        last_step = training.max_train_epochs * order.steps_per_epoch
    share = optimizer.lr_warmup_steps
    return Plan(
        samples=order.samples_per_epoch,
        batch_size=max(group.batch_size for group in order.groups),
        accumulation=order.accumulation,
        world_size=order.world_size,
        steps_per_epoch=order.steps_per_epoch,
        last_step=last_step,
        warmup_steps=int(share * last_step) if share < 1 else int(share),
    )
