"""Pictures on their way from files to the encoders, read and decoded in worker processes."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.caching.producers import content_hash
from library.data.pixels import UnreadableImage, decode_rgb, square_crop
from library.data.sources import ImageSource, Sample
from library.files import close_inherited_locks


@dataclass(frozen=True)
class Job:
    """One picture to read. `contents` maps a kind of entry to make to the content hash that would leave it as it is."""

    sample: Sample
    contents: dict[str, bytes | None]


@dataclass
class Picture:
    """What a worker found. `error` says why there is nothing to encode; `kinds` which entries to make of it."""

    job: int
    signature: bytes
    content: bytes
    kinds: tuple[str, ...]
    error: str | None = None


@dataclass
class PictureBatch:
    """Pictures of consecutive jobs; row i of `pixels` [n, 3, R, R] uint8 belongs to decoded[i]."""

    decoded: list[Picture]
    pixels: torch.Tensor
    settled: list[Picture]


class _Pictures(Dataset):
    def __init__(self, source: ImageSource, jobs: list[Job], resolution: int) -> None:
        self.source, self.jobs, self.resolution = source, jobs, resolution

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[Picture, np.ndarray | None]:
        job = self.jobs[index]
        # The signature first: a file changed between the two reads then looks changed to the next run.
        signature = bytes(16)
        try:
            signature = self.source.signature(job.sample)
            data = self.source.read(job.sample)
        except UnreadableImage as error:
            return Picture(index, signature, bytes(16), (), str(error)), None
        content = content_hash(data)
        kinds = tuple(kind for kind, known in job.contents.items() if known != content)
        if not kinds:
            return Picture(index, signature, content, ()), None
        try:
            pixels = square_crop(decode_rgb(data, name=job.sample.path), self.resolution)
        except UnreadableImage as error:
            return Picture(index, signature, content, kinds, str(error)), None
        return Picture(index, signature, content, kinds), pixels


def _collate(items: list[tuple[Picture, np.ndarray | None]]) -> PictureBatch:
    decoded = [picture for picture, pixels in items if pixels is not None]
    arrays = [pixels.transpose(2, 0, 1) for _, pixels in items if pixels is not None]
    # np.stack would keep the strides of the transposed views.
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(arrays))) if arrays else torch.empty(0, dtype=torch.uint8)
    return PictureBatch(decoded, stacked, [picture for picture, pixels in items if pixels is None])


def _leave_locks(worker: int) -> None:
    """A lock lives until its last copy is closed; a worker may outlive a killed parent by seconds."""
    close_inherited_locks()


def picture_batches(source: ImageSource, jobs: list[Job], resolution: int, batch_size: int, workers: int) -> DataLoader:
    """Batches of decoded pictures in the order of `jobs`."""
    return DataLoader(
        _Pictures(source, jobs, resolution),
        batch_size=batch_size,
        collate_fn=_collate,
        num_workers=workers,
        # Forked workers start at once; they only read files and use Pillow and numpy.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_locks,
    )
