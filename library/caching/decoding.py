"""Pictures on their way from files to the encoders, read and decoded in threads."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from library.caching.geometry import Geometry
from library.caching.producers import content_hash
from library.data.pixels import UnreadableImage, decode_rgb
from library.data.sources import ImageSource, Sample
from library.freed_memory import keep_freed_memory

NO_SIGNATURE = bytes(16)
"""Of a picture that is not there."""


@dataclass(frozen=True)
class Job:
    """One picture to read. `contents` maps the name of a store to the content hash that would leave its entry as it is."""

    sample: Sample
    contents: dict[str, bytes | None]


@dataclass
class Imported:
    """Entries that another program made, by store; `refused` says why there are fewer than asked for."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    refused: str | None = None


class Importer(Protocol):
    """Looks for finished entries of a picture. Called from several threads."""

    def __call__(self, sample: Sample, stores: tuple[str, ...]) -> Imported: ...


@dataclass
class Picture:
    """What was found. `error` says why there is nothing to encode; `stores` which entries to make of it."""

    job: int
    signature: bytes
    content: bytes
    stores: tuple[str, ...]
    error: str | None = None
    imported: Imported = field(default_factory=Imported)

    @property
    def is_decoded(self) -> bool:
        return self.error is None and bool(self.stores)


@dataclass
class PictureBatch:
    """Pictures of consecutive jobs; row i of `pixels` [n, 3, H, W] uint8 belongs to decoded[i]."""

    decoded: list[Picture]
    pixels: torch.Tensor
    settled: list[Picture]


@dataclass(frozen=True)
class _Reader:
    source: ImageSource
    jobs: list[Job]
    geometry: Geometry
    importer: Importer | None

    def read(self, index: int, row: np.ndarray) -> Picture:
        """What job `index` finds; where entries are to be made of it, its pixels are in `row` [3, H, W] afterwards."""
        job = self.jobs[index]
        # The signature first: a file changed between the two reads then looks changed to the next run.
        picture = Picture(index, signature=NO_SIGNATURE, content=bytes(16), stores=())
        try:
            picture.signature = self.source.signature(job.sample)
            data = self.source.read(job.sample)
        except UnreadableImage as error:
            picture.error = str(error)
            return picture
        picture.content = content_hash(data)
        stores = tuple(name for name, known in job.contents.items() if known != picture.content)
        if stores and self.importer is not None:
            picture.imported = self.importer(job.sample, stores)
        picture.stores = tuple(name for name in stores if name not in picture.imported.values)
        if picture.stores:
            try:
                hidden = self.geometry.hidden_colours(job.sample)
                image = decode_rgb(data, name=job.sample.path, hidden_colours=hidden)
                np.copyto(row, self.geometry(job.sample, image).transpose(2, 0, 1))
            except UnreadableImage as error:
                picture.error = str(error)
        return picture


class _Begun:
    """A batch whose pictures are being read."""

    def __init__(self, reader: _Reader, indices: list[int], pool: ThreadPoolExecutor) -> None:
        width, height = reader.geometry.size(reader.jobs[indices[0]].sample)
        shape = (len(indices), 3, height, width)
        self._pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        rows = self._pixels.numpy()
        self._found = [pool.submit(reader.read, index, row) for index, row in zip(indices, rows, strict=True)]

    def __len__(self) -> int:
        return len(self._found)

    def finished(self) -> PictureBatch:
        """Waits for it."""
        found = [future.result() for future in self._found]
        rows = [row for row, picture in enumerate(found) if picture.is_decoded]
        pixels = self._pixels if len(rows) == len(found) else self._pixels[rows]
        decoded = [found[row] for row in rows]
        return PictureBatch(decoded, pixels, [picture for picture in found if not picture.is_decoded])


def _batches(jobs: list[Job], geometry: Geometry, batch_size: int) -> Iterator[list[int]]:
    """Indices of consecutive jobs whose pictures come out in one size."""
    for _, members in itertools.groupby(range(len(jobs)), lambda index: geometry.size(jobs[index].sample)):
        rest = list(members)
        yield from (rest[start : start + batch_size] for start in range(0, len(rest), batch_size))


def picture_batches(
    source: ImageSource,
    jobs: list[Job],
    geometry: Geometry,
    batch_size: int,
    workers: int,
    importer: Importer | None = None,
) -> Generator[PictureBatch]:
    """Batches of decoded pictures in the order of `jobs`, each of one size.

    workers: threads that decode; more than there are cores for would only wait for each other. Pillow and numpy work outside of
    Python's lock, and processes would have to hand over the pixels, which took longer than decoding them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(workers, cores))
    reader, coming = _Reader(source, jobs, geometry, importer), _batches(jobs, geometry, batch_size)
    keep_freed_memory()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    begun: deque[_Begun] = deque()
    try:
        while True:
            # So many that no thread waits while a batch is encoded.
            while sum(map(len, begun)) < 2 * (batch_size + threads) and (indices := next(coming, None)) is not None:
                begun.append(_Begun(reader, indices, pool))
            if not begun:
                return
            yield begun.popleft().finished()
    finally:
        pool.shutdown(cancel_futures=True)
