"""What a step of train_network.py sees: latents of one bucket with their captions, sizes, masks and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from library.data.batches import AlignedBatch
from library.data.bucket_order import BucketOrder, Group, MicroBatch
from library.data.buckets import Fitted, Size
from library.data.captions import make_caption, sample_random
from library.data.dataset_schema import Dataset, Subset
from library.data.store import TensorStore
from library.data.training_images import TrainingImage

FLIP_CHANCE = 0.5

MaskReader = Callable[[TrainingImage, Fitted, bool], np.ndarray]
"""(image, where it was cut, mirrored or not) -> mask float32 [h, w] of its latents."""


@dataclass(frozen=True)
class TrainedImage:
    """A picture, where it was cut for its bucket, and how much its loss counts."""

    image: TrainingImage
    dataset: Dataset
    fitted: Fitted
    repeats: int = 1
    """Showings in an epoch."""
    loss_weight: float = 1.0
    """prior_loss_weight for regularisation pictures."""

    @property
    def has_mask(self) -> bool:
        return self.image.mask is not None or self.image.subset.alpha_mask


class Request(NamedTuple):
    """One micro-batch of one process, and its place in the run, from which everything random about it follows."""

    step: int
    epoch: int
    micro: MicroBatch
    share: float
    """Of the step's mean over its pictures and all processes that the mean over this batch is."""


@dataclass
class NetworkBatch(AlignedBatch):
    """Pictures of one bucket. Rows with weight 0 fill the shape and count for nothing."""

    moments: torch.Tensor
    """[B, 8, h, w] float16: posterior mean and log-variance of the latents, unscaled."""
    sizes: torch.Tensor
    """[B, 6] float32: original height and width, crop top and left, target height and width."""
    real: torch.Tensor
    """[B] float32: 1 for pictures, 0 for fillers."""
    weights: torch.Tensor
    """[B] float32: `real` times what each picture's loss counts."""
    multipliers: float
    """network_multiplier of the data set."""
    captions: list[str]
    flipped: np.ndarray
    """[B] bool"""
    ids: torch.Tensor | None = None
    """[B, encoders, chunks, 77] int64, where text encoders run in the step."""
    states: torch.Tensor | None = None
    """[B, T, D] float16, where they do not."""
    pooled: torch.Tensor | None = None
    """[B, P] float16, likewise, of SDXL."""
    mask: torch.Tensor | None = None
    """[B, 1, h, w] float32; None where no picture of the batch has one."""
    preserve: torch.Tensor | None = None
    """[B] bool: pictures whose target is what the base says (diff_output_preservation); None where there is none."""
    token_grid: tuple[int, int] | None = None
    """Rows and columns of the teacher's tokens, where there are any."""


class ByBucket(Protocol):
    """Stores of what is kept of pictures and of their mirror images, by bucket; `library.caching.by_bucket.BucketCaches`."""

    stores: dict[Size, TensorStore]
    flipped: dict[Size, TensorStore]


class Prompts(Protocol):
    """What text encoders made of captions, kept; `library.caching.prompts.PromptCache`."""

    states: TensorStore
    pooled: TensorStore | None

    def rows(self, captions: Sequence[str]) -> np.ndarray: ...

    def read_into(self, rows: np.ndarray, states: np.ndarray, pooled: np.ndarray | None) -> None: ...


class NetworkSamples:
    """Pictures of several data sets and buckets, whose latents lie in LMDB stores by bucket, and a teacher's tokens may."""

    def __init__(
        self,
        images: Sequence[TrainedImage],
        latents: ByBucket,
        tokens: ByBucket | None = None,
        *,
        seed: int,
        last_step: int,
        tokenize: Callable[[Sequence[str]], torch.Tensor] | None = None,
        prompts: Prompts | None = None,
        read_mask: MaskReader | None = None,
        frozen_captions: bool = False,
    ) -> None:
        """Of tokenize (captions -> ids [encoders, B, chunks, 77]) and prompts, one.

        frozen_captions: as they are, without shuffling and dropout; pictures are not mirrored either.
        """
        self.images, self.seed, self.last_step = list(images), seed, last_step
        self._latents, self._tokens = latents, tokens
        self._tokenize, self._prompts, self._read_mask = tokenize, prompts, read_mask
        self._frozen = frozen_captions
        self._settings = (
            {id(one.image.subset): _as_written(one.image.subset) for one in images} if frozen_captions else {}
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sample_ids(self) -> list[str]:
        return [one.image.sample_id for one in self.images]

    def empty_batch(self, request: Request, pin: bool) -> NetworkBatch:
        count, (width, height) = len(request.micro.indices), self._bucket(request)
        side = (height // 8, width // 8)

        def allocate(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((count, *shape), dtype=dtype, pin_memory=pin)

        batch = NetworkBatch(
            indices=request.micro.indices,
            moments=allocate(8, *side, dtype=torch.float16),
            sizes=allocate(6, dtype=torch.float32),
            real=torch.from_numpy(request.micro.weights),
            weights=allocate(dtype=torch.float32),
            multipliers=1.0,
            captions=[],
            flipped=np.zeros(count, bool),
        )
        if self._prompts is not None:
            batch.states = allocate(*self._prompts.states.meta.shape, dtype=torch.float16)
            if self._prompts.pooled is not None:
                batch.pooled = allocate(*self._prompts.pooled.meta.shape, dtype=torch.float16)
        if self._tokens is not None:
            store = self._tokens.stores[width, height]
            batch.allocate_tokens(store, pin)
            batch.token_grid = _grid_of(store)
        return self._labelled(batch, request)

    def relabel(self, batch: NetworkBatch, request: Request) -> NetworkBatch | None:
        width, height = self._bucket(request)
        if len(batch) != len(request.micro.indices) or batch.moments.shape[-2:] != (height // 8, width // 8):
            return None
        return self._labelled(replace(batch), request)

    def _labelled(self, batch: NetworkBatch, request: Request) -> NetworkBatch:
        """Everything of a batch that costs little, drawn by (seed, epoch, picture, repeat)."""
        chosen = [self.images[i] for i in request.micro.indices]
        showings = list(zip(chosen, request.micro.repeats.tolist(), strict=True))
        batch.indices = request.micro.indices
        batch.share = request.share
        batch.multipliers = chosen[0].dataset.network_multiplier
        batch.flipped = np.array([self._is_flipped(one, request.epoch, repeat) for one, repeat in showings])
        batch.captions = [self._caption(one, request, repeat) for one, repeat in showings]
        batch.real = torch.from_numpy(request.micro.weights)
        batch.weights = batch.real * torch.tensor([one.loss_weight for one in chosen])
        batch.sizes = torch.tensor(
            [one.fitted.conditioning(bool(flip)).time_ids for one, flip in zip(chosen, batch.flipped, strict=True)],
            dtype=torch.float32,
        )
        preserved = [bool(one.image.subset.custom_attributes.get("diff_output_preservation")) for one in chosen]
        batch.preserve = torch.tensor(preserved) if any(preserved) else None
        if self._tokenize is not None:
            batch.ids = self._tokenize(batch.captions).transpose(0, 1).contiguous()
        masked = self._read_mask is not None and any(one.has_mask for one in chosen)
        batch.mask = torch.ones((len(chosen), 1, *batch.moments.shape[-2:])) if masked else None
        return batch

    def fill(self, batch: NetworkBatch, part: slice) -> None:
        rows = range(len(batch))[part]
        moments = batch.moments.numpy()
        for row in rows:
            one = self.images[batch.indices[row]]
            sample_id, place, flipped = one.image.sample_id, slice(row, row + 1), bool(batch.flipped[row])
            self._store(self._latents, one, flipped).read_into([sample_id], moments[place])
            if self._tokens is not None:
                batch.read_tokens(self._store(self._tokens, one, flipped), [sample_id], place)
            if batch.mask is not None and self._read_mask is not None and one.has_mask:
                mask = self._read_mask(one.image, one.fitted, flipped)
                batch.mask[row, 0] = torch.from_numpy(mask)
        if self._prompts is not None and batch.states is not None and len(rows):
            pooled = None if batch.pooled is None else batch.pooled.numpy()[part]
            self._prompts.read_into(self._prompts.rows(batch.captions[part]), batch.states.numpy()[part], pooled)

    @staticmethod
    def _store(caches: ByBucket, one: TrainedImage, flipped: bool) -> TensorStore:
        return (caches.flipped if flipped else caches.stores)[one.fitted.bucket]

    def _bucket(self, request: Request) -> Size:
        return self.images[request.micro.indices[0]].fitted.bucket

    def _is_flipped(self, one: TrainedImage, epoch: int, repeat: int) -> bool:
        if self._frozen or not one.image.subset.flip_aug:
            return False
        return sample_random(self.seed, epoch, one.image.sample_id, repeat, "flip").random() < FLIP_CHANCE

    def _caption(self, one: TrainedImage, request: Request, repeat: int) -> str:
        subset = one.image.subset
        return make_caption(
            one.image.caption,
            self._settings.get(id(subset), subset),
            seed=self.seed,
            epoch=request.epoch,
            sample_id=one.image.sample_id,
            step=request.step,
            repeat=repeat,
            last_step=self.last_step,
        )


def _grid_of(store: TensorStore) -> tuple[int, int]:
    """Rows and columns of its tokens, as `library.caching.tokens` notes them."""
    rows, columns = store.meta.producer["grid"]
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


def groups_of(images: Sequence[TrainedImage]) -> list[Group]:
    """Pictures that may stand in one batch: of one data set and one bucket, each as often as it is shown."""
    members: dict[tuple[int, Size], list[int]] = {}
    datasets: dict[int, Dataset] = {}
    for index, one in enumerate(images):
        key = (id(one.dataset), one.fitted.bucket)
        datasets[id(one.dataset)] = one.dataset
        members.setdefault(key, []).extend([index] * one.repeats)
    return [
        Group(np.array(indices, np.int64), datasets[dataset].batch_size) for (dataset, _), indices in members.items()
    ]


def requests(order: BucketOrder, step: int) -> Iterator[Request]:
    """The micro-batches of this process from optimizer step `step` on, without end."""
    for one in order.from_step(step):
        for micro in one.micro_batches:
            yield Request(one.number, one.epoch, micro, micro.real * order.world_size / one.samples)
