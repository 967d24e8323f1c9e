"""Order of samples, assembly of batches, and reading ahead."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.batches import BatchOrder, CachedSamples, Prefetcher
from library.data.store import StoreMeta, TensorStore
from library.data.store_writer import StoreWriter


@given(
    samples=st.integers(1, 200),
    batch_size=st.integers(1, 8),
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=60)
def test_an_epoch_shows_each_sample_at_most_once_and_misses_less_than_a_step(
    samples: int, batch_size: int, world_size: int, accumulation: int, seed: int
) -> None:
    orders = [BatchOrder(samples, batch_size, seed, rank, world_size, accumulation) for rank in range(world_size)]
    steps = orders[0].steps_per_epoch
    if steps == 0:
        return
    for epoch in range(2):
        seen = np.concatenate(
            [
                indices
                for order in orders
                for indices in itertools.islice(order.from_step(epoch * steps), steps * accumulation)
            ]
        )
        assert len(seen) == len(set(seen.tolist())) == steps * orders[0].samples_per_step
        assert samples - len(seen) < orders[0].samples_per_step


def test_going_on_at_a_step_gives_the_batches_of_going_through() -> None:
    order = BatchOrder(53, 4, 7, accumulation=2)
    through = list(itertools.islice(order.from_step(0), 60))
    for step in (1, 5, 6, 7, 13):
        resumed = list(itertools.islice(order.from_step(step), 60 - step * 2))
        assert all(np.array_equal(a, b) for a, b in zip(through[step * 2 :], resumed, strict=True))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = BatchOrder(50, 5, 1)
    assert not np.array_equal(order.permutation(0), order.permutation(1))
    assert not np.array_equal(order.permutation(0), BatchOrder(50, 5, 2).permutation(0))
    assert np.array_equal(order.permutation(3), BatchOrder(50, 5, 1).permutation(3))


def test_the_global_batch_is_the_same_for_any_number_of_processes() -> None:
    single = next(BatchOrder(100, 8, 3).from_step(2))
    shared = [next(BatchOrder(100, 4, 3, rank, 2).from_step(2)) for rank in range(2)]
    assert np.array_equal(single, np.concatenate(shared))


@pytest.fixture
def samples(tmp_path: Path) -> CachedSamples:
    generator = np.random.default_rng(0)
    latents = StoreWriter(tmp_path / "l", "latents", expected_bytes=1 << 20)
    tokens = StoreWriter(tmp_path / "t", "tokens", expected_bytes=1 << 20)
    for i in range(20):
        latents.put(f"n{i}", generator.normal(size=(4, 2, 2)).astype(np.float16), b"x" * 48)
        scale = generator.random(3).astype(np.float16)
        tokens.put(f"n{i}", generator.integers(-127, 128, (3, 5)).astype(np.int8), b"x" * 48, scale)
    latents.set_meta(StoreMeta("latents", "float16", (4, 2, 2), complete=True))
    tokens.set_meta(StoreMeta("tokens", "int8", (3, 5), complete=True))
    latents.close(), tokens.close()
    stores = TensorStore(tmp_path / "l", "latents"), TensorStore(tmp_path / "t", "tokens")
    return CachedSamples([f"n{i}" for i in range(20)], torch.arange(20) % 3, *stores)


def test_a_batch_holds_what_the_stores_hold(samples: CachedSamples) -> None:
    batch = samples.read(np.array([3, 0, 19]))
    for row, i in enumerate((3, 0, 19)):
        assert np.array_equal(batch.latents[row].numpy(), samples.latents.read(f"n{i}"))
        assert batch.tokens is not None and samples.tokens is not None
        assert np.array_equal(batch.tokens[row].numpy(), samples.tokens.read(f"n{i}"))
    assert batch.text_rows.tolist() == [0, 0, 1]
    assert batch.token_scales is not None
    expected = batch.tokens.double() * batch.token_scales.double()[..., None]
    torch.testing.assert_close(batch.target_tokens().double(), expected)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_reading_ahead_keeps_order_and_content_whatever_the_number_of_workers(
    samples: CachedSamples, workers: int
) -> None:
    order = [np.array(part) for part in ([1, 2, 3, 4], [5, 6], [7], [0, 19, 18])]
    ahead = Prefetcher(samples, iter(order), torch.device("cpu"), workers=workers)
    for indices, batch in zip(order, ahead, strict=True):
        expected = samples.read(indices)
        assert np.array_equal(batch.indices, indices) and torch.equal(batch.latents, expected.latents)
        assert torch.equal(batch.target_tokens(), expected.target_tokens())
    ahead.close()


def test_a_missing_entry_reaches_the_training_step(samples: CachedSamples) -> None:
    samples.sample_ids[4] = "gone"
    ahead = Prefetcher(samples, iter([np.array([4])]), torch.device("cpu"), workers=2)
    with pytest.raises(Exception, match="has no entry gone"):
        next(ahead)
    ahead.close()
