"""The cache pipeline: decode in worker processes, encode in batches on the device, write in one writer thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from library.caching.pictures import Job, Picture, PictureBatch, picture_batches
from library.caching.survey import Survey
from library.data.sources import ImageSource
from library.data.store import pack_source, shard_folder
from library.data.store_writer import StoreWriter
from library.models.encoders import quantize_tokens


class PixelEncoder(Protocol):
    """Turns pixels [B, 3, R, R] uint8 into one float16 entry per picture, [B, *shape]."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor: ...


@dataclass
class BuildResult:
    """What one process did."""

    encoded: int = 0
    unchanged: int = 0
    seconds: float = 0.0
    images: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a picture has no entry, by sample id."""


def plan_jobs(surveys: dict[str, Survey], rank: int, world_size: int) -> list[tuple[Job, dict[str, int]]]:
    """This process's jobs, each with the shard that each of its entries goes to.

    Pictures are dealt out evenly. An entry that stands somewhere stays in its shard, whoever makes it again: there is
    never a second one. LMDB lets several processes write to a shard in turn.
    """
    contents: dict[str, dict[str, bytes | None]] = {}
    shards: dict[str, dict[str, int | None]] = {}
    samples = {}
    for kind, state in surveys.items():
        for entry in state.work:
            sample_id = entry.sample.sample_id
            samples[sample_id] = entry.sample
            contents.setdefault(sample_id, {})[kind] = entry.content
            shards.setdefault(sample_id, {})[kind] = entry.shard
    jobs = []
    for position, (sample_id, sample) in enumerate(samples.items()):
        if position % world_size == rank:
            places = {kind: rank if shard is None else shard for kind, shard in shards[sample_id].items()}
            jobs.append((Job(sample, contents[sample_id]), places))
    return jobs


def build(
    surveys: dict[str, Survey],
    source: ImageSource,
    encoders: dict[str, PixelEncoder],
    *,
    resolution: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    label: str = "pictures",
) -> BuildResult:
    """Make every missing, stale or doubtful entry of the surveyed stores that falls to this process.

    surveys and encoders: by kind, "latents" and "tokens". Interrupted at any moment, what was committed stays and the
    next survey finds the rest. Raises RunFailed when the disk is full.
    """
    planned = plan_jobs(surveys, rank, world_size)
    result = BuildResult()
    if not planned:
        return result
    start = time.perf_counter()
    batches = iter(picture_batches(source, [job for job, _ in planned], resolution, batch_size, workers))
    writer = _Writer(surveys, planned, result)
    try:
        with tqdm(total=len(planned), unit="img", desc=f"{label}{f' (process 1 of {world_size})' if world_size > 1 else ''}",
                  disable=rank != 0, smoothing=0.05) as progress:  # fmt: skip
            for batch in batches:
                writer.put(batch, _encode(batch, encoders, device))
                progress.update(len(batch.decoded) + len(batch.settled))
    finally:
        # Also after Ctrl-C: what was encoded is committed.
        writer.close()
    result.seconds = time.perf_counter() - start
    result.images = len(planned)
    return result


def _encode(batch: PictureBatch, encoders: dict[str, PixelEncoder], device: torch.device) -> dict[str, torch.Tensor]:
    if not batch.decoded:
        return {}
    pixels = batch.pixels.to(device, non_blocking=True)
    encoded = {}
    for kind, encoder in encoders.items():
        rows = [row for row, picture in enumerate(batch.decoded) if kind in picture.kinds]
        if rows:
            chosen = pixels if len(rows) == len(batch.decoded) else pixels[torch.tensor(rows, device=device)]
            with torch.no_grad():
                encoded[kind] = encoder.encode(chosen)
    return encoded


class _Writer:
    """The one thread that writes. Takes encoded batches from a short queue, so encoding runs on meanwhile."""

    def __init__(
        self, surveys: dict[str, Survey], planned: list[tuple[Job, dict[str, int]]], result: BuildResult
    ) -> None:
        self.surveys, self.planned, self.result = surveys, planned, result
        self.error: BaseException | None = None
        self._stores: dict[tuple[str, int], StoreWriter] = {}
        self._queue: queue.Queue[tuple[PictureBatch, dict[str, torch.Tensor]] | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self._thread.start()

    def put(self, batch: PictureBatch, encoded: dict[str, torch.Tensor]) -> None:
        while self.error is None:
            try:
                self._queue.put((batch, encoded), timeout=0.5)
                return
            except queue.Full:
                continue
        raise self.error

    def close(self) -> None:
        """Write what is queued, commit and close. Raises what went wrong in the thread."""
        while self.error is None:
            try:
                self._queue.put(None, timeout=0.5)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._write(*item)
            for store in self._stores.values():
                store.commit()
        except BaseException as error:
            self.error = error
        finally:
            for store in self._stores.values():
                store.close()

    def _store(self, kind: str, shard: int) -> StoreWriter:
        if (kind, shard) not in self._stores:
            state = self.surveys[kind]
            store = StoreWriter(shard_folder(state.path, shard), kind, expected_bytes=state.needed_bytes)
            store.set_meta(state.wanted.meta(complete=False))
            self._stores[kind, shard] = store
        return self._stores[kind, shard]

    def _write(self, batch: PictureBatch, encoded: dict[str, torch.Tensor]) -> None:
        for picture in batch.settled:
            if picture.error is None:
                self.result.unchanged += 1
            else:
                self._refuse(picture, picture.error)
            for _, store, sample_id, source in self._targets(picture):
                if picture.error is None:
                    store.put_source(sample_id, source)
                else:
                    store.put_unreadable(sample_id, source, picture.error)
        host = {kind: _to_host(tensor, self.surveys[kind].wanted.dtype) for kind, tensor in encoded.items()}
        rows = dict.fromkeys(encoded, 0)
        made: set[int] = set()
        for picture in batch.decoded:
            for kind, store, sample_id, source in self._targets(picture):
                if kind not in picture.kinds:
                    store.put_source(sample_id, source)
                    continue
                values, scales = host[kind]
                value, scale = values[rows[kind]], scales[rows[kind]] if scales is not None else None
                rows[kind] += 1
                if np.isfinite(value if scale is None else scale).all():
                    store.put(sample_id, value, source, scale)
                    made.add(picture.job)
                else:
                    precision = self.surveys[kind].wanted.producer.get("precision")
                    reason = f"its {kind} are not finite in precision {precision}; --encoder_precision no may help"
                    store.put_unreadable(sample_id, source, reason)
                    self._refuse(picture, reason)

        self.result.encoded += len(made)

    def _refuse(self, picture: Picture, reason: str) -> None:
        self.result.reasons[self.planned[picture.job][0].sample.sample_id] = reason

    def _targets(self, picture: Picture) -> Iterator[tuple[str, StoreWriter, str, bytes]]:
        """(kind, store, sample id, source record) of each entry that the picture's job is about."""
        job, places = self.planned[picture.job]
        for kind in job.contents:
            source = pack_source(picture.signature, picture.content, self.surveys[kind].wanted.fingerprint)
            yield kind, self._store(kind, places[kind]), job.sample.sample_id, source


def _to_host(encoded: torch.Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Entries [B, *shape] as numpy, with their scales [B, N] where the store is int8."""
    if dtype == "int8":
        values, scales = quantize_tokens(encoded)
        return values.cpu().numpy(), scales.cpu().numpy()
    return encoded.to(torch.float16).cpu().numpy(), None
