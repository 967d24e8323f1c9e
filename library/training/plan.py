"""The arithmetic of a run: how many samples, steps and epochs. No torch here: --dry_run of anything is cheap."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import UserError
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


def make_plan(samples: int, training: TrainingOptions, optimizer: OptimizerOptions, world_size: int = 1) -> Plan:
    """Steps per epoch round down: a global batch is always full. Raises UserError where one batch needs more than all."""
    per_step = training.train_batch_size * training.gradient_accumulation_steps * world_size
    if per_step > samples:
        raise UserError(
            f"train_batch_size {training.train_batch_size} x gradient_accumulation_steps {training.gradient_accumulation_steps} "
            f"x {world_size} process{'es' if world_size > 1 else ''} is {per_step} samples a step, but the training set has only "
            f"{samples}. Lower train_batch_size to at most {max(1, samples // (per_step // training.train_batch_size))}."
        )
    steps_per_epoch = samples // per_step
    if training.max_train_steps is not None:
        last_step = training.max_train_steps
    else:
        assert training.max_train_epochs is not None
        last_step = training.max_train_epochs * steps_per_epoch
    share = optimizer.lr_warmup_steps
    warmup = int(share * last_step) if share < 1 else int(share)
    return Plan(
        samples,
        training.train_batch_size,
        training.gradient_accumulation_steps,
        world_size,
        steps_per_epoch,
        last_step,
        warmup,
    )
