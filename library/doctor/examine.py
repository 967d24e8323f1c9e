"""Looks at the pictures of a training before it: its datasets as the training reads them, then every finding about them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from library.data.buckets import Buckets
from library.data.class_pictures import chosen_ids
from library.data.collect import TrainingData
from library.data.pixels import UnreadableImage
from library.data.sources import FileSource, ImageSource, Sample
from library.data.trained_image import TrainedImage
from library.doctor.caption_faults import caption_findings, regularisation_findings, suggested_trigger
from library.doctor.findings import Finding, sorted_findings
from library.doctor.measures import Asked, Fit, measure_all, square
from library.doctor.picture_faults import Measured, likeness_findings, picture_findings, unreadable_finding
from library.doctor.words import Caption, captions_of
from library.errors import UserError
from library.models.base_family import family_of
from library.models.configs import published_family
from library.models.locate import BaseLocation, base_status, locate_base
from library.options.doctor import DoctorOptions
from library.options.run import RunOptions
from library.progress import doing
from library.training.pictures import captioned_data, class_data
from library.words import plural
from networks.families import SD15, TEXT_ENCODER, TOKENIZERS, Family

if TYPE_CHECKING:
    from PIL import Image
    from transformers import CLIPTokenizer

CHUNK = 75
"""Tokens that a text encoder reads at once, beside its two markers."""
UNBALANCED = 5
"""Times that the largest class is shown for each time of the smallest, above which it is said."""


@dataclass
class Examination:
    """What was found, and all that a page shows of it."""

    base: str
    family: Family
    data: TrainingData
    captions: list[Caption]
    measured: list[Measured]
    """Pictures that were looked at, training pictures first."""
    findings: list[Finding]
    tokenizer: CLIPTokenizer
    room: int
    """Tokens that the text encoders read."""
    trigger: str | None
    notes: list[str]
    teacher_maps: dict[str, Image.Image] = field(default_factory=dict)
    """Path -> the principal components of the teacher's tokens, in colours."""

    def named(self, path: str) -> str:
        """A picture's path from the folder that all of them lie in."""
        return os.path.relpath(path, self.root) if self.root else path

    @cached_property
    def root(self) -> str:
        try:
            return os.path.commonpath([os.path.dirname(picture.image.path) for picture in self.data.every])
        except ValueError:  # on several drives
            return ""

    @property
    def held_out(self) -> set[str]:
        """Paths."""
        return {str(picture.image.path) for picture in self.data.validation}


def examine(options: RunOptions, doctor: DoctorOptions) -> Examination:
    """Read the datasets, look at every picture (a sample, of very many) and caption, and say what is wrong with them.

    Raises UserError where the datasets cannot be read, or have no picture.
    """
    name, location, family = _base(options)
    with doing("reading names and sizes"):
        is_of_classes = options.class_pictures is not None
        data = class_data(options) if is_of_classes else captioned_data(options, family.native_side)
    notes = list(data.notes)
    pictures = _sampled(data, doctor.max_pictures, notes)
    asked = _asked(pictures, data, options)
    found = measure_all(asked)
    unreadable = {path: why.partition(": ")[2] for path, why in data.dropped.items() if why.startswith("unreadable: ")}
    unreadable |= {
        one.name: fault.reason for one, fault in zip(asked, found, strict=True) if isinstance(fault, UnreadableImage)
    }
    measured = [
        Measured(picture, str(picture.image.path), one)
        for picture, one in zip(pictures, found, strict=True)
        if not isinstance(one, UnreadableImage)
    ]
    captions = captions_of(_once(data.training), options.training.seed)
    with doing("reading captions"):
        tokenizer = tokenizer_of(location, family)
    subject = [caption for caption in captions if not caption.picture.image.subset.is_reg]
    examination = Examination(
        name,
        family,
        data,
        captions,
        measured,
        [],
        tokenizer,
        options.text.chunks * CHUNK,
        doctor.trigger or (None if is_of_classes else suggested_trigger([one for one in subject if one.has_own])),
        notes,
    )
    held = examination.held_out
    with doing("comparing pictures and captions"):
        findings = [
            *unreadable_finding(unreadable),
            *_left_out(data),
            *caption_findings(subject, tokenizer, examination.room, doctor.trigger),
            *regularisation_findings(captions),
            *_balance(data),
            *likeness_findings(
                [one for one in measured if one.path not in held], [one for one in measured if one.path in held]
            ),
            *picture_findings(measured),
        ]
    if doctor.deep:
        from library.doctor.teacher import ask_teacher

        answer = ask_teacher(measured, _asked([one.picture for one in measured], data, options), options)
        examination.teacher_maps = answer.maps
        findings += answer.findings
        notes += answer.notes
    examination.findings = sorted_findings(findings)
    return examination


def _base(options: RunOptions) -> tuple[str, BaseLocation | None, Family]:
    """The base's name, where it lies if it is on this machine, and its family. Nothing is fetched."""
    name = options.model.pretrained_model_name_or_path
    components = ("unet",)
    if absent := base_status(name, components):
        family = published_family(name)
        if family is None and options.class_pictures is not None:
            family = SD15  # nothing of what is seen of class pictures depends on it
        if family is None:
            raise UserError(f"{absent} doctor.py only needs to know whether it is SD1.5 or SDXL: name one of these.")
        return name, None, family
    location = locate_base(name, components)
    return name, location, family_of(location)


def tokenizer_of(base: BaseLocation | None, family: Family) -> CLIPTokenizer:
    """The first tokenizer of a base; that of every published one, where the base is not here or has none."""
    from library.models.clip_tokenizer import CLIP_VOCABULARY_SIZE, folder_tokenizer, tokenizer_for

    if base is None:
        return tokenizer_for(CLIP_VOCABULARY_SIZE, family.title)
    if base.is_file:
        from library.models.single_file import file_text_config

        size = int(file_text_config(base.path, family, TEXT_ENCODER)["vocab_size"])
        return tokenizer_for(size, str(base.path))
    folder = base.path / TOKENIZERS[TEXT_ENCODER]
    return folder_tokenizer(folder) if folder.is_dir() else tokenizer_for(CLIP_VOCABULARY_SIZE, family.title)


def _once(pictures: Sequence[TrainedImage]) -> list[TrainedImage]:
    """Each file once, as the first dataset that has it shows it."""
    return list({picture.image.path: picture for picture in reversed(pictures)}.values())[::-1]


def _sampled(data: TrainingData, limit: int, notes: list[str]) -> list[TrainedImage]:
    """The pictures to look at, training pictures first; of very many, those whose ids have the lowest hashes."""
    pictures = _once(data.every)
    if len(pictures) <= limit:
        return pictures
    notes.append(
        f"{limit:,} of {len(pictures):,} pictures were looked at, chosen by a hash of their ids; --max_pictures changes how many. "
        "Sizes and captions were read of all."
    )
    chosen = chosen_ids((picture.image.sample_id for picture in pictures), limit)
    return [picture for picture in pictures if picture.image.sample_id in chosen]


def _asked(pictures: Sequence[TrainedImage], data: TrainingData, options: RunOptions) -> list[Asked]:
    """How each picture is read, and which part of it is trained."""
    if data.classes is None:
        buckets = {id(dataset): Buckets.of(dataset).fit for dataset in data.datasets}
        return [
            Asked(str(picture.image.path), picture.image.path.read_bytes, buckets[id(picture.dataset)])
            for picture in pictures
        ]
    return [_of_class(*data.sources[picture.image.sample_id], square(picture.fitted.bucket[0])) for picture in pictures]


def _of_class(source: ImageSource, sample: Sample, fit: Fit) -> Asked:
    name = sample.path if isinstance(source, FileSource) else f"{source.location}:{sample.path}"
    return Asked(name, lambda: source.read(sample), fit)


def _left_out(data: TrainingData) -> Iterator[Finding]:
    others = {path: why for path, why in data.dropped.items() if not why.startswith("unreadable: ")}
    if others:
        yield Finding(
            "left out",
            "mend",
            f"{plural(len(others), 'picture is', 'pictures are')} left out of the training.",
            "See why under each.",
            tuple(others),
            tuple(others.values()),
        )


def _balance(data: TrainingData) -> Iterator[Finding]:
    """Classes, or folders of captioned pictures, that are shown far more often than others."""
    shown: Counter[str] = Counter()
    first: dict[str, str] = {}
    for picture in data.training:
        if picture.image.subset.is_reg:
            continue
        if data.classes is not None and picture.class_id is not None:
            name = data.classes.class_names[picture.class_id]
        else:
            name = str(picture.image.subset.image_dir or picture.image.subset.metadata_file)
        shown[name] += picture.repeats
        first.setdefault(name, str(picture.image.path))
    if len(shown) < 2:
        return
    ranked = shown.most_common()
    (largest, most), (smallest, least) = ranked[0], ranked[-1]
    if most >= UNBALANCED * least:
        few = [name for name, count in reversed(ranked) if count * UNBALANCED <= most]
        what = "classes" if data.classes is not None else "folders"
        yield Finding(
            "balance",
            "know",
            f"{largest} is shown {most:,} times an epoch, {smallest} {least:,} times ({len(shown)} {what}).",
            "What is shown seldom is learned late, when the rest is known by heart. Add pictures, or raise num_repeats. "
            f"Here is one picture of each of the {what} that are shown {UNBALANCED} times more rarely than the largest, or less.",
            tuple(first[name] for name in few),
            tuple(f"{os.path.basename(name)}: {shown[name]}" for name in few),
        )
