"""The pictures that checkpoints were trained on and those that their training held out, which copies are looked for among."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from library.data.class_pictures import chosen_ids
from library.data.collect import TrainingData
from library.data.pixels import decode_rgb
from library.data.trained_image import TrainedImage
from library.errors import UserError
from library.evaluation.candidates import Candidate
from library.evaluation.photos import options_of_run, picture_files
from library.files import public_name
from library.options.repa import parse_repa_options
from library.options.run import RunOptions
from library.options.scripts import network_options_of, repa_options_of
from library.options.toml_file import find_config, read_toml
from library.training.pictures import captioned_data, class_data
from library.words import plural

MOST = 1000
"""Pictures of each kind that are looked at; of more, those whose ids have the lowest hashes."""


@dataclass(frozen=True)
class TrainedPhoto:
    """label: its class, or the folder of its data set. read: raises UnreadableImage."""

    name: str
    label: str
    caption: str
    read: Callable[[], Image.Image]


@dataclass(frozen=True)
class TrainedPhotos:
    """trained, held_out: at most MOST of `count` training pictures and of the held-out ones. where: for who reads the plan."""

    where: str
    count: int
    trained: Sequence[TrainedPhoto]
    held_out: Sequence[TrainedPhoto] = ()

    def __str__(self) -> str:
        sampled = f"{len(self.trained):,} of " if len(self.trained) < self.count else ""
        held = f", and {len(self.held_out)} held out" if self.held_out else ""
        return f"{sampled}{plural(self.count, 'picture')} of {self.where}{held}"


def trained_photos(
    folder: Path | None, candidates: Sequence[Candidate], native_side: int
) -> tuple[TrainedPhotos | None, str]:
    """Those in the folder, else of the training, or why they are not known: what a run says of itself is no error."""
    if folder is not None:
        return photos_in(folder), ""
    try:
        return photos_of_training(
            candidates, native_side
        ), "no options.toml of a training on pictures lies beside the checkpoints"
    except UserError as error:
        return None, str(error).splitlines()[0]


def photos_in(folder: Path) -> TrainedPhotos:
    """The pictures in a folder and below it, all of them trained. Raises UserError where there are none."""
    files = picture_files(folder)
    if not files:
        raise UserError(f"train_data_dir {folder} holds no pictures. Name the folder that was trained on.")
    chosen = chosen_ids(map(str, files), MOST)
    photos = [
        TrainedPhoto(
            file.relative_to(folder).as_posix(), str(file.parent), "", partial(decode_rgb, file, name=str(file))
        )
        for file in files
        if str(file) in chosen
    ]
    return TrainedPhotos(public_name(str(folder)), len(files), photos)


def photos_of_training(candidates: Sequence[Candidate], native_side: int) -> TrainedPhotos | None:
    """Those of the training of these checkpoints, by the options.toml beside them; None where there is none, or a teacher drew.

    Relative paths are taken from the current folder, as in the training. native_side: of the base, in pixels.
    Raises UserError where the pictures are no longer there.
    """
    for candidate in candidates:
        if values := options_of_run(candidate.path):
            options = _run_options(values)
            if options.teacher is not None:
                return None
            data = class_data(options) if options.class_pictures is not None else captioned_data(options, native_side)
            own = [picture for picture in data.training if not picture.image.subset.is_reg]
            where = f"the training of {candidate.name}"
            return TrainedPhotos(where, len(_once(own)), _photos(data, own), _photos(data, data.validation))
    return None


def _run_options(values: Mapping[str, Any]) -> RunOptions:
    """The options of a run as it resolved them, of either script."""
    if "lora_scope" not in values:
        return network_options_of(values)
    config = values.get("dataset_config")
    if config is not None and "datasets" in read_toml(path := find_config(config)):
        return parse_repa_options(["--dataset_config", str(path)], prog="train_repa.py", description=None)
    return repa_options_of(values)


def _once(pictures: Sequence[TrainedImage]) -> dict[str, TrainedImage]:
    """Each file once, whichever data sets have it."""
    return {str(picture.image.path): picture for picture in pictures}


def _photos(data: TrainingData, pictures: Sequence[TrainedImage]) -> list[TrainedPhoto]:
    by_path = _once(pictures)
    chosen = chosen_ids(by_path, MOST)
    return [
        TrainedPhoto(
            picture.image.path.name,
            str(picture.image.subset.image_dir) if picture.class_id is None else str(picture.class_id),
            picture.image.caption,
            partial(data.decoded, picture),
        )
        for path, picture in by_path.items()
        if path in chosen
    ]
