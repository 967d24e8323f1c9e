"""What a study knows of its pictures and its base: fingerprints, batches, and which pictures its trials are judged by."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.models.locate import locate_base
from library.search.held_out_pictures import EVALUATION_SEED, FEWEST, held_out_count, share_to_hold_out
from library.search.messages import OWN

if TYPE_CHECKING:
    from library.data.dataset_schema import Dataset
    from library.data.network_data import NetworkData
    from library.data.training_images import TrainingImage
    from library.options.network import TrainNetworkOptions
    from library.options.repa import TrainRepaOptions

SPLIT, SPLIT_SEED = "validation_split", "validation_seed"


@dataclass(frozen=True)
class StudyData:
    """
    Attributes:
        pictures: fingerprint of names, sizes of files and captions, so that it is the same on another machine.
        settings: fingerprint of everything else that dataset files say, and of the pictures' ids, by which they are held out.
        batch: samples of a micro-batch, where a dataset file says it; None where the option does.
        split: options that hold pictures out, where nothing else does.
        notes: what a user should hear of.
    """

    pictures: str
    settings: str = ""
    batch: int | None = None
    split: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def network_data(options: Mapping[str, Any]) -> StudyData:
    """Of a study of train_network.py with these options, which are complete and have been checked.

    Raises UserError for pictures that cannot be trained on, too few of them, and datasets that hold none out and say so.
    """
    from library.data.training_images import collect_images

    datasets, data = _read(options)
    images = [sorted(collect_images(one).images, key=lambda image: image.sample_id) for one in datasets]
    digest, count = hashlib.sha256(), sum(map(len, images))
    for image in chain.from_iterable(images):
        facts = [image.path.parent.name, image.path.name, image.path.stat().st_size, str(image.caption)]
        digest.update(repr(facts).encode())
    if count < FEWEST:
        raise UserError(
            f"A study needs at least three pictures, two of them to judge its trials by, and there are {count}. Add pictures."
        )
    split: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if not data.validation:
        split, notes = _split(options, data)
    settings = _settings(datasets, images)
    return StudyData(digest.hexdigest()[:32], settings, _batch_of_files(options, datasets), split, notes)


def _read(options: Mapping[str, Any]) -> tuple[list[Dataset], NetworkData]:
    """The datasets, and their pictures as a trial splits them."""
    from library.search.to_sdxl.exported_files import options_of
    from library.training.network_plan import collect_pictures

    base = locate_base(str(options["pretrained_model_name_or_path"]))
    parsed = _seeded(options_of({name: value for name, value in options.items() if name not in OWN}, None, "The study"))
    data = collect_pictures(parsed, base)
    return data.datasets, data


def _seeded(options: TrainNetworkOptions) -> TrainNetworkOptions:
    # What is held out must not depend on the seed of the training.
    return dataclasses.replace(options, training=dataclasses.replace(options.training, seed=EVALUATION_SEED))


def _split(options: Mapping[str, Any], data: NetworkData) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options that hold some of the pictures out."""
    images: list[TrainingImage] = [one.image for one in data.training]
    given = options.get(SPLIT_SEED)
    seed = EVALUATION_SEED if given is None else int(given)
    share = share_to_hold_out(images, seed)
    split = {SPLIT: share, SPLIT_SEED: seed}
    _, again = _read({**options, **split})
    total = len({image.identity for image in images if not image.subset.is_reg})
    if not again.validation:
        raise UserError(
            f"The dataset file holds none of {total} pictures out (validation_split in it), and a study judges its trials by "
            f"pictures that they do not see. Take validation_split out of the file; {share:g} would hold {held_out_count(total)} "
            "out."
        )
    return split, (
        f"{held_out_count(total)} of {total} pictures are held out to judge trials by: validation_split {share:g}, "
        f"validation_seed {seed}",
    )


def _settings(datasets: list[Dataset], images: list[list[TrainingImage]]) -> str:
    """Of all that datasets say but where their pictures lie; ids tell that pictures are held out alike."""
    digest = hashlib.sha256()
    places = {"image_dir", "metadata_file", "conditioning_data_dir", "place", "cache_info"}
    for dataset, of_dataset in zip(datasets, images, strict=True):
        own = {name: value for name, value in vars(dataset).items() if name not in ("subsets", "notes")}
        subsets = [{k: v for k, v in vars(one).items() if k not in places} for one in dataset.subsets]
        digest.update(repr([own, subsets, [image.identity for image in of_dataset]]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _batch_of_files(options: Mapping[str, Any], datasets: list[Dataset]) -> int | None:
    """The largest batch that a dataset file gives: one that does not follow the option."""
    from library.data.network_data import read_datasets
    from library.models.family import native_side
    from library.search.to_sdxl.exported_files import options_of

    parsed = options_of({name: value for name, value in options.items() if name not in OWN}, None, "The study")
    training = dataclasses.replace(parsed.training, train_batch_size=parsed.training.train_batch_size + 1)
    base = locate_base(str(options["pretrained_model_name_or_path"]))
    others = read_datasets(dataclasses.replace(parsed, training=training), native_side(base))
    given = [one.batch_size for one, other in zip(datasets, others, strict=True) if one.batch_size == other.batch_size]
    return max(given, default=None)


def repa_data(options: TrainRepaOptions) -> StudyData:
    """Of a study of train_repa.py. Raises UserError for pictures that are not there or too few."""
    from library.caching.picture_sets import open_pictures

    pictures = open_pictures(options.data)
    digest = hashlib.sha256()
    for part in pictures.sets:
        for sample in sorted(part.samples, key=lambda one: one.sample_id):
            digest.update(repr([part.name, sample.sample_id, sample.class_id]).encode("utf-8", "surrogatepass"))
    digest.update(repr(pictures.class_names).encode("utf-8", "surrogatepass"))
    count = len(pictures.train.samples)
    if pictures.val is None and count < FEWEST:
        raise UserError(
            f"A study judges its trials by pictures that they do not see: two at least, and there are {count} in all. Add "
            "pictures, or give val_data."
        )
    return StudyData(digest.hexdigest()[:32])


def base_hash(base: str, cache_dir: Path) -> str:
    """SHA-256 of the base's U-Net; gigabytes take seconds once, and are remembered where the caches are."""
    from library.models.fingerprint import weight_fingerprint
    from networks.original_names import UNET

    return weight_fingerprint(locate_base(base), UNET, cache_dir / "weight_hashes.json")
