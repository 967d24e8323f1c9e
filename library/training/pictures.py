"""The pictures of a training and what to say of them."""

from __future__ import annotations

from library.data.class_pictures import open_pictures
from library.data.collect import TrainingData, collect, collect_classes, collect_drawn, read_datasets
from library.data.dataset_schema import Dataset
from library.data.order import Group
from library.data.teacher_latents import open_teacher_latents
from library.data.trained_image import groups_of
from library.errors import UserError
from library.models.base_family import family_of, native_side
from library.models.locate import BaseLocation
from library.options.run import RunOptions
from library.words import plural

_FRESH_PIXELS = ("color_aug", "random_crop", "face_crop_aug_range")


def collect_pictures(options: RunOptions, base: BaseLocation, world_size: int = 1) -> TrainingData:
    """Every picture of the run, in its bucket. Raises UserError for all that is wrong with them."""
    if options.cache.cache_latents is False:
        raise UserError("--no_cache_latents is not offered: latents are always cached, on the disk. Leave it out.")
    if options.teacher is not None:
        data = _drawn(options, base)
    else:
        data = class_data(options) if options.class_pictures is not None else captioned_data(options, native_side(base))
    _check_effects(options, data)
    if options.alignment.alignment and world_size == 1:  # several processes compare their pictures with each other's
        _check_pairs(options, data)
    return data


def class_data(options: RunOptions) -> TrainingData:
    assert options.class_pictures is not None and options.data.resolution is not None
    return collect_classes(
        open_pictures(options.class_pictures),
        options.class_pictures,
        side=options.data.resolution[0],
        batch_size=options.training.train_batch_size,
        validation_split=options.validation.validation_split,
        seed=options.training.seed
        if options.validation.validation_seed is None
        else options.validation.validation_seed,
    )


def _drawn(options: RunOptions, base: BaseLocation) -> TrainingData:
    assert options.teacher is not None and options.teacher.teacher_latents is not None
    latents = open_teacher_latents(options.teacher.teacher_latents)
    latents.close()
    given, own = options.dataset_defaults(), options.validation.validation_seed
    seed = options.training.seed if own is None else own
    return collect_drawn(latents, given, pixels=family_of(base).vae_factor, seed=seed)


def captioned_data(options: RunOptions, side: int) -> TrainingData:
    """side: pixels that the base was trained at, the resolution where nothing says another."""

    def refuse(dataset: Dataset) -> str | None:
        for subset in dataset.subsets:
            for name in _FRESH_PIXELS:
                if getattr(subset, name):
                    return (
                        f"{name} needs pictures encoded anew in every step, and latents are always cached here ({subset.place}). "
                        "Leave it out; several subsets of crops made beforehand do the same."
                    )
            if subset.conditioning_data_dir is not None and not options.objective.masked_loss:
                return f"conditioning_data_dir has masks, which need --masked_loss ({subset.place})."
        return None

    return collect(
        read_datasets(options, side),
        missing_caption=options.data.missing_caption,
        prior_loss_weight=options.objective.prior_loss_weight,
        seed=options.training.seed,
        refuse=refuse,
    )


def _check_pairs(options: RunOptions, data: TrainingData) -> None:
    """Note how many batches give manifold_mode sample nothing to compare. Raises UserError where it is all of them."""
    alignment = options.alignment
    if alignment.manifold_mode != "sample" or alignment.manifold_weight == 0:
        return
    groups = groups_of(data.training)
    batches = sum(group.batches for group in groups)
    alone = sum(batches_of_one(group) for group in groups)
    if alone == batches:
        raise UserError(
            "manifold_mode sample compares the pictures of a batch, and no batch has two. Use manifold_mode token, or "
            "manifold_weight 0, or a larger train_batch_size."
        )
    if alone:
        data.notes.append(
            f"{alone} of {batches} batches of an epoch hold one picture: manifold_mode sample has nothing to compare there, "
            "manifold_mode token has"
        )


def batches_of_one(group: Group) -> int:
    """How many batches of an epoch hold one picture."""
    if group.batch_size == 1:
        return group.batches
    return int(len(group.indices) % group.batch_size == 1)


def _check_effects(options: RunOptions, data: TrainingData) -> None:
    """What would have no effect on these pictures. Raises UserError."""
    masked = any(picture.has_mask for picture in data.training)
    for name in ("masked_loss", "masked_loss_renormalize"):
        if getattr(options.objective, name) and not masked:
            raise UserError(
                f"{name} needs masks, and no data set has any. Give one conditioning_data_dir or alpha_mask."
            )
    if options.objective.prior_loss_weight != 1 and not any(picture.image.subset.is_reg for picture in data.training):
        raise UserError("prior_loss_weight has no effect: no subset is of regularisation pictures (is_reg).")
    if data.validation:
        return
    for group in (options.validation, options.output):
        for name in ("validate_every_n_epochs", "validate_every_n_steps", "max_validation_steps", "early_stop"):
            if getattr(group, name, None) not in (None, getattr(type(group), name, None)):
                raise UserError(
                    f"{name} has no effect: no picture is held out. Give validation_split, or more pictures."
                )


def print_data(data: TrainingData) -> None:
    """Buckets of each dataset or sets of class pictures, what was left out and why, and what else a user should hear."""
    if data.classes is not None:
        for pictures in data.classes.sets:
            print(f"{pictures.name}: {pictures.source.describe()}, {len(pictures.samples)} used")
    else:
        for dataset, table in zip(data.datasets, data.tables, strict=True):
            print(f"dataset {dataset.name}, batch size {dataset.batch_size}")
            print(table)
    if data.validation and (data.classes is None or data.classes.val is None):
        print(f"{plural(len(data.validation), 'picture is', 'pictures are')} held out for validation")
    if data.dropped:
        print(f"{plural(len(data.dropped), 'picture is', 'pictures are')} left out:")
        for path, reason in list(data.dropped.items())[:10]:
            print(f"  {path}: {reason}")
    for note in data.notes:
        print(note)
