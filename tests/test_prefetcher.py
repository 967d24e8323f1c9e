"""Batches of cached pictures, and reading ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.batches import Prefetcher
from library.data.buckets import Fitted
from library.data.cached_samples import Batch, CachedSamples, Request
from library.data.dataset_schema import Dataset, Subset
from library.data.order import MicroBatch
from library.data.store import StoreMeta, TensorStore
from library.data.store_writer import StoreWriter
from library.data.text_embeddings import TextEmbeddings
from library.data.trained_image import TrainedImage
from library.data.training_images import TrainingImage
from library.training.text import PromptTable

SIDE = (16, 16)
TEXT = TextEmbeddings(torch.arange(4.0).view(4, 1, 1).expand(4, 77, 2).half(), {0: 0, 1: 1, 2: 2})


class Stored:
    def __init__(self, store: TensorStore) -> None:
        self.stores, self.flipped = {SIDE: store}, dict[tuple[int, int], TensorStore]()


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, TensorStore]:
    generator = np.random.default_rng(0)
    latents = StoreWriter(tmp_path / "l", "latents", expected_bytes=1 << 20)
    tokens = StoreWriter(tmp_path / "t", "tokens", expected_bytes=1 << 20)
    for i in range(20):
        latents.put(f"n{i}", generator.normal(size=(4, 2, 2)).astype(np.float16), b"x" * 48)
        scale = generator.random(4).astype(np.float16)
        tokens.put(f"n{i}", generator.integers(-127, 128, (4, 5)).astype(np.int8), b"x" * 48, scale)
    latents.set_meta(StoreMeta("latents", "float16", (4, 2, 2), complete=True))
    tokens.set_meta(StoreMeta("tokens", "int8", (4, 5), complete=True))
    latents.close(), tokens.close()
    return {"latents": TensorStore(tmp_path / "l", "latents"), "tokens": TensorStore(tmp_path / "t", "tokens")}


@pytest.fixture
def text() -> PromptTable:
    return PromptTable(TEXT, 0.5, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def samples(stores: dict[str, TensorStore], text: PromptTable) -> CachedSamples:
    """Class pictures n0 to n19, of class i % 3."""
    dataset, square = Dataset(SIDE), Fitted(SIDE, SIDE, SIDE, (0, 0, *SIDE))
    pictures = [
        TrainedImage(
            TrainingImage(f"n{i}", Path(f"n{i}.png"), SIDE, "a cat", "class", None, Subset()),
            dataset,
            square,
            class_id=i % 3,
        )
        for i in range(20)
    ]
    latents, tokens = Stored(stores["latents"]), Stored(stores["tokens"])
    return CachedSamples(pictures, latents, {"a": tokens}, text, seed=0, last_step=1, alike=True)


def request(*indices: int) -> Request:
    chosen = np.array(indices, np.int64)
    return Request(0, 0, MicroBatch(0, chosen, np.zeros_like(chosen), len(chosen), len(chosen)), 1.0)


def test_a_batch_holds_what_the_stores_hold(samples: CachedSamples, stores: dict[str, TensorStore]) -> None:
    batch = samples.read(request(3, 0, 19))
    for row, i in enumerate((3, 0, 19)):
        assert np.array_equal(batch.latents[row].numpy(), stores["latents"].read(f"n{i}"))
        assert np.array_equal(batch.tokens["a"][row].numpy(), stores["tokens"].read(f"n{i}"))
    assert batch.text_rows is not None and batch.text_rows.tolist() == [0, 0, 1]
    assert batch.weights is None and batch.token_grid == (2, 2) and batch.captions == ["a cat"] * 3
    expected = batch.tokens["a"].double() * batch.token_scales["a"].double()[..., None]
    torch.testing.assert_close(batch.target_tokens("a").double(), expected)


def test_prompts_of_classes_are_dropped_by_the_generator_and_by_nothing_else(
    samples: CachedSamples, text: PromptTable
) -> None:
    batch = samples.read(request(*range(20)))
    rows = [i % 3 for i in range(20)]
    assert text.condition(batch, None).states[:, 0, 0].tolist() == rows

    def told(seed: int) -> list[float]:
        return text.condition(batch, torch.Generator().manual_seed(seed)).states[:, 0, 0].tolist()

    assert told(1) == told(1) != told(2)
    dropped = [row for row, found in zip(rows, told(1), strict=True) if found != row]
    assert 4 <= len(dropped) <= 16 and set(told(1)) == {0, 1, 2, 3}


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_reading_ahead_keeps_order_and_content_whatever_the_number_of_workers(
    samples: CachedSamples, workers: int
) -> None:
    order = [request(*part) for part in ([1, 2, 3, 4], [5, 6], [7], [0, 19, 18])]
    ahead = Prefetcher(samples, iter(order), torch.device("cpu"), workers=workers)
    batch: Batch
    for asked, batch in zip(order, ahead, strict=True):
        expected = samples.read(asked)
        assert np.array_equal(batch.indices, asked.micro.indices) and torch.equal(batch.latents, expected.latents)
        assert torch.equal(batch.target_tokens("a"), expected.target_tokens("a"))
    ahead.close()


def test_a_missing_entry_reaches_the_training_step(samples: CachedSamples) -> None:
    gone = samples.images[4]
    samples.images[4] = replace(gone, image=replace(gone.image, sample_id="gone"))
    ahead = Prefetcher(samples, iter([request(4)]), torch.device("cpu"), workers=2)
    with pytest.raises(Exception, match="has no entry gone"):
        next(ahead)
    ahead.close()
