"""The pictures of a training: from options to datasets, pictures in buckets, and what was left out and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.buckets import Buckets, BucketTable, Fitted, UnfitImage, bucket_table
from library.data.caption_files import some
from library.data.class_pictures import IMAGENET_NAMES, Pictures, PictureSet
from library.data.dataset_config import (
    dataset_from_metadata,
    dataset_of_latents,
    datasets_from_folders,
    read_dataset_config,
)
from library.data.dataset_schema import Dataset, Subset
from library.data.demo_pictures import ensure_demo_pictures
from library.data.order import balance_regularisation
from library.data.pixels import decode_rgb
from library.data.sources import ImageSource, Sample, is_wnid
from library.data.teacher_latents import Drawn, TeacherLatents
from library.data.trained_image import TrainedImage
from library.data.training_images import (
    MissingCaption,
    TrainingImage,
    caption_endings,
    collect_images,
    held_out,
    split_validation,
)
from library.errors import UserError
from library.files import write_text
from library.options.data import ClassPictureOptions
from library.options.run import RunOptions
from library.options.toml_file import PROJECT_ROOT
from library.words import plural

if TYPE_CHECKING:
    from PIL import Image

_MISSING: dict[str, MissingCaption] = {"class_tokens": "class_tokens", "drop": "skip", "stop": "error"}


@dataclass
class TrainingData:
    datasets: list[Dataset]
    training: list[TrainedImage]
    validation: list[TrainedImage]
    tables: list[BucketTable]
    """One for each dataset, of the training pictures."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Path -> why it is not trained on."""
    notes: list[str] = field(default_factory=list)
    classes: Pictures | None = None
    """Where the pictures are of classes: their source."""
    drawn: Mapping[str, Drawn] | None = None
    """Where a teacher drew latents instead: of which prompts and seeds, by sample id."""

    @property
    def every(self) -> list[TrainedImage]:
        return [*self.training, *self.validation]

    @cached_property
    def sources(self) -> dict[str, tuple[ImageSource, Sample]]:
        """Where class pictures are read, by sample id."""
        sets = [] if self.classes is None else self.classes.sets
        return {sample.sample_id: (one.source, sample) for one in sets for sample in one.samples}

    def decoded(self, picture: TrainedImage) -> Image.Image:
        """The whole picture, upright RGB, wherever it lies. Raises UnreadableImage."""
        image = picture.image
        if self.classes is None:
            return decode_rgb(image.path, name=str(image.path), hidden_colours=image.shows_hidden_colours)
        source, sample = self.sources[image.sample_id]
        return decode_rgb(source.read(sample), name=sample.path)


def read_datasets(options: RunOptions, native_side: int) -> list[Dataset]:
    """The datasets that the options name. native_side: resolution where nothing says one, that of the base."""
    given: Mapping[str, Any] = options.dataset_defaults()
    if given.get("resolution") is None:
        given = {**given, "resolution": native_side}
    if options.uses_demo:
        return read_dataset_config(_demo_config(), given)
    if (file := options.dataset_file) is not None:
        return read_dataset_config(file, given, beside_options=options.options_beside_datasets)
    folder = options.data.train_data_dir
    assert folder is not None
    if options.data.in_json is not None:
        return dataset_from_metadata(options.data.in_json, folder, given)
    return datasets_from_folders(folder, options.data.reg_data_dir, given)


def collect(
    datasets: Sequence[Dataset],
    *,
    missing_caption: str,
    prior_loss_weight: float,
    seed: int,
    refuse: Callable[[Dataset], str | None] = lambda dataset: None,
) -> TrainingData:
    """Every picture with its caption and its bucket, split into training and validation.

    refuse: why a dataset cannot be trained on, if it cannot. Raises UserError for that, and where nothing is left.
    """
    data = TrainingData(list(datasets), [], [], [])
    pictures = []
    for dataset in datasets:
        if reason := refuse(dataset):
            raise UserError(reason)
        found = collect_images(dataset, missing_caption=_MISSING[missing_caption])
        data.dropped |= found.dropped
        data.notes += found.notes
        pictures.append(_fitted(dataset, found.images, data.dropped))
    data.notes += _without_caption([picture.image for fitted in pictures for picture in fitted])
    held = _held_out(pictures, seed)
    for dataset, fitted in zip(datasets, pictures, strict=True):
        chosen = [picture.image for picture in fitted]
        if dataset.validation_split > 0 and not any(image.sample_id in held for image in chosen):
            data.notes.append(
                f"validation_split {dataset.validation_split:g} of {plural(len(chosen), 'picture')} of {dataset.name} is none"
            )
        training = [picture for picture in fitted if picture.image.sample_id not in held]
        training = _balanced(training, prior_loss_weight, data.notes)
        data.training += training
        data.validation += [picture for picture in fitted if picture.image.sample_id in held]
        data.tables.append(
            bucket_table([picture.fitted for picture in training], [picture.repeats for picture in training])
        )
    _refuse_leaks(data)
    if not data.training:
        raise UserError(
            "No picture is left to train on: all of them are held out for validation. Lower validation_split."
        )
    return data


def collect_classes(
    pictures: Pictures, options: ClassPictureOptions, *, side: int, batch_size: int, validation_split: float, seed: int
) -> TrainingData:
    """Class pictures as squares of `side` pixels, each captioned with its class's prompt; nothing is opened.

    validation_split: share of the training pictures that is held out where there are no validation pictures.
    """
    prompts = pictures.prompts(options.prompt_template)

    def trained(of: PictureSet) -> tuple[Dataset, list[TrainedImage]]:
        subset = Subset(image_dir=Path(of.source.location), name=of.name)
        dataset = Dataset((side, side), batch_size=batch_size, subsets=(subset,), name=of.name)
        square = Fitted((side, side), (side, side), (side, side), (0, 0, side, side))
        return dataset, [
            TrainedImage(
                TrainingImage(
                    sample.sample_id,
                    Path(sample.path),
                    square.original,
                    prompts[sample.class_id],
                    "class",
                    None,
                    subset,
                ),
                dataset,
                square,
                class_id=sample.class_id,
            )
            for sample in of.samples
        ]

    dataset, training = trained(pictures.train)
    validation = [] if pictures.val is None else trained(pictures.val)[1]
    if pictures.val is None and validation_split > 0:
        held = held_out((picture.image.sample_id for picture in training), validation_split, seed)
        validation = [picture for picture in training if picture.image.sample_id in held]
        training = [picture for picture in training if picture.image.sample_id not in held]
    table = bucket_table([picture.fitted for picture in training], [picture.repeats for picture in training])
    notes = [*(note for one in pictures.sets for note in one.source.notes), _about_prompts(pictures, prompts)]
    return TrainingData([dataset], training, validation, [table], notes=notes, classes=pictures)


def collect_drawn(latents: TeacherLatents, given: Mapping[str, Any], *, pixels: int, seed: int) -> TrainingData:
    """Latents that a teacher drew, each captioned with its prompt. given: as in `read_datasets`. pixels: of a latent, along a side.

    Raises UserError where all are held out.
    """
    rows, columns = latents.store.meta.shape[1:]
    size = columns * pixels, rows * pixels
    dataset = dataset_of_latents(latents.store.path, size, given)
    (subset,) = dataset.subsets
    whole = Fitted(size, size, size, (0, 0, *size))
    pictures = [
        TrainedImage(
            TrainingImage(name, latents.store.path / name, size, one.prompt, "file", None, subset),
            dataset,
            whole,
            subset.num_repeats,
        )
        for name, one in latents.drawn.items()
    ]
    held = held_out(latents.drawn, dataset.validation_split, seed) if dataset.validation_split > 0 else set()
    training = [picture for picture in pictures if picture.image.sample_id not in held]
    if not training:
        raise UserError("No latents are left to train on: all are held out for validation. Lower validation_split.")
    table = bucket_table([picture.fitted for picture in training], [picture.repeats for picture in training])
    validation = [picture for picture in pictures if picture.image.sample_id in held]
    return TrainingData([dataset], training, validation, [table], drawn=latents.drawn)


def _about_prompts(pictures: Pictures, prompts: Mapping[int, str]) -> str:
    """The first prompts of classes; a warning where the names of classes say nothing to a text encoder."""
    said = some([f'"{prompts[class_id]}"' for class_id in sorted(prompts)])
    codes = pictures.codes
    if not codes:
        return f"prompts: {said}"
    here = os.path.relpath(IMAGENET_NAMES)
    remedy = (
        f"--class_names {IMAGENET_NAMES if here.startswith('..') else here} has the names of ImageNet's classes"
        if all(is_wnid(name) for name in codes)
        else f'Give class_names a JSON of names, such as {{"{codes[0]}": "tench"}}'
    )
    return (
        f"warning: {len(codes)} of {plural(len(prompts), 'class', 'classes')} are called by codes ({some(codes)}), which say "
        f"nothing to a text encoder. The prompts are {said}. {remedy}."
    )


def _fitted(dataset: Dataset, images: Sequence[TrainingImage], dropped: dict[str, str]) -> list[TrainedImage]:
    buckets = Buckets.of(dataset)
    fitted = []
    for image in images:
        try:
            fitted.append(TrainedImage(image, dataset, buckets.fit(*image.size), image.subset.num_repeats))
        except UnfitImage as error:
            dropped[str(image.path)] = str(error)
    if not fitted:
        raise UserError(
            f"No images left in {dataset.name}: none of {len(images)} fits a bucket (first: {next(iter(dropped.values()))})."
        )
    return fitted


def _held_out(pictures: Sequence[Sequence[TrainedImage]], seed: int) -> set[str]:
    """Sample ids of what is held out of datasets. Those with one share and seed choose together, which holds the same
    pictures out at every resolution.
    """
    together: dict[tuple[float, int], list[TrainingImage]] = {}
    for dataset, images in ((fitted[0].dataset, [picture.image for picture in fitted]) for fitted in pictures):
        own = seed if dataset.validation_seed is None else dataset.validation_seed
        together.setdefault((dataset.validation_split, own), []).extend(images)
    return {image.sample_id for key, images in together.items() for image in split_validation(images, *key)[1]}


def _without_caption(images: Sequence[TrainingImage]) -> list[str]:
    """What is trained of pictures that have no caption: a warning for class tokens and one for empty captions."""
    warnings = []
    for source in ("class_tokens", "none"):
        bare = [image for image in images if image.caption_source == source]
        if not bare:
            continue
        which = (
            f"none of {plural(len(images), 'picture')} has a caption of its own"
            if len(bare) == len(images)
            else f"{len(bare)} of {len(images)} pictures have no caption of their own ({some([str(one.path) for one in bare])})"
        )
        trained = dict.fromkeys(_with_affixes(image) for image in bare)
        said = some([f'"{text}"' if text else "an empty caption" for text in trained])
        whose = " (class tokens)" if source == "class_tokens" else ""
        warnings.append(f"warning: {which}. Trained instead: {said}{whose}. Looked for: {_looked_for(bare)}.")
    return warnings


def _with_affixes(image: TrainingImage) -> str:
    parts = (image.subset.caption_prefix, image.caption, image.subset.caption_suffix)
    return " ".join(part for part in parts if part)


def _looked_for(images: Sequence[TrainingImage]) -> str:
    """Where a caption would have been found."""
    endings = {" or ".join(caption_endings(one.subset)) for one in images if one.subset.metadata_file is None}
    files = {str(one.subset.metadata_file) for one in images if one.subset.metadata_file is not None}
    places = [f"{ending} files of the same name" for ending in sorted(endings)]
    return some([*places, *(f"captions or tags in {file}" for file in sorted(files))])


def _balanced(images: Sequence[TrainedImage], prior_loss_weight: float, notes: list[str]) -> list[TrainedImage]:
    """Regularisation pictures as often as there are training pictures, and with their own weight."""
    own = [picture for picture in images if not picture.image.subset.is_reg]
    prior = [picture for picture in images if picture.image.subset.is_reg]
    if not prior:
        return own
    if not own:
        raise UserError(
            "A dataset has regularisation pictures and no others. Give it the subset to be trained, without is_reg."
        )
    times = balance_regularisation([picture.repeats for picture in prior], sum(picture.repeats for picture in own))
    if unused := times.count(0):
        notes.append(f"{unused} of {plural(len(prior), 'regularisation picture')} not used: there are enough without")
    kept = [
        replace(picture, repeats=count, loss_weight=prior_loss_weight)
        for picture, count in zip(prior, times, strict=True)
        if count
    ]
    return [*own, *kept]


def _refuse_leaks(data: TrainingData) -> None:
    trained = {picture.image.path.resolve() for picture in data.training}
    if both := [picture.image.path for picture in data.validation if picture.image.path.resolve() in trained]:
        raise UserError(
            f"{len(both)} pictures are held out in one dataset and trained on in another (first: {both[0]}). Give both the "
            "same validation_split and the same spelling of the folder."
        )


def _demo_config() -> Path:
    """A dataset TOML of the generated pictures."""
    folder = ensure_demo_pictures(PROJECT_ROOT / "data" / "demo")
    subsets = "".join(
        f"[[datasets.subsets]]\nimage_dir = '{subfolder}'\ncaption_extension = '.txt'\n"
        for subfolder in sorted((folder / "images").iterdir())
        if subfolder.is_dir()
    )
    path = folder.with_name("demo_network.toml")
    text = f"[[datasets]]\nresolution = 128\nbatch_size = 4\nvalidation_split = 0.1\n{subsets}"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path
