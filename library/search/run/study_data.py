"""What a study records of its pictures and its base: fingerprints, the batch size, and which pictures are held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.models.locate import BaseLocation, locate_base
from library.options.scripts import network_options_of
from library.search.held_out_pictures import EVALUATION_SEED, held_out_count, require_enough_pictures, share_to_hold_out
from library.search.terms import DECIDED_BY_TRIALS
from library.words import plural

if TYPE_CHECKING:
    from library.data.collect import TrainingData
    from library.data.dataset_schema import Dataset
    from library.data.training_images import TrainingImage
    from library.options.network import TrainNetworkOptions
    from library.options.repa import TrainRepaOptions

SPLIT, SPLIT_SEED = "validation_split", "validation_seed"


@dataclass(frozen=True)
class StudyData:
    """The pictures of a study.

    Attributes:
        pictures: fingerprint of names, file sizes and captions, which is the same on another machine.
        settings: fingerprint of everything else in dataset files, and of the pictures' ids, by which they are held out.
        batch: samples of a micro-batch, where a dataset file gives it; None where the option does.
        split: options that hold pictures out, where the configuration does not.
        notes: messages for the user.
    """

    pictures: str
    settings: str = ""
    batch: int | None = None
    split: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def network_data(options: Mapping[str, Any]) -> StudyData:
    """The data of a study of train_network.py. options: complete and checked.

    Raises UserError for pictures that cannot be trained on, too few pictures, and dataset files that forbid to hold any out.
    """
    from library.data.training_images import collect_images

    datasets, data = _read(options)
    images = [sorted(collect_images(dataset).images, key=lambda image: image.sample_id) for dataset in datasets]
    digest = hashlib.sha256()
    for image in chain.from_iterable(images):
        facts = [image.path.parent.name, image.path.name, image.path.stat().st_size, str(image.caption)]
        digest.update(repr(facts).encode())
    require_enough_pictures(sum(map(len, images)))
    split: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if not data.validation:
        split, notes = _split(options, data)
    settings = _settings(datasets, images)
    return StudyData(digest.hexdigest()[:32], settings, _batch_of_files(options, datasets), split, notes)


def _read(options: Mapping[str, Any]) -> tuple[list[Dataset], TrainingData]:
    """The datasets, and their pictures as a trial splits them."""
    from library.training.pictures import collect_pictures

    parsed = _checked(options)
    # Which pictures are held out must not depend on the seed of the training.
    seeded = dataclasses.replace(parsed, training=dataclasses.replace(parsed.training, seed=EVALUATION_SEED))
    data = collect_pictures(seeded, _base(options))
    return data.datasets, data


def _checked(options: Mapping[str, Any]) -> TrainNetworkOptions:
    kept = {name: value for name, value in options.items() if name not in DECIDED_BY_TRIALS}
    return network_options_of(kept, "The study")


def _base(options: Mapping[str, Any]) -> BaseLocation:
    return locate_base(str(options["pretrained_model_name_or_path"]))


def _split(options: Mapping[str, Any], data: TrainingData) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options that hold some of the pictures out, and a message about them."""
    images: list[TrainingImage] = [picture.image for picture in data.training]
    given = options.get(SPLIT_SEED)
    seed = EVALUATION_SEED if given is None else int(given)
    share = share_to_hold_out(images, seed)
    split = {SPLIT: share, SPLIT_SEED: seed}
    _, with_split = _read({**options, **split})
    total = len({image.identity for image in images if not image.subset.is_reg})
    count = held_out_count(total)
    if not with_split.validation:
        raise UserError(
            f"The validation_split in the dataset file holds out none of {plural(total, 'picture')}, but a study judges its trials "
            f"by pictures that they are not trained on. Remove it from the file; {share:g} would hold out {count}."
        )
    words = f"{count} of {plural(total, 'picture')} are held out to judge trials by"
    return split, (f"{words}: validation_split {share:g}, validation_seed {seed}",)


def _settings(datasets: list[Dataset], images: list[list[TrainingImage]]) -> str:
    """Fingerprint of the datasets without the places of their pictures, and of the pictures' ids, by which they are held out."""
    digest = hashlib.sha256()
    places = {"image_dir", "metadata_file", "conditioning_data_dir", "place", "cache_info"}
    for dataset, of_dataset in zip(datasets, images, strict=True):
        own = {name: value for name, value in vars(dataset).items() if name not in ("subsets", "notes")}
        subsets = [{k: v for k, v in vars(subset).items() if k not in places} for subset in dataset.subsets]
        digest.update(repr([own, subsets, [image.identity for image in of_dataset]]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _batch_of_files(options: Mapping[str, Any], datasets: list[Dataset]) -> int | None:
    """The largest batch size, where a dataset file gives one: that does not change with the option."""
    from library.data.collect import read_datasets
    from library.models.base_family import native_side

    parsed = _checked(options)
    training = dataclasses.replace(parsed.training, train_batch_size=parsed.training.train_batch_size + 1)
    others = read_datasets(dataclasses.replace(parsed, training=training), native_side(_base(options)))
    pairs = zip(datasets, others, strict=True)
    gives = any(dataset.batch_size == other.batch_size for dataset, other in pairs)
    return max(dataset.batch_size for dataset in datasets) if gives else None


def repa_data(options: TrainRepaOptions) -> StudyData:
    """The data of a study of train_repa.py. Raises UserError for missing pictures, or too few."""
    from library.data.class_pictures import open_pictures

    pictures = open_pictures(options.classes)
    digest = hashlib.sha256()
    for part in pictures.sets:
        for sample in sorted(part.samples, key=lambda sample: sample.sample_id):
            digest.update(repr([part.name, sample.sample_id, sample.class_id]).encode("utf-8", "surrogatepass"))
    digest.update(repr(pictures.class_names).encode("utf-8", "surrogatepass"))
    if pictures.val is None:
        require_enough_pictures(len(pictures.train.samples), "Add pictures, or give val_data.")
    return StudyData(digest.hexdigest()[:32])


def base_hash(base: str, cache_dir: Path) -> str:
    """SHA-256 of the base's U-Net. It takes seconds for gigabytes, and is remembered in `cache_dir`."""
    from library.models.fingerprint import weight_fingerprint
    from networks.families import UNET

    return weight_fingerprint(locate_base(base), UNET, cache_dir)
