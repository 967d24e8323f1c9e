"""Every picture once per epoch and repeat, in batches of one bucket, for any number of processes."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.order import BatchOrder, Group, MicroBatch, balance_regularisation
from library.errors import UserError
from tests.tools.orders import whole_steps


def groups_of(*sizes: tuple[int, int]) -> list[Group]:
    """Groups of so many pictures and such a batch size, numbered through."""
    starts = itertools.accumulate((count for count, _ in sizes), initial=0)
    return [
        Group(np.arange(start, start + count), batch_size)
        for start, (count, batch_size) in zip(starts, sizes, strict=False)
    ]


def orders_of(groups: list[Group], world_size: int, accumulation: int, seed: int = 0, **more: bool) -> list[BatchOrder]:
    return [BatchOrder(groups, seed, rank, world_size, accumulation, **more) for rank in range(world_size)]


def epoch(orders: list[BatchOrder], number: int) -> list[MicroBatch]:
    """All micro-batches of all processes."""
    steps = range(number * orders[0].steps_per_epoch, (number + 1) * orders[0].steps_per_epoch)
    return [micro for order in orders for step in steps for micro in order.step(step).micro_batches]


def shown(micro_batches: list[MicroBatch]) -> Counter[tuple[int, int]]:
    """How often each (picture, repeat) really comes."""
    return Counter(
        pair
        for micro in micro_batches
        for pair in zip(micro.indices[: micro.real].tolist(), micro.repeats[: micro.real].tolist(), strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("pad_short", [False, True])
def test_every_picture_is_shown_once_per_epoch(world_size: int, accumulation: int, pad_short: bool) -> None:
    groups = groups_of((40, 4), (7, 4), (1, 4), (13, 2), (0, 3))
    orders = orders_of(groups, world_size, accumulation, pad_short=pad_short)
    for number in range(3):
        assert shown(epoch(orders, number)) == Counter({(index, 0): 1 for index in range(61)})


sizes = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=6).filter(
    lambda groups: any(count for count, _ in groups)
)


@given(
    sizes=sizes,
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 5),
    pad_short=st.booleans(),
)
def test_processes_keep_step_and_count_the_real_pictures(
    sizes: list[tuple[int, int]], world_size: int, accumulation: int, seed: int, pad_short: bool
) -> None:
    groups = groups_of(*sizes)
    orders = orders_of(groups, world_size, accumulation, seed, pad_short=pad_short)
    total = sum(count for count, _ in sizes)
    assert shown(epoch(orders, 2)) == Counter({(index, 0): 1 for index in range(total)})
    steps = orders[0].steps_per_epoch
    assert steps == math.ceil(math.ceil(orders[0].batches_per_epoch / world_size) / accumulation)
    for number in range(2 * steps, 3 * steps):
        across = [order.step(number) for order in orders]
        assert len({len(step.micro_batches) for step in across}) == 1
        assert 1 <= len(across[0].micro_batches) <= accumulation
        assert len(across[0].micro_batches) == accumulation or number == 3 * steps - 1
        real = sum(micro.real for step in across for micro in step.micro_batches)
        assert {(step.samples, step.epoch, step.number) for step in across} == {(real, 2, number)} and real > 0
        for micro in (micro for step in across for micro in step.micro_batches):
            assert (micro.group, len(micro.indices)) in orders[0].shapes
            assert set(micro.indices.tolist()) <= set(groups[micro.group].indices.tolist())
            assert micro.weights.dtype == np.float32 and micro.weights.sum() == micro.real
            assert micro.weights[: micro.real].all()


def test_a_group_is_cut_into_full_batches_and_one_short_one() -> None:
    order = BatchOrder(groups_of((10, 4), (3, 2)), 0)
    found = Counter((micro.group, micro.real) for micro in epoch([order], 0))
    assert found == {(0, 4): 2, (0, 2): 1, (1, 2): 1, (1, 1): 1}
    assert order.shapes == {(0, 4), (0, 2), (1, 2), (1, 1)}


def test_padding_gives_one_shape_per_group() -> None:
    order = BatchOrder(groups_of((10, 4), (1, 3)), 0, pad_short=True)
    assert order.shapes == {(0, 4), (1, 3)} == {(m.group, len(m.indices)) for m in epoch([order], 0)}
    alone = next(micro for micro in epoch([order], 0) if micro.group == 1)
    assert alone.indices.tolist() == [10, 10, 10] and alone.weights.tolist() == [1, 0, 0]


def test_padding_changes_nothing_else() -> None:
    groups = groups_of((10, 4), (5, 3))
    short, padded = (BatchOrder(groups, 0, accumulation=2, pad_short=pad) for pad in (False, True))
    for step in range(10):
        assert short.step(step).samples == padded.step(step).samples
        for a, b in zip(short.step(step).micro_batches, padded.step(step).micro_batches, strict=True):
            assert np.array_equal(a.indices, b.indices[: b.real])


def test_more_processes_than_batches_leave_some_with_nothing_real() -> None:
    orders = orders_of(groups_of((3, 2)), 4, 2)
    steps = [order.step(0) for order in orders]
    assert orders[0].steps_per_epoch == 1 and [step.samples for step in steps] == [3] * 4
    assert [len(step.micro_batches) for step in steps] == [1] * 4
    assert sorted(step.micro_batches[0].real for step in steps) == [0, 0, 1, 2]
    assert all(len(step.micro_batches[0].indices) for step in steps)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_a_step_holds_the_same_pictures_however_it_is_divided(world_size: int, accumulation: int) -> None:
    groups = groups_of((23, 2), (9, 3), (4, 2))
    one = BatchOrder(groups, 5, accumulation=6)
    orders = orders_of(groups, world_size, accumulation, seed=5)
    assert orders[0].steps_per_epoch == one.steps_per_epoch
    for number in range(2 * one.steps_per_epoch):
        divided = [micro for order in orders for micro in order.step(number).micro_batches]
        assert shown(divided) == shown(one.step(number).micro_batches)


def test_weights_and_samples_make_the_mean_over_the_pictures_of_a_step() -> None:
    orders = orders_of(groups_of((23, 4), (9, 3), (2, 5)), 3, 2, pad_short=True)
    losses = np.random.default_rng(0).random(34)
    for number in range(orders[0].steps_per_epoch):
        steps = [order.step(number) for order in orders]
        gradients = [
            sum((losses[micro.indices] * micro.weights).sum() * 3 / step.samples for micro in step.micro_batches)
            for step in steps
        ]
        real = list(shown([micro for step in steps for micro in step.micro_batches]))
        assert np.mean(gradients) == pytest.approx(np.mean([losses[index] for index, _ in real]))


def test_going_on_at_a_step_gives_the_steps_of_going_through() -> None:
    groups = groups_of((11, 2), (6, 4))
    through = list(itertools.islice(BatchOrder(groups, 7, accumulation=2).from_step(0), 20))
    for first in (1, 3, 4, 5, 13):
        resumed = itertools.islice(BatchOrder(groups, 7, accumulation=2).from_step(first), 20 - first)
        for a, b in zip(through[first:], resumed, strict=True):
            assert (a.number, a.epoch, a.samples) == (b.number, b.epoch, b.samples)
            for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
                assert (x.group, x.real) == (y.group, y.real)
                assert np.array_equal(x.indices, y.indices) and np.array_equal(x.repeats, y.repeats)


def test_epochs_and_seeds_change_both_orders() -> None:
    groups = groups_of((40, 4), (40, 4))

    def lists(seed: int, number: int) -> tuple[list[int], set[tuple[int, ...]]]:
        micro_batches = epoch([BatchOrder(groups, seed)], number)
        return [m.group for m in micro_batches], {tuple(sorted(m.indices.tolist())) for m in micro_batches}

    usual, again, later, other = lists(1, 0), lists(1, 0), lists(1, 1), lists(2, 0)
    assert usual == again
    for different in (later, other):
        assert usual[0] != different[0] and not usual[1] & different[1]


def test_epochs_are_counted_by_steps() -> None:
    order = BatchOrder(groups_of((10, 2)), 0, accumulation=2)
    assert order.steps_per_epoch == 3 and order.samples_per_epoch == 10 and order.batches_per_epoch == 5
    assert [order.epoch_of(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_repeats_are_numbered() -> None:
    group = Group(np.array([4, 2, 4, 4, 9, 2]), 3)
    assert group.repeats.tolist() == [0, 0, 1, 2, 0, 1]
    expected = Counter({(4, 0): 1, (4, 1): 1, (4, 2): 1, (2, 0): 1, (2, 1): 1, (9, 0): 1})
    assert shown(epoch(orders_of([group], 2, 2), 3)) == expected
    assert Group(np.array([], np.int64), 1).repeats.tolist() == []


def slow_balance(repeats: list[int], training: int) -> list[int]:
    """One picture after the other, as kohya counts them."""
    used, count = [0] * len(repeats), 0
    for turn in itertools.count():
        for index, times in enumerate(repeats):
            if count >= training:
                return used
            added = times if turn == 0 else 1
            used[index] += added
            count += added
    raise AssertionError


@given(repeats=st.lists(st.integers(1, 5), min_size=1, max_size=10), training=st.integers(0, 60))
def test_regularisation_pictures_are_cycled_until_they_match(repeats: list[int], training: int) -> None:
    found = balance_regularisation(repeats, training)
    assert found == slow_balance(repeats, training)
    if sum(repeats) <= training:
        assert sum(found) == training and all(a >= b for a, b in zip(found, repeats, strict=True))


def test_surplus_regularisation_pictures_are_not_used() -> None:
    assert balance_regularisation([1] * 5, 3) == [1, 1, 1, 0, 0]
    assert balance_regularisation([2, 2, 2], 3) == [2, 2, 0]
    assert balance_regularisation([1, 1, 1], 7) == [3, 2, 2]
    assert balance_regularisation([], 7) == []


def test_nothing_to_train_on_is_refused() -> None:
    for groups in ([], groups_of((0, 4))):
        with pytest.raises(UserError, match="There is no image to train on"):
            BatchOrder(groups, 0)
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        groups_of((3, 0))
    for wrong in ({"rank": 2, "world_size": 2}, {"accumulation": 0}):
        with pytest.raises(ValueError):
            BatchOrder(groups_of((3, 1)), 0, **wrong)  # type: ignore[arg-type]


def test_a_large_data_set_is_ordered_quickly() -> None:
    order = BatchOrder(groups_of(*[(20_000, 8)] * 20), 0, 1, 4, 2)
    assert order.step(order.steps_per_epoch).samples == 64
    assert order.step(3 * order.steps_per_epoch - 1).epoch == 2


@given(
    samples=st.integers(1, 200),
    batch_size=st.integers(1, 8),
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_whole_steps_show_each_picture_at_most_once_and_miss_less_than_a_step(
    samples: int, batch_size: int, world_size: int, accumulation: int, seed: int
) -> None:
    per_step = batch_size * world_size * accumulation
    if samples < per_step:
        with pytest.raises(UserError, match=f"{per_step} samples a step"):
            whole_steps(samples, batch_size, seed, 0, world_size, accumulation)
        return
    orders = [whole_steps(samples, batch_size, seed, rank, world_size, accumulation) for rank in range(world_size)]
    for number in range(2):
        batches = epoch(orders, number)
        seen = np.concatenate([micro.indices for micro in batches])
        assert len(seen) == len(set(seen.tolist())) == samples // per_step * per_step
        assert {(micro.real, micro.together, micro.sharing) for micro in batches} == {
            (batch_size, batch_size * world_size, world_size)
        }
    assert orders[0].samples_seen(3) == 3 * per_step


def test_whole_steps_follow_the_epochs_permutation_whatever_the_number_of_processes() -> None:
    """As pictures were ordered from the first version on: slices of PCG64's permutation by (seed, epoch)."""
    for number in (0, 2):
        expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, number]))).permutation(50)
        one = np.concatenate([micro.indices for micro in epoch([whole_steps(50, 6, 3)], number)])
        assert one.tolist() == expected[:48].tolist()
        turns = zip(*(epoch([whole_steps(50, 3, 3, rank, 2)], number) for rank in (0, 1)), strict=True)
        assert np.concatenate([micro.indices for turn in turns for micro in turn]).tolist() == one.tolist()


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), world_size=st.integers(1, 4))
def test_processes_know_how_many_pictures_a_turn_has_together(sizes: list[int], world_size: int) -> None:
    orders = [BatchOrder(groups_of(*((size, 2) for size in sizes)), 0, rank, world_size) for rank in range(world_size)]
    for turn in zip(*(order.step(0).micro_batches for order in orders), strict=True):
        assert {micro.together for micro in turn} == {sum(micro.real for micro in turn)}
        assert {micro.sharing for micro in turn} == {sum(micro.real > 0 for micro in turn)}
