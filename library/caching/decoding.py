"""Pictures on their way from files to the encoders, read and decoded in worker processes."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.caching.geometry import Geometry
from library.caching.producers import content_hash
from library.data.pixels import UnreadableImage, decode_rgb
from library.data.sources import ImageSource, Sample
from library.files import close_inherited_locks

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
    """Looks for finished entries of a picture. Goes to worker processes."""

    def __call__(self, sample: Sample, stores: tuple[str, ...]) -> Imported: ...


@dataclass
class Picture:
    """What a worker found. `error` says why there is nothing to encode; `stores` which entries to make of it."""

    job: int
    signature: bytes
    content: bytes
    stores: tuple[str, ...]
    error: str | None = None
    imported: Imported = field(default_factory=Imported)


@dataclass
class PictureBatch:
    """Pictures of consecutive jobs; row i of `pixels` [n, 3, H, W] uint8 belongs to decoded[i]."""

    decoded: list[Picture]
    pixels: torch.Tensor
    settled: list[Picture]


class _Pictures(Dataset):
    def __init__(self, source: ImageSource, jobs: list[Job], geometry: Geometry, importer: Importer | None) -> None:
        self.source, self.jobs, self.geometry, self.importer = source, jobs, geometry, importer

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[Picture, np.ndarray | None]:
        job = self.jobs[index]
        # The signature first: a file changed between the two reads then looks changed to the next run.
        picture = Picture(index, signature=NO_SIGNATURE, content=bytes(16), stores=())
        try:
            picture.signature = self.source.signature(job.sample)
            data = self.source.read(job.sample)
        except UnreadableImage as error:
            picture.error = str(error)
            return picture, None
        picture.content = content_hash(data)
        stores = tuple(name for name, known in job.contents.items() if known != picture.content)
        if stores and self.importer is not None:
            picture.imported = self.importer(job.sample, stores)
        picture.stores = tuple(name for name in stores if name not in picture.imported.values)
        if not picture.stores:
            return picture, None
        try:
            hidden = self.geometry.hidden_colours(job.sample)
            image = decode_rgb(data, name=job.sample.path, hidden_colours=hidden)
            return picture, self.geometry(job.sample, image)
        except UnreadableImage as error:
            picture.error = str(error)
            return picture, None


def _collate(items: list[tuple[Picture, np.ndarray | None]]) -> PictureBatch:
    decoded = [picture for picture, pixels in items if pixels is not None]
    arrays = [pixels.transpose(2, 0, 1) for _, pixels in items if pixels is not None]
    # np.stack would keep the strides of the transposed views.
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(arrays))) if arrays else torch.empty(0, dtype=torch.uint8)
    return PictureBatch(decoded, stacked, [picture for picture, pixels in items if pixels is None])


def _leave_locks(worker: int) -> None:
    """A lock lives until its last copy is closed; a worker may outlive a killed parent by seconds."""
    close_inherited_locks()


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
) -> DataLoader:
    """Batches of decoded pictures in the order of `jobs`, each of one size.

    workers: processes that decode; more than there are cores for would only wait for each other.
    """
    workers = min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return DataLoader(
        _Pictures(source, jobs, geometry, importer),
        batch_sampler=list(_batches(jobs, geometry, batch_size)),
        collate_fn=_collate,
        num_workers=workers,
        # Forked workers start at once; they only read files and use Pillow and numpy.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_locks,
    )
