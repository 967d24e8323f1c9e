"""The batches of a run, and their order, as pure arithmetic.

A group holds pictures that may stand in one batch: those of one bucket of one dataset. In every epoch each group's
pictures come in an order drawn from (seed, epoch), cut into batches whose last may be short, and the batches of all
groups come in an order drawn from the same. Every picture is shown exactly once per epoch and repeat.

W processes take the batches by turns, W at a time, so that all do the same number of forward and backward passes. Where
the last turn of an epoch has fewer than W batches, the others repeat one with no real pictures in it: a pass of weight 0,
of a shape they know. Where batches remain for less than a whole optimizer step at the end of an epoch, that step
accumulates fewer. A step with W processes holds the pictures that one process has with W times the accumulation.

With `whole_steps` an epoch is full steps only, as class pictures are trained: what does not fill one is left out, another rest
each time, and the batches of a single group come as its order has them.

So batches may differ in size. For a gradient that is the mean over a step's pictures:

    loss = (loss_of_each_picture * micro_batch.weights).sum() * world_size / step.samples

which, summed over the micro-batches by backward() and averaged over processes by DDP, divides by `step.samples` once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from library.errors import UserError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """Pictures of one shape. `indices` int64 [N] holds each as often as it is to be shown in an epoch."""

    indices: Indices
    batch_size: int
    repeats: Indices = field(init=False)
    """int64 [N]: the how-many-th of its picture, from 0, each entry of `indices` is. Part of the showing's randomness."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}.")
        indices = np.asarray(self.indices, dtype=np.int64)
        order = np.argsort(indices, kind="stable")
        place = np.arange(len(indices))
        starts = np.flatnonzero(np.diff(indices[order], prepend=indices[order][:1] - 1))
        repeats = np.empty_like(indices)
        repeats[order] = place - np.repeat(starts, np.diff(starts, append=len(indices)))
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "repeats", repeats)

    @property
    def batches(self) -> int:
        return -(-len(self.indices) // self.batch_size)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward and backward pass of one process. Entries from `real` on only fill the shape and count for nothing.

    together: real pictures of all processes in the same turn. sharing: how many processes have any.
    """

    group: int
    indices: Indices
    repeats: Indices
    real: int
    together: int
    sharing: int = 1

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """1 for each real picture and 0 for the rest, float32 [B]."""
        return (np.arange(len(self.indices)) < self.real).astype(np.float32)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one process. samples: real pictures in the step, of all processes and micro-batches."""

    number: int
    epoch: int
    micro_batches: list[MicroBatch]
    samples: int


@dataclass(frozen=True, eq=False)
class _Epoch:
    """orders: the showings of each group, as places in it. batches: int64 [M, 3], the group and the slice of its order."""

    number: int
    orders: list[Indices]
    batches: Indices


class BatchOrder:
    """The batches of a whole run, reachable from any step, so that resuming needs nothing but the step.

    Args:
        groups: in an order that is the same in every process and when resuming. Empty ones do no harm.
        rank, world_size: which of how many processes this is.
        accumulation: micro-batches per optimizer step and process.
        pad_short: fill the last batch of each group to its batch size with pictures of weight 0, for models compiled
            for one shape per group.
        whole_steps: leave out what does not fill a step of all processes at the end of an epoch; for a single group.

    Raises UserError where there is no picture at all, or with whole_steps not enough for one step.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        *,
        pad_short: bool = False,
        whole_steps: bool = False,
    ) -> None:
        if not 0 <= rank < world_size or accumulation < 1:
            raise ValueError(f"rank {rank} of {world_size} processes, accumulation {accumulation}")
        if whole_steps and len(groups) != 1:
            raise ValueError(f"whole steps of {len(groups)} groups")
        self.groups, self.seed, self.rank = list(groups), seed, rank
        self.world_size, self.accumulation, self.pad_short = world_size, accumulation, pad_short
        self.whole_steps = whole_steps
        if not self.samples_per_epoch:
            raise UserError("There is no image to train on.")
        if not self.steps_per_epoch:
            self._refuse_small()
        self._recent: _Epoch | None = None

    @property
    def samples_per_epoch(self) -> int:
        """Pictures times their repeats, whether or not each is in every epoch."""
        return sum(len(group.indices) for group in self.groups)

    @property
    def batches_per_epoch(self) -> int:
        """Batches with pictures in them, of all processes."""
        if not self.whole_steps:
            return sum(group.batches for group in self.groups)
        per_step = self.world_size * self.accumulation
        return len(self.groups[0].indices) // self.groups[0].batch_size // per_step * per_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; the last of an epoch may accumulate fewer micro-batches, in all processes alike."""
        return -(-self._turns // self.accumulation)

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Every (group, batch size) that will come, to compile for beforehand."""
        found = set()
        for number, group in enumerate(self.groups):
            full, rest = divmod(len(group.indices), group.batch_size)
            if full or (rest and self.pad_short):
                found.add((number, group.batch_size))
            if rest and not self.pad_short:
                found.add((number, rest))
        return found

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that optimizer step `step`, from 0, belongs to."""
        return step // self.steps_per_epoch

    def samples_seen(self, step: int) -> int:
        """Pictures shown in the first `step` optimizer steps, by all processes."""
        if self.whole_steps:
            return step * self.groups[0].batch_size * self.accumulation * self.world_size
        epoch = self.epoch_of(step)
        begun = range(epoch * self.steps_per_epoch, step)
        return epoch * self.samples_per_epoch + sum(self.step(number).samples for number in begun)

    def step(self, step: int) -> Step:
        """What this process does in optimizer step `step`, from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        plan = self._epoch(epoch)
        first = place * self.accumulation
        turns = range(first, min(first + self.accumulation, self._turns))
        whole = plan.batches[turns.start * self.world_size : turns.stop * self.world_size]
        samples = int((whole[:, 2] - whole[:, 1]).sum())
        return Step(step, epoch, [self._micro_batch(plan, turn) for turn in turns], samples)

    def from_step(self, step: int) -> Iterator[Step]:
        """The steps from `step` on, without end."""
        return map(self.step, itertools.count(step))

    @property
    def _turns(self) -> int:
        """Micro-batches of each process in an epoch."""
        return -(-self.batches_per_epoch // self.world_size)

    def _epoch(self, number: int) -> _Epoch:
        if self._recent is None or self._recent.number != number:
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, number])))
            orders = [random.permutation(len(group.indices)) for group in self.groups]
            slices = [_slices(number, group, full=self.whole_steps) for number, group in enumerate(self.groups)]
            # The batches of a single group are in random order already.
            batches = slices[0] if self.whole_steps else random.permutation(np.concatenate(slices))
            self._recent = _Epoch(number, orders, batches[: self.batches_per_epoch])
        return self._recent

    def _micro_batch(self, plan: _Epoch, turn: int) -> MicroBatch:
        together = plan.batches[turn * self.world_size : (turn + 1) * self.world_size]
        idle = self.rank >= len(together)
        group_number, start, stop = together[0 if idle else self.rank].tolist()
        group = self.groups[group_number]
        shown = plan.orders[group_number][start:stop]
        real = 0 if idle else len(shown)
        if self.pad_short:
            shown = np.resize(shown, group.batch_size)  # from the beginning again
        everyone = int((together[:, 2] - together[:, 1]).sum())
        return MicroBatch(group_number, group.indices[shown], group.repeats[shown], real, everyone, len(together))

    def _refuse_small(self) -> None:
        batch_size, ways = self.groups[0].batch_size, self.accumulation * self.world_size
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        raise UserError(
            f"train_batch_size {batch_size} x gradient_accumulation_steps {self.accumulation} x {processes} is "
            f"{batch_size * ways} samples a step, but the training set has only {self.samples_per_epoch}. Lower train_batch_size "
            f"to at most {max(1, self.samples_per_epoch // ways)}."
        )


def _slices(number: int, group: Group, *, full: bool) -> Indices:
    """int64 [batches, 3]: the group's number, and begin and end of each of its batches. full: only of whole ones."""
    starts = np.arange(0, len(group.indices) - (group.batch_size - 1) * full, group.batch_size)
    stops = np.minimum(starts + group.batch_size, len(group.indices))
    return np.stack([np.full_like(starts, number), starts, stops], axis=1)


def balance_regularisation(repeats: Sequence[int], training_samples: int) -> list[int]:
    """How often each regularisation picture is shown, so that there are as many showings of them as of training pictures.

    As kohya does it: the pictures are gone through in order until there are enough, at first each with its own repeats,
    then once more each as often as it takes. Those not reached are not used at all. Only where the repeats of the first
    round overshoot are there more showings than training pictures.

    Args:
        repeats: of each picture of a dataset's regularisation subsets, in order.
        training_samples: the dataset's training pictures times their repeats.

    Returns:
        A number for each picture, 0 for one that is not used.
    """
    used = [0] * len(repeats)
    missing = training_samples
    for index, times in enumerate(repeats):
        if missing <= 0:
            return used
        used[index] = times
        missing -= times
    if used:
        rounds, rest = divmod(max(missing, 0), len(used))
        used = [times + rounds + (index < rest) for index, times in enumerate(used)]
    return used
