"""What steps and validations of a run see: its pictures with their caches, masks, and the noise that they were drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from library.caching.masks import alpha_channel, latent_mask
from library.data.buckets import Fitted, Size
from library.data.cached_samples import CachedSamples, NoiseReader
from library.data.trained_image import TrainedImage
from library.data.training_images import TrainingImage
from library.inference.sampler_noise import initial_noise
from library.options.run import RunOptions
from library.training.caches import Prepared, Stores
from library.training.plan import Plan
from library.training.text import Text

MOST_BESIDE = 2048
"""Training pictures that are validated beside the held-out ones: their mean loss is known to about 2 % then."""


def make_samples(
    options: RunOptions, prepared: Prepared, text: Text, plan: Plan
) -> tuple[CachedSamples, dict[str, CachedSamples]]:
    """The training pictures; the held-out ones, and beside them as many of those that are trained, up to MOST_BESIDE."""
    data, classes = prepared.data, prepared.data.classes is not None

    def make(images: Sequence[TrainedImage], stores: Stores, *, frozen: bool, alike: bool) -> CachedSamples:
        return CachedSamples(
            images,
            stores.latents,
            stores.tokens,
            text,
            seed=options.training.seed,
            last_step=plan.last_step,
            read_mask=mask_of,
            read_noise=noise_reader(options, prepared),
            frozen_captions=frozen,
            alike=alike,
        )

    # Of class pictures every step is full. A validation of several processes may end in a batch that not all have.
    training = make(data.training, prepared.training, frozen=False, alike=classes)
    if not data.validation:
        return training, {}
    own = [picture for picture in data.training if not picture.image.subset.is_reg]
    beside = [own[i] for i in evenly_spread(len(own), min(len(data.validation), MOST_BESIDE))]
    alike = classes and plan.world_size == 1
    return training, {
        "loss": make(data.validation, prepared.validation, frozen=True, alike=alike),
        "train_loss": make(beside, prepared.training, frozen=True, alike=alike),
    }


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` places among `count`, at even distances."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


def noise_reader(options: RunOptions, prepared: Prepared) -> NoiseReader | None:
    """Where the run learns the way from the noise that its latents were drawn from; None for other runs."""
    drawn = prepared.data.drawn
    if drawn is None or options.teacher is None or options.teacher.flow_target != "reflow":
        return None

    def read(picture: TrainedImage, shape: tuple[int, ...]) -> Tensor:
        return initial_noise(drawn[picture.image.sample_id].seed, shape)[0]

    return read


def mask_of(image: TrainingImage, fitted: Fitted, size: Size, flipped: bool) -> np.ndarray:
    """How much each latent of a masked picture counts, float32 [h, w]."""
    return latent_mask(alpha_channel(image.path) if image.mask is None else image.mask, fitted, size, flipped)
