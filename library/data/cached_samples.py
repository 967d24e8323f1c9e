"""What a training step sees: latents of one bucket with their captions, sizes, masks and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch

from library.data.batches import AlignedBatch
from library.data.buckets import Fitted, Size
from library.data.captions import make_caption, sample_random
from library.data.dataset_schema import Subset
from library.data.order import BatchOrder, MicroBatch
from library.data.store import TensorStore
from library.data.trained_image import TrainedImage
from library.data.training_images import TrainingImage

FLIP_CHANCE = 0.5

NoiseReader = Callable[[TrainedImage, tuple[int, ...]], torch.Tensor]
"""(picture, shape of its latents) -> the noise that they were drawn from, float32."""
MaskReader = Callable[[TrainingImage, Fitted, Size, bool], np.ndarray]
"""(image, where it was cut, rows and columns of its latents, mirrored or not) -> their mask float32 [h, w]."""


class Request(NamedTuple):
    """One micro-batch of one process, and its place in the run, from which everything random about it follows."""

    step: int
    epoch: int
    micro: MicroBatch
    share: float
    """Of the step's mean over its pictures and all processes that the mean over this batch is."""


@dataclass
class Batch(AlignedBatch):
    """Pictures of one bucket. Rows with weight 0 fill the shape and count for nothing."""

    latents: torch.Tensor
    """float16, as stored: [B, C, h, w], scaled, or the posterior's moments [B, 2C, h, w], unscaled."""
    sizes: torch.Tensor
    """[B, 6] float32: original height and width, crop top and left, target height and width."""
    captions: list[str]
    flipped: np.ndarray
    """[B] bool"""
    multiplier: float = 1.0
    """network_multiplier of the data set."""
    real: torch.Tensor | None = None
    """[B] float32: 1 for pictures, 0 for fillers; None where every row is a picture that counts 1."""
    weights: torch.Tensor | None = None
    """[B] float32: `real` times what each picture's loss counts; None likewise."""
    ids: torch.Tensor | None = None
    """[B, encoders, chunks, 77] int64, where text encoders run in the step."""
    states: torch.Tensor | None = None
    """[B, T, D] float16, where their outputs are cached."""
    pooled: torch.Tensor | None = None
    """[B, P] float16, likewise, of SDXL."""
    text_rows: torch.Tensor | None = None
    """[B] int64, rows of a table of prompts, of class pictures."""
    noise: torch.Tensor | None = None
    """[B, C, h, w] float32: what the latents were drawn from, where that is trained on."""
    mask: torch.Tensor | None = None
    """[B, 1, h, w] float32; None where no picture of the batch has one."""
    preserve: torch.Tensor | None = None
    """[B] bool: pictures whose target is what the base says (diff_output_preservation); None where there is none."""
    token_grid: tuple[int, int] | None = None
    """Rows and columns of the teachers' tokens, where there are any: token_grid is the same for all."""
    sharing: int = 1
    """Processes that have pictures in this turn."""
    turn_share: float = 1.0
    """By what a loss of all processes' pictures together is multiplied to count like the losses of this batch's."""


class ByBucket(Protocol):
    """Stores of what is kept of pictures and of their mirror images, by bucket; `library.caching.by_bucket.BucketCaches`."""

    stores: dict[Size, TensorStore]
    flipped: dict[Size, TensorStore]


class Captions(Protocol):
    """How captions get into a batch: as ids, as cached embeddings, as rows of a table; see `library.training.text`."""

    def allocate(self, batch: Batch, pin: bool) -> None:
        """Make room for tensors that `read` fills."""
        ...

    def label(self, batch: Batch, images: Sequence[TrainedImage]) -> None:
        """Set what costs little. images: the pictures of the rows; `batch.captions` is set."""
        ...

    def read(self, batch: Batch, part: slice) -> None:
        """Fill rows `part`. Called from several threads at once, for other rows."""
        ...


class CachedSamples:
    """Pictures of several data sets and buckets, whose latents lie in LMDB stores by bucket, and a teacher's tokens may."""

    def __init__(
        self,
        images: Sequence[TrainedImage],
        latents: ByBucket,
        tokens: Mapping[str, ByBucket],
        captions: Captions,
        *,
        seed: int,
        last_step: int,
        read_mask: MaskReader | None = None,
        read_noise: NoiseReader | None = None,
        frozen_captions: bool = False,
        alike: bool = False,
    ) -> None:
        """tokens: by teacher. frozen_captions: as they are, without shuffling and dropout; pictures are not mirrored either.

        alike: every row of every batch is a picture and counts 1, so that batches need no weights.
        """
        self.images, self.seed, self.last_step, self.alike = list(images), seed, last_step, alike
        self._latents, self._tokens, self._captions, self._read_mask = latents, tokens, captions, read_mask
        self._frozen, self._read_noise = frozen_captions, read_noise
        subsets = {id(picture.image.subset): picture.image.subset for picture in images} if frozen_captions else {}
        self._settings = {key: _as_written(subset) for key, subset in subsets.items()}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sample_ids(self) -> list[str]:
        return [picture.image.sample_id for picture in self.images]

    def ids_of(self, batch: Batch) -> list[str]:
        return [self.images[i].image.sample_id for i in batch.indices]

    def empty_batch(self, request: Request, pin: bool) -> Batch:
        count, bucket = len(request.micro.indices), self._bucket(request)
        meta = self._latents.stores[bucket].meta
        batch = Batch(
            indices=request.micro.indices,
            latents=torch.empty((count, *meta.shape), dtype=getattr(torch, meta.dtype), pin_memory=pin),
            sizes=torch.empty((count, 6), pin_memory=pin),
            captions=[],
            flipped=np.zeros(count, bool),
        )
        self._captions.allocate(batch, pin)
        if self._read_noise is not None:
            batch.noise = torch.empty(batch.latents.shape, pin_memory=pin)
        for teacher, caches in self._tokens.items():
            batch.allocate_tokens(teacher, caches.stores[bucket], pin)
            batch.token_grid = _grid_of(caches.stores[bucket])
        return self._labelled(batch, request)

    def relabel(self, batch: Batch, request: Request) -> Batch | None:
        shape = self._latents.stores[self._bucket(request)].meta.shape
        if len(batch) != len(request.micro.indices) or tuple(batch.latents.shape[1:]) != tuple(shape):
            return None
        return self._labelled(replace(batch), request)

    def _labelled(self, batch: Batch, request: Request) -> Batch:
        """Everything of a batch that costs little, drawn by (seed, epoch, picture, repeat)."""
        micro = request.micro
        chosen = [self.images[i] for i in micro.indices]
        showings = list(zip(chosen, micro.repeats.tolist(), strict=True))
        batch.indices = micro.indices
        batch.share = request.share
        batch.sharing = micro.sharing
        batch.turn_share = micro.together / (micro.sharing * micro.real) if micro.real else 1.0
        batch.multiplier = chosen[0].dataset.network_multiplier
        batch.flipped = np.array([self._is_flipped(picture, request.epoch, repeat) for picture, repeat in showings])
        batch.captions = [self._caption(picture, request, repeat) for picture, repeat in showings]
        self._captions.label(batch, chosen)
        if not self.alike:
            batch.real = torch.from_numpy(micro.weights)
            batch.weights = batch.real * torch.tensor([picture.loss_weight for picture in chosen])
        batch.sizes = torch.tensor(
            [
                picture.fitted.conditioning(bool(flip)).time_ids
                for picture, flip in zip(chosen, batch.flipped, strict=True)
            ],
            dtype=torch.float32,
        )
        preserved = [bool(picture.image.subset.custom_attributes.get("diff_output_preservation")) for picture in chosen]
        batch.preserve = torch.tensor(preserved) if any(preserved) else None
        masked = self._read_mask is not None and any(picture.has_mask for picture in chosen)
        batch.mask = torch.ones((len(chosen), 1, *batch.latents.shape[-2:])) if masked else None
        return batch

    def fill(self, batch: Batch, part: slice) -> None:
        latents = batch.latents.numpy()
        for rows in _runs(batch.flipped, range(len(batch))[part]):
            flipped, pictures = bool(batch.flipped[rows.start]), [self.images[i] for i in batch.indices[rows]]
            ids = [picture.image.sample_id for picture in pictures]
            self._store(self._latents, pictures[0], flipped).read_into(ids, latents[rows])
            for teacher, caches in self._tokens.items():
                batch.read_tokens(teacher, self._store(caches, pictures[0], flipped), ids, rows)
            if batch.mask is not None and self._read_mask is not None:
                for row, picture in enumerate(pictures, rows.start):
                    if picture.has_mask:
                        rows_columns = batch.mask.shape[-2], batch.mask.shape[-1]
                        mask = self._read_mask(picture.image, picture.fitted, rows_columns, flipped)
                        batch.mask[row, 0] = torch.from_numpy(mask)
        if batch.noise is not None and self._read_noise is not None:
            for row in range(len(batch))[part]:
                batch.noise[row] = self._read_noise(self.images[batch.indices[row]], tuple(batch.noise.shape[1:]))
        self._captions.read(batch, part)

    def read(self, request: Request) -> Batch:
        """A batch at once, without a Prefetcher."""
        batch = self.empty_batch(request, pin=False)
        self.fill(batch, slice(0, len(batch)))
        return batch

    @staticmethod
    def _store(caches: ByBucket, picture: TrainedImage, flipped: bool) -> TensorStore:
        return (caches.flipped if flipped else caches.stores)[picture.fitted.bucket]

    def _bucket(self, request: Request) -> Size:
        return self.images[request.micro.indices[0]].fitted.bucket

    def _is_flipped(self, picture: TrainedImage, epoch: int, repeat: int) -> bool:
        if self._frozen or not picture.image.subset.flip_aug:
            return False
        return sample_random(self.seed, epoch, picture.image.sample_id, repeat, "flip").random() < FLIP_CHANCE

    def _caption(self, picture: TrainedImage, request: Request, repeat: int) -> str:
        if picture.class_id is not None:
            return picture.image.caption
        subset = picture.image.subset
        return make_caption(
            picture.image.caption,
            self._settings.get(id(subset), subset),
            seed=self.seed,
            epoch=request.epoch,
            sample_id=picture.image.sample_id,
            step=request.step,
            repeat=repeat,
            last_step=self.last_step,
        )


def _runs(flipped: np.ndarray, rows: range) -> Iterator[slice]:
    """Slices of neighbouring rows that are mirrored alike."""
    start = rows.start
    for row in range(rows.start + 1, rows.stop + 1):
        if row == rows.stop or flipped[row] != flipped[start]:
            yield slice(start, row)
            start = row


def _grid_of(store: TensorStore) -> tuple[int, int]:
    """Rows and columns of its tokens, as `library.caching.tokens` notes them; a square where nothing is noted."""
    side = math.isqrt(store.meta.shape[0])
    rows, columns = store.meta.producer.get("grid", (side, side))
    return rows, columns


def _as_written(subset: Subset) -> Subset:
    """The subset without anything that changes its captions from showing to showing."""
    return replace(
        subset,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
    )


def requests_in_order(
    samples: CachedSamples,
    rank: int = 0,
    world_size: int = 1,
    most: int | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[Request]:
    """Every picture once, in order, in batches of one bucket and of the size that its data set asks for.

    Processes take the batches by turns, as in training: one that has none repeats another's with no real pictures in it.
    most: batches of all processes. indices: of the pictures to take; default all.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(samples)) if indices is None else indices:
        picture = samples.images[index]
        by_shape.setdefault((id(picture.dataset), *picture.fitted.bucket), []).append(index)
    batches = []
    for members in by_shape.values():
        remaining = iter(members)
        while chunk := list(islice(remaining, samples.images[members[0]].dataset.batch_size)):
            batches.append(np.array(chunk, np.int64))
    batches = batches[:most]
    for start in range(0, len(batches), world_size):
        together = batches[start : start + world_size]
        idle = rank >= len(together)
        chosen = together[0 if idle else rank]
        everyone = sum(len(part) for part in together)
        micro = MicroBatch(0, chosen, np.zeros_like(chosen), 0 if idle else len(chosen), everyone, len(together))
        yield Request(0, 0, micro, 1.0)


def requests(order: BatchOrder, step: int) -> Iterator[Request]:
    """The micro-batches of this process from optimizer step `step` on, without end."""
    for of_step in order.from_step(step):
        for micro in of_step.micro_batches:
            yield Request(of_step.number, of_step.epoch, micro, micro.real * order.world_size / of_step.samples)
