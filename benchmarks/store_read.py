"""Rate at which samples come from the LMDB stores into a training batch, beside a memcpy of the same bytes.

python benchmarks/store_read.py [--samples 1500] [--threads 8] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import save

from library.data.batches import Prefetcher
from library.data.buckets import Fitted
from library.data.cached_samples import CachedSamples, Request
from library.data.dataset_schema import Dataset, Subset
from library.data.order import MicroBatch
from library.data.store import StoreMeta, TensorStore
from library.data.store_writer import StoreWriter
from library.data.text_embeddings import TextEmbeddings
from library.data.trained_image import TrainedImage
from library.data.training_images import TrainingImage
from library.errors import script
from library.training.text import PromptTable

BATCH = 128
# Batches in flight (depth 3 and the one in use); the first ones touch fresh memory, which a long run does once.
WARM_UP = 4
SHAPES = {"latents": (4, 64, 64), "tokens": (256, 1024)}
SQUARE = (512, 512)
TARGETS = {"tokens_of_memcpy": 0.6, "latents_per_second": 15000}


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--name", default="store_read")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        stores = {kind: make_store(Path(folder) / kind, kind, arguments.samples) for kind in SHAPES}
        measured: dict[str, float] = {}
        for kind in SHAPES:
            measured |= measure(kind, stores, arguments)
    # Both in one run on one machine: the ratio holds on a noisy one, the rates only here.
    measured["tokens_of_memcpy"] = measured["tokens_per_second"] / measured["tokens_memcpy_per_second"]
    measured["latents_of_memcpy"] = measured["latents_per_second"] / measured["latents_memcpy_per_second"]
    settings = {"samples": arguments.samples, "batch": BATCH, "threads": arguments.threads, "page_cache": "warm"}
    targets = {name: {"at_least": bound, "met": measured[name] >= bound} for name, bound in TARGETS.items()}
    save(arguments.name, settings, measured, targets)


def make_store(path: Path, kind: str, samples: int) -> TensorStore:
    generator = np.random.default_rng(0)
    meta = StoreMeta(kind, "float16", SHAPES[kind], complete=True)
    writer = StoreWriter(path, kind, expected_bytes=meta.entry_bytes * samples)
    for i in range(samples):
        writer.put(f"n{i:08d}", generator.random(SHAPES[kind], np.float32).astype(np.float16), bytes(48))
    writer.set_meta(meta)
    writer.close()
    return TensorStore(path, kind)


class Stored:
    def __init__(self, store: TensorStore) -> None:
        self.stores, self.flipped = {SQUARE: store}, dict[tuple[int, int], TensorStore]()


def samples_of(ids: list[str], store: TensorStore) -> CachedSamples:
    """Class pictures as training reads them. Latents are read always; one kind at a time, that kind plays the latents."""
    dataset, subset, fitted = Dataset(SQUARE), Subset(), Fitted(SQUARE, SQUARE, SQUARE, (0, 0, *SQUARE))
    pictures = [
        TrainedImage(TrainingImage(name, Path(name), SQUARE, "", "class", None, subset), dataset, fitted, class_id=0)
        for name in ids
    ]
    text = TextEmbeddings(torch.zeros(2, 77, 1).half(), {0: 0})
    table = PromptTable(text, 0.0, device=torch.device("cpu"), dtype=torch.float32)
    return CachedSamples(pictures, Stored(store), {}, table, seed=0, last_step=1, alike=True)


def request(indices: np.ndarray) -> Request:
    count = len(indices)
    return Request(0, 0, MicroBatch(0, indices, np.zeros_like(indices), count, count), 1.0)


def measure(kind: str, stores: dict[str, TensorStore], arguments: argparse.Namespace) -> dict[str, float]:
    generator = np.random.default_rng(1)
    order = [generator.permutation(arguments.samples)[:BATCH] for _ in range(arguments.batches)]
    ids = [f"n{i:08d}" for i in range(arguments.samples)]
    samples = samples_of(ids, stores[kind])

    def through_training_path() -> float:
        ahead = Prefetcher(
            samples, map(request, [*order[:WARM_UP], *order]), torch.device("cpu"), workers=arguments.threads
        )
        for _ in range(WARM_UP):
            next(ahead)
        start = time.perf_counter()
        for _ in ahead:
            pass
        seconds = time.perf_counter() - start
        ahead.close()
        return seconds

    memory = np.full((arguments.samples, int(np.prod(SHAPES[kind]))), 1.0, np.float16)
    # As many targets as the training path has batches in flight: one alone would stay in the processor's cache.
    targets = np.full((WARM_UP, BATCH, memory.shape[1]), 1.0, np.float16)

    def memcpy() -> float:
        start = time.perf_counter()
        for number, batch in enumerate(order):
            target = targets[number % WARM_UP]
            for row, index in enumerate(batch):
                target[row] = memory[index]
        return time.perf_counter() - start

    through_training_path(), memcpy()
    pairs = [(through_training_path(), memcpy()) for _ in range(arguments.repeats)]
    read, copied = (len(order) * BATCH / min(seconds) for seconds in zip(*pairs, strict=True))
    return {f"{kind}_per_second": read, f"{kind}_memcpy_per_second": copied}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
