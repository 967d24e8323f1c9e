"""Class pictures of a run: opened, limited in number, checked against their class names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.demo_pictures import ensure_demo_pictures
from library.data.sources import FileSource, ImageSource, Sample, check_class_names, load_class_names, open_source
from library.errors import UserError
from library.options.data import ClassPictureOptions
from library.options.kohya.dataset import DEMO_DATA
from library.options.toml_file import PROJECT_ROOT

IMAGENET_NAMES = PROJECT_ROOT / "dataset_configs" / "imagenet_classes.json"
"""The names of ImageNet's 1,000 classes by their WordNet id, as torchvision has them."""

_DIGIT, _WORD = re.compile(r"[0-9]"), re.compile(r"[A-Za-z]{2}|[^\W\d_A-Za-z]")


@dataclass(frozen=True)
class PictureSet:
    """Training or validation pictures, after any limit on their number."""

    name: str
    source: ImageSource
    samples: list[Sample]


@dataclass
class Pictures:
    train: PictureSet
    val: PictureSet | None
    class_names: dict[int, str]

    def prompts(self, template: str) -> dict[int, str]:
        """Class id -> prompt."""
        return {class_id: template.replace("{name}", name) for class_id, name in self.class_names.items()}

    @property
    def codes(self) -> list[str]:
        """Names of classes that say nothing to a text encoder: digits, and no two letters in a row."""
        return [name for _, name in sorted(self.class_names.items()) if _DIGIT.search(name) and not _WORD.search(name)]

    @property
    def sets(self) -> list[PictureSet]:
        return [self.train] if self.val is None else [self.train, self.val]


def open_pictures(data: ClassPictureOptions) -> Pictures:
    """Open the training and validation pictures and their class names. Raises UserError for all that is wrong with them."""
    train_data, val_data, names_file = data.train_data, data.val_data, data.class_names
    if train_data == DEMO_DATA:
        folder = ensure_demo_pictures(PROJECT_ROOT / "data" / "demo")
        train_data, names_file = str(folder / "train.csv"), names_file or folder / "class_names.json"
        val_data = str(folder / "val.csv") if val_data in (None, DEMO_DATA) else val_data
    source = open_source(train_data, image_root=data.image_root)
    names = load_class_names(names_file, folder_names=source.folder_names)
    train = PictureSet("train", source, choose_samples(source.samples, data.max_train_samples))
    _check_ids(train)
    check_class_names(train.samples, names)
    val = None
    if val_data is not None:
        source = open_source(val_data, image_root=data.image_root)
        val = PictureSet("val", source, choose_samples(source.samples, data.max_validation_samples))
        _check_ids(val)
        check_class_names(val.samples, names)
    return Pictures(train, val, names)


def check_pictures(data: ClassPictureOptions) -> None:
    """Raise UserError where pictures or class names are not where they should be; what is in them is read later."""
    given = {option: getattr(data, option) for option in ("train_data", "val_data", "class_names")}
    absent = [
        f"{option} {value} does not exist."
        for option, value in given.items()
        if value not in (None, DEMO_DATA) and not Path(value).exists()
    ]
    if absent:
        raise UserError("\n".join(absent))


def numbered_pictures(count: int, names: Sequence[str]) -> Pictures:
    """As many pictures without files, of classes called so: for a plan of pictures that are not there, and for benchmarks."""
    samples = [Sample(f"n{i}", f"n{i}.png", i % len(names)) for i in range(count)]
    source = FileSource(Path("pictures"), samples)
    return Pictures(PictureSet("train", source, samples), None, dict(enumerate(names)))


def _check_ids(pictures: PictureSet) -> None:
    reserved = [
        sample.sample_id for sample in pictures.samples if "#" in sample.sample_id or sample.sample_id == "__meta__"
    ]
    if reserved:
        raise UserError(
            f"{len(reserved)} sample ids of {pictures.source.location} contain #, which the stores keep for their notes (first: "
            f"{', '.join(reserved[:3])}). Rename them."
        )


def choose_samples(samples: list[Sample], limit: int | None) -> list[Sample]:
    """`limit` samples in the order of the manifest, chosen by a hash of their ids: the same ones whatever else is there."""
    if limit is None or limit >= len(samples):
        return samples
    chosen = chosen_ids((sample.sample_id for sample in samples), limit)
    return [sample for sample in samples if sample.sample_id in chosen]


def chosen_ids(ids: Iterable[str], limit: int) -> set[str]:
    """`limit` of the ids, those whose hashes are lowest."""
    return set(sorted(ids, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())[:limit])
