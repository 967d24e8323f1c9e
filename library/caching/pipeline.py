"""The cache pipeline: decode in threads, encode in batches on the device, write in one writer thread."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from library.caching.decoding import Importer, Job, Picture, PictureBatch, picture_batches
from library.caching.geometry import Geometry
from library.caching.producers import Wanted, imported
from library.caching.survey import Entry, Survey
from library.data.sources import ImageSource, Sample
from library.data.store import pack_source, shard_folder
from library.data.store_writer import StoreWriter
from library.freed_memory import keep_freed_memory
from library.models.encoders import quantize_tokens
from library.progress import doing

# Stores that are open for writing at once. Pictures come bucket by bucket, so older ones are done with.
MOST_OPEN = 16


class PixelEncoder(Protocol):
    """Turns pixels [B, 3, H, W] uint8 into one float16 entry per picture, [B, *shape]."""

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
    changed: list[str] = field(default_factory=list)
    """Sample ids of the pictures that are not what they were when they were cached."""
    imported: int = 0
    """Pictures of which an entry was taken from another program's cache."""
    not_imported: list[str] = field(default_factory=list)
    """Why others were not."""


@dataclass
class Planned:
    """A picture to read, and by store the entry to make of it and the shard that it goes to."""

    sample: Sample
    entries: dict[str, Entry] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        return Job(self.sample, {name: entry.content for name, entry in self.entries.items()})


def plan_jobs(surveys: dict[str, Survey], rank: int, world_size: int) -> list[Planned]:
    """This process's jobs.

    Pictures are dealt out evenly. An entry that stands somewhere stays in its shard, whoever makes it again: there is
    never a second one. LMDB lets several processes write to a shard in turn.
    """
    planned: dict[str, Planned] = {}
    for name, state in surveys.items():
        for entry in state.work:
            picture = planned.setdefault(entry.sample.sample_id, Planned(entry.sample))
            picture.entries[name] = entry
            picture.shards[name] = rank if entry.shard is None else entry.shard
    return list(planned.values())[rank::world_size]


def build(
    surveys: dict[str, Survey],
    source: ImageSource,
    encoders: dict[str, PixelEncoder],
    *,
    geometry: Geometry,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    label: str = "pictures",
    importer: Importer | None = None,
) -> BuildResult:
    """Make every missing, stale or doubtful entry of the surveyed stores that falls to this process.

    surveys and encoders: by the name of the store, as "latents" and "tokens". Pictures are encoded in the order of the
    surveys, in batches of one size. Interrupted at any moment, what was committed stays and the next survey finds the
    rest. Raises RunFailed when the disk is full.
    """
    planned = plan_jobs(surveys, rank, world_size)
    result = BuildResult()
    if not planned:
        return result
    if device.type == "cpu":
        keep_freed_memory()
    start = time.perf_counter()
    jobs = [picture.job for picture in planned]
    writer = _Writer(surveys, planned, result)
    try:
        share = f" (process 1 of {world_size})" if world_size > 1 else ""
        with (
            doing(f"caching {label}{share}", len(planned)) as activity,
            closing(picture_batches(source, jobs, geometry, batch_size, workers, importer)) as batches,
        ):
            for batch in batches:
                writer.put(batch, _encode(batch, encoders, device))
                activity.advance(len(batch.decoded) + len(batch.settled))
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
    for name, encoder in encoders.items():
        rows = [row for row, picture in enumerate(batch.decoded) if name in picture.stores]
        if rows:
            chosen = pixels if len(rows) == len(batch.decoded) else pixels[torch.tensor(rows, device=device)]
            with torch.no_grad():
                encoded[name] = encoder.encode(chosen)
    return encoded


class _Writer:
    """The one thread that writes. Takes encoded batches from a short queue, so encoding runs on meanwhile."""

    def __init__(self, surveys: dict[str, Survey], planned: list[Planned], result: BuildResult) -> None:
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
                    store.commit_if_due()
            for store in self._stores.values():
                store.commit()
        except BaseException as error:
            self.error = error
        finally:
            for store in self._stores.values():
                store.close()

    def _store(self, name: str, shard: int) -> StoreWriter:
        store = self._stores.pop((name, shard), None)
        if store is None:
            if len(self._stores) >= MOST_OPEN:
                idle = self._stores.pop(next(iter(self._stores)))
                idle.commit()
                idle.close()
            state = self.surveys[name]
            folder = shard_folder(state.path, shard)
            store = StoreWriter(folder, state.wanted.kind, expected_bytes=state.needed_bytes)
            store.set_meta(state.wanted.meta(complete=False))
        self._stores[name, shard] = store  # the last one used is the last
        return store

    def _write(self, batch: PictureBatch, encoded: dict[str, torch.Tensor]) -> None:
        host = {name: _to_host(tensor, self.surveys[name].wanted.dtype) for name, tensor in encoded.items()}
        rows = dict.fromkeys(encoded, 0)
        for picture in batch.settled:
            self._write_picture(picture, {})
        for picture in batch.decoded:
            values = {}
            for name in picture.stores:
                entries, scales = host[name]
                values[name] = entries[rows[name]], None if scales is None else scales[rows[name]]
                rows[name] += 1
            self._write_picture(picture, values)

    def _write_picture(self, picture: Picture, values: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> None:
        """Write all entries of a picture. values: what was encoded of it, with the scale of int8 values."""
        planned, given = self.planned[picture.job], picture.imported.values
        made = False
        for name, entry in planned.entries.items():
            store, sample_id = self._store(name, planned.shards[name]), planned.sample.sample_id

            def source(fingerprint: bytes) -> bytes:
                return pack_source(picture.signature, picture.content, fingerprint)

            if name in given:
                store.put(sample_id, given[name], source(imported(entry.fingerprint)))
            elif name in values:
                value, scale = values[name]
                if np.isfinite(value if scale is None else scale).all():
                    store.put(sample_id, value, source(entry.fingerprint), scale)
                    made = True
                else:
                    self._refuse(store, planned, source(entry.fingerprint), _overflow(self.surveys[name].wanted))
            elif picture.error is not None:
                self._refuse(store, planned, source(entry.fingerprint), picture.error)
            else:
                store.put_source(sample_id, source(entry.stands or entry.fingerprint))
        self._count(picture, planned, made)

    def _refuse(self, store: StoreWriter, planned: Planned, source: bytes, reason: str) -> None:
        store.put_unreadable(planned.sample.sample_id, source, reason)
        self.result.reasons[planned.sample.sample_id] = reason

    def _count(self, picture: Picture, planned: Planned, made: bool) -> None:
        result, contents = self.result, [entry.content for entry in planned.entries.values()]
        result.encoded += made
        result.imported += bool(picture.imported.values)
        if picture.imported.refused is not None:
            result.not_imported.append(picture.imported.refused)
        if picture.error is None and not picture.stores and not picture.imported.values:
            result.unchanged += 1
        if any(content not in (None, picture.content) for content in contents):
            result.changed.append(planned.sample.sample_id)


def _overflow(wanted: Wanted) -> str:
    kind = "latents" if wanted.kind == "moments" else wanted.kind
    return f"its {kind} are not finite in precision {wanted.producer.get('precision')}; {wanted.remedy}"


def _to_host(encoded: torch.Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Entries [B, *shape] as numpy, with their scales [B, N] where the store is int8."""
    if dtype == "int8":
        values, scales = quantize_tokens(encoded)
        return values.cpu().numpy(), scales.cpu().numpy()
    return encoded.to(torch.float16).cpu().numpy(), None
