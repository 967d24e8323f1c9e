"""Rules from SD1.5 to SDXL about sizes: of pictures, of batches, of the run. The table is in rules.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from library.data.dataset_schema import Dataset
from library.search.held_out_pictures import EVALUATION_SEED
from library.search.to_sdxl.trainings import Found, Recipe, SdxlOptions

NATIVE_SIDE = 1024
"""Side in pixels that SDXL was trained at."""

GRAIN = 32
"""Pixels that a side of a bucket is to be a multiple of: 8 for the VAE, 4 for the U-Net's two halvings."""

LENGTH_DOUBT = (
    "weak: wider models learn and memorise earlier (arXiv 2505.17638); the best checkpoint may well be an early one"
)
_CHECKPOINTS = 10


def resolution(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    for before in recipe.datasets:
        width, height = grown(before)
        step = "resolution {}x{} becomes {}x{}".format(*before.resolution, width, height)
        if growth(before.resolution) < 2:
            recipe = recipe.warn(f"{step}: doubled it would be more than SDXL's own {NATIVE_SIDE}x{NATIVE_SIDE}.")
        elif width * height < NATIVE_SIDE**2 / 2:
            recipe = recipe.warn(f"{step}, and SDXL draws at {NATIVE_SIDE}x{NATIVE_SIDE}: details will be coarse.")
    return recipe.with_datasets(replace(one, resolution=grown(one)) for one in recipe.datasets)


def buckets(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    datasets = []
    for before, dataset in zip(found.datasets, recipe.datasets, strict=True):
        factor, steps = growth(before.resolution), dataset.bucket_reso_steps
        shorter, longer = min(dataset.resolution), max(dataset.resolution)
        if steps % GRAIN:
            steps = 2 * GRAIN if shorter >= 2 * GRAIN else GRAIN
        low, high = math.floor(dataset.min_bucket_reso * factor), math.ceil(dataset.max_bucket_reso * factor)
        # A resolution that was rounded may have passed a limit that it touched.
        low, high = (low, high) if dataset.bucket_no_upscale else (min(low, shorter), max(high, longer))
        datasets.append(replace(dataset, bucket_reso_steps=steps, min_bucket_reso=low, max_bucket_reso=high))
    return recipe.with_datasets(datasets)


def growth(size: tuple[int, int]) -> float:
    """Factor of both sides: 2, or less where that is more than SDXL's area; 1 where the size is that already."""
    return max(1.0, min(2.0, NATIVE_SIDE / math.sqrt(math.prod(size))))


def grown(dataset: Dataset) -> tuple[int, int]:
    """(width, height) on SDXL, in pixels; never more than SDXL's area, unless it was before."""
    factor = growth(dataset.resolution)
    steps = dataset.bucket_reso_steps
    if not dataset.enable_bucket or steps % GRAIN:
        steps = 2 * GRAIN

    def side(before: int) -> int:
        after = before * factor
        # A side that lies above the last multiple stays as it is.
        return int(after) if factor in (1, 2) else max(before, int(after / steps + 1e-9) * steps)

    width, height = dataset.resolution
    return side(width), side(height)


def small_pictures(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    for dataset, pictures in zip(recipe.datasets, found.pictures, strict=True):
        area = math.prod(dataset.resolution)
        if dataset.enable_bucket and dataset.bucket_no_upscale and 0 < pictures.median_area < area / 2:
            side = round(math.sqrt(pictures.median_area))
            recipe = recipe.warn(
                f"bucket_no_upscale keeps pictures at their own size, half of them at {side}x{side} or less, and SDXL would be "
                f"trained there, not at {'{}x{}'.format(*dataset.resolution)}. Take it out of sdxl_dataset.toml, or use larger "
                "pictures."
            )
    return recipe


def batch(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    before = found.options.training.gradient_accumulation_steps
    batches, accumulation = split_batches([one.batch_size for one in recipe.datasets], before, wishes.max_batch)
    datasets = [replace(one, batch_size=size) for one, size in zip(recipe.datasets, batches, strict=True)]
    changed = batch_ratio(found, datasets, accumulation)
    if changed != 1:
        recipe = recipe.warn(
            f"Datasets of different batch sizes have no common smaller split: a step has {changed:.3g} times as many pictures as "
            "in the study, and learning rates follow with the root of that."
        )
    return recipe.with_options(gradient_accumulation_steps=accumulation).with_datasets(datasets)


def split_batches(batches: Sequence[int], accumulation: int, most: int) -> tuple[list[int], int]:
    """Smaller batches and more accumulation, such that each product stays: (batches, accumulation).

    A batch becomes half of what it was or less, and at most `most`. One batch can always be split exactly. Several may have
    no common divisor that is large enough; then products come as close as whole numbers allow.
    """
    limits = [max(1, min(most, size // 2)) for size in batches]
    products = [size * accumulation for size in batches]
    common = math.gcd(*products)
    for steps in range(1, common + 1):
        fits = all(product // steps <= limit for product, limit in zip(products, limits, strict=True))
        if common % steps == 0 and fits:
            return [product // steps for product in products], steps
    steps = max(-(-product // limit) for product, limit in zip(products, limits, strict=True))
    return [max(1, round(product / steps)) for product in products], steps


def batch_ratio(found: Found, datasets: Sequence[Dataset], accumulation: int) -> float:
    """Pictures per step after / before, over all datasets."""
    before = sum(one.batch_size for one in found.datasets) * found.options.training.gradient_accumulation_steps
    return sum(one.batch_size for one in datasets) * accumulation / before


def length(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    training = found.options.training
    name = "max_train_steps" if training.max_train_epochs is None else "max_train_epochs"
    value = getattr(training, name)
    # Whole numbers: 1.2 x 35 is a little more than 42 as floats.
    return recipe.with_options(**{name: -(-value * 6 // 5)}).warn(f"{name} {value} x 1.2 is {LENGTH_DOUBT}.")


def best_checkpoint(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    epochs = recipe.options.get("max_train_epochs")
    unit, total = ("epochs", epochs) if epochs is not None else ("steps", recipe.options["max_train_steps"])
    between = max(1, math.ceil(total / _CHECKPOINTS))
    recipe = recipe.with_options(**{f"save_every_n_{unit}": between})
    if found.validation_share == 0:
        recipe = recipe.with_datasets(replace(one, validation_split=0.0) for one in recipe.datasets)
        return recipe.without(["validation_seed", "early_stop"]).warn(
            "There are too few pictures to hold any out, so no validation can choose the best checkpoint: look at several of "
            f"the adapters saved every {between} {unit}."
        )
    if found.validation_share is not None:
        share = found.validation_share
        recipe = recipe.with_datasets(replace(one, validation_split=share) for one in recipe.datasets)
    # The study's seed of this choice, which is not that of its trainings.
    seeds = [EVALUATION_SEED if one.validation_seed is None else one.validation_seed for one in recipe.datasets]
    seeded = [replace(one, validation_seed=seed) for one, seed in zip(recipe.datasets, seeds, strict=True)]
    seed = recipe.options.get("validation_seed")
    settled = {"validation_seed": EVALUATION_SEED if seed is None else seed, f"validate_every_n_{unit}": between}
    return recipe.with_datasets(seeded).with_options(**settled)


def warm_up(found: Found, recipe: Recipe, wishes: SdxlOptions) -> Recipe:
    total = found.reference.steps
    for name in ("lr_warmup_steps", "lr_decay_steps"):
        steps = getattr(found.options.optimizer, name)
        if steps < 1:
            continue
        if steps >= total:
            recipe = recipe.warn(f"{name} {steps:g} was kept: the study's run had {total} steps in all.")
        else:
            recipe = recipe.with_options(**{name: float(f"{steps / total:.4g}")})
    if found.options.optimizer.lr_scheduler_args:
        recipe = recipe.warn("lr_scheduler_args were kept. If they count steps, multiply those by 1.2.")
    return recipe
