"""Rules from SD1.5 to SDXL about sizes: pictures, batches, length of the run. The table is in rules.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from library.data.dataset_schema import Dataset
from library.options.search import SdxlOptions
from library.search.held_out_pictures import EVALUATION_SEED
from library.search.to_sdxl.trainings import Sd15Training, SdxlTraining
from library.words import plural
from networks.families import SDXL

NATIVE_SIDE = SDXL.native_side
"""Side in pixels that SDXL was trained at."""

GRAIN = 32
"""Sides of buckets should be multiples of so many pixels: 8 for the VAE times 4 for the U-Net, which halves twice."""

LENGTH_DOUBT = (
    "weak: wider models learn and memorise earlier (arXiv 2505.17638), so the best checkpoint may be an early one"
)
_CHECKPOINTS = 10
"""Adapters that a run saves, about."""


def resolution(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    for before in sdxl.datasets:
        width, height = grown(before)
        step = "resolution {}x{} becomes {}x{}".format(*before.resolution, width, height)
        if growth(before.resolution) < 2:
            sdxl = sdxl.warn(f"{step}: doubled it would be larger than SDXL's {NATIVE_SIDE}x{NATIVE_SIDE}.")
        elif width * height < NATIVE_SIDE**2 / 2:
            sdxl = sdxl.warn(f"{step}, but SDXL draws at {NATIVE_SIDE}x{NATIVE_SIDE}: details will be coarse.")
    return sdxl.with_datasets(replace(dataset, resolution=grown(dataset)) for dataset in sdxl.datasets)


def buckets(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    datasets = []
    for before, dataset in zip(sd15.datasets, sdxl.datasets, strict=True):
        factor, steps = growth(before.resolution), dataset.bucket_reso_steps
        shorter, longer = min(dataset.resolution), max(dataset.resolution)
        if steps % GRAIN:
            steps = 2 * GRAIN if shorter >= 2 * GRAIN else GRAIN
        low, high = math.floor(dataset.min_bucket_reso * factor), math.ceil(dataset.max_bucket_reso * factor)
        # A rounded resolution may lie beyond a limit that it was equal to.
        low, high = (low, high) if dataset.bucket_no_upscale else (min(low, shorter), max(high, longer))
        datasets.append(replace(dataset, bucket_reso_steps=steps, min_bucket_reso=low, max_bucket_reso=high))
    return sdxl.with_datasets(datasets)


def growth(size: tuple[int, int]) -> float:
    """Factor of both sides: 2, or less where that would exceed SDXL's area; 1 for sizes of that area or more."""
    return max(1.0, min(2.0, NATIVE_SIDE / math.sqrt(math.prod(size))))


def grown(dataset: Dataset) -> tuple[int, int]:
    """(width, height) on SDXL, in pixels: at most SDXL's area, or the old size where that is larger."""
    factor = growth(dataset.resolution)
    steps = dataset.bucket_reso_steps
    if not dataset.enable_bucket or steps % GRAIN:
        steps = 2 * GRAIN

    def side(before: int) -> int:
        after = before * factor
        # Rounding down must not make a side smaller than it was.
        return int(after) if factor in (1, 2) else max(before, int(after / steps + 1e-9) * steps)

    width, height = dataset.resolution
    return side(width), side(height)


def small_pictures(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    for dataset, pictures in zip(sdxl.datasets, sd15.pictures, strict=True):
        area = math.prod(dataset.resolution)
        if dataset.enable_bucket and dataset.bucket_no_upscale and 0 < pictures.median_area < area / 2:
            side = round(math.sqrt(pictures.median_area))
            sdxl = sdxl.warn(
                f"bucket_no_upscale keeps pictures at their own size, half of them at {side}x{side} or less, so SDXL would be "
                f"trained at that size and not at {'{}x{}'.format(*dataset.resolution)}. Remove it from sdxl_dataset.toml, or use "
                "larger pictures."
            )
    return sdxl


def batch(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    before = sd15.options.training.gradient_accumulation_steps
    old = [dataset.batch_size for dataset in sdxl.datasets]
    batches, accumulation = split_batches(old, sd15.accumulation, wishes.max_batch)
    datasets = [replace(dataset, batch_size=size) for dataset, size in zip(sdxl.datasets, batches, strict=True)]
    if sd15.accumulation != before:
        sdxl = sdxl.warn(
            f"The datasets have other batch sizes than the study's had: {max(old)} x {before} (batch x accumulation) pictures per "
            f"step, but learning_rate was found with {sd15.reference.effective_batch}. A step therefore has "
            f"{max(batches)} x {accumulation}. Another accumulation needs another learning_rate, by the root of the ratio."
        )
    changed = batch_ratio(sd15, datasets, accumulation)
    if changed != 1:
        sdxl = sdxl.warn(
            f"The datasets have different batch sizes, which cannot be split alike: a step has {float(changed):.3g} times as many "
            "pictures as in the study, and learning rates change with the root of that."
        )
    return sdxl.with_options(gradient_accumulation_steps=accumulation).with_datasets(datasets)


def split_batches(batches: Sequence[int], accumulation: int | Fraction, most: int) -> tuple[list[int], int]:
    """Smaller batches and more accumulation steps with the same products: (batches, accumulation).

    A batch becomes at most half of what it was, and at most `most`. One batch can always be split exactly, where its product
    is whole. Several may have no common divisor that is large enough; then the products are as close as whole numbers allow.
    """
    limits = [max(1, min(most, size // 2)) for size in batches]
    exact = [Fraction(size * accumulation) for size in batches]
    products = [max(1, round(product)) for product in exact]
    common = math.gcd(*products) if products == exact else 1
    for steps in range(1, common + 1):
        fits = all(product // steps <= limit for product, limit in zip(products, limits, strict=True))
        if common % steps == 0 and fits:
            return [product // steps for product in products], steps
    steps = max(-(-product // limit) for product, limit in zip(products, limits, strict=True))
    return [max(1, round(product / steps)) for product in exact], steps


def batch_ratio(sd15: Sd15Training, datasets: Sequence[Dataset], accumulation: int) -> Fraction:
    """Pictures per step after / before, over all datasets."""
    before = sum(dataset.batch_size for dataset in sd15.datasets) * sd15.accumulation
    return sum(dataset.batch_size for dataset in datasets) * accumulation / before


def length(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    training = sd15.options.training
    name = "max_train_steps" if training.max_train_epochs is None else "max_train_epochs"
    value = getattr(training, name)
    # In whole numbers: 1.2 x 35 as floats is a little more than 42.
    return sdxl.with_options(**{name: -(-value * 6 // 5)}).warn(f"{name} {value} x 1.2 is {LENGTH_DOUBT}.")


def best_checkpoint(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    epochs = sdxl.options.get("max_train_epochs")
    unit, total = ("epochs", epochs) if epochs is not None else ("steps", sdxl.options["max_train_steps"])
    between = max(1, math.ceil(total / _CHECKPOINTS))
    sdxl = sdxl.with_options(**{f"save_every_n_{unit}": between})
    if sd15.validation_share == 0:
        sdxl = sdxl.with_datasets(replace(dataset, validation_split=0.0) for dataset in sdxl.datasets)
        every = f"every {unit[:-1]}" if between == 1 else f"every {between} {unit}"
        return sdxl.without(["validation_seed", "early_stop"]).warn(
            "There are too few pictures to hold any out, so no validation can choose the best checkpoint: compare several of "
            f"the adapters, which are saved {every}."
        )
    if sd15.validation_share is not None:
        share = sd15.validation_share
        sdxl = sdxl.with_datasets(replace(dataset, validation_split=share) for dataset in sdxl.datasets)

    def seed(given: int | None) -> int:
        """The seed by which the study held pictures out; its trainings may have another."""
        return EVALUATION_SEED if given is None else given

    sdxl = sdxl.with_datasets(
        replace(dataset, validation_seed=seed(dataset.validation_seed)) for dataset in sdxl.datasets
    )
    settled = {"validation_seed": seed(sdxl.options.get("validation_seed")), f"validate_every_n_{unit}": between}
    return sdxl.with_options(**settled)


def warm_up(sd15: Sd15Training, sdxl: SdxlTraining, wishes: SdxlOptions) -> SdxlTraining:
    total = sd15.reference.steps
    for name in ("lr_warmup_steps", "lr_decay_steps"):
        steps = getattr(sd15.options.optimizer, name)
        if steps < 1:
            continue
        if steps >= total:
            sdxl = sdxl.warn(f"{name} {steps:g} was kept, although the study's run had only {plural(total, 'step')}.")
        else:
            sdxl = sdxl.with_options(**{name: float(f"{steps / total:.4g}")})
    if sd15.options.optimizer.lr_scheduler_args:
        sdxl = sdxl.warn("lr_scheduler_args were kept. Multiply any numbers of steps in them by 1.2.")
    return sdxl
