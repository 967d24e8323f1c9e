"""The real pictures that drawn ones are compared with, embedded: held-out photos and training pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from library.data.pixels import UnreadableImage
from library.evaluation import picture_measures as measures
from library.evaluation.generation_result import NearTraining
from library.evaluation.photos import Photo
from library.evaluation.picture_encoders import BATCH_SIZE, DinoPictures, unit
from library.evaluation.trained_photos import TrainedPhoto, TrainedPhotos
from library.progress import doing
from library.report.page import smaller
from library.words import plural

WORST = 6
"""Drawn pictures that are shown beside the training pictures that are nearest to them."""
SHOWN_SIDE = 512


@dataclass(frozen=True)
class References:
    """Embeddings [n, D], not of unit length: of the held-out photos of the subject, and of the training pictures `known`.

    gallery: what identity is looked for in, with labels and captions: the photos, or without any what the training held out.
    """

    photos: Tensor
    trained: Tensor
    known: Sequence[TrainedPhoto]
    gallery: Tensor
    labels: Sequence[str]
    captions: Sequence[str]
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, photos: Sequence[Photo], training: TrainedPhotos | None, dino: DinoPictures) -> References:
        """Embeds all of them. What cannot be read is left out and said."""
        own = dino([photo.picture for photo in photos])
        if training is None:
            return cls(own, own[:0], (), own, _labels(photos), [photo.caption or "" for photo in photos])
        notes: list[str] = []
        with doing("looking at the training pictures", len(training.trained) + len(training.held_out)) as activity:
            trained, known = _embedded(training.trained, dino, notes, activity.advance)
            held, held_photos = _embedded([] if photos else training.held_out, dino, notes, activity.advance)
        gallery: Sequence[Photo | TrainedPhoto] = photos or held_photos
        captions = [photo.caption or "" for photo in gallery]
        return cls(own, trained, known, own if photos else held, _labels(gallery), captions, notes)

    @cached_property
    def _real(self) -> Tensor:
        """Cosines of photos that were not drawn to the training pictures that are nearest to them, other than themselves: [n]."""
        trained = unit(self.trained)
        held = measures.nearest_photo(unit(self.gallery), trained)[0]
        return torch.cat([held, measures.nearest_among(trained)])

    @property
    def copying_level(self) -> tuple[float, float] | None:
        """See `picture_measures.copying_level`; None where there are too few pictures."""
        count = int((self._real < measures.SAME_PICTURE).sum())
        return measures.copying_level(self._real) if count >= measures.FEWEST_REAL else None

    @property
    def nearness(self) -> float:
        return float(self._real[self._real < measures.SAME_PICTURE].mean())

    def identity_of(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Of pictures drawn of these prompts, and of the gallery followed by what the base draws of the same: whether it is a
        picture's own, and whether it does not count. bool [n, gallery + n], both.

        A prompt's label is that of the photos with its words for a caption; None where one of several labels is to be told and is
        not. Where there is one label alone, every photo is its own, and the others are the base's pictures of the same prompts, but
        for that of the same prompt and seed.
        """
        labels_of: dict[str, set[str]] = defaultdict(set)
        for caption, label in zip(self.captions, self.labels, strict=True):
            labels_of[" ".join(caption.split())].add(label)
        several = len(set(self.labels)) > 1
        if several and any(len(labels_of[prompt]) != 1 for prompt in prompts):
            return None
        own = torch.zeros(len(prompts), len(self.labels) + len(prompts), dtype=torch.bool)
        left_out = own.clone()
        for place, prompt in enumerate(prompts):
            own[place, : len(self.labels)] = torch.tensor(
                [one in labels_of[prompt] or not several for one in self.labels]
            )
            left_out[place, len(self.labels) :] = several
            left_out[place, len(self.labels) + place] = True
        return own, left_out

    def worst(self, nearest: Mapping[str, tuple[Tensor, Tensor]], level: float) -> list[NearTraining]:
        """The drawn pictures that are nearest to a training picture. nearest: as `nearest_photo` finds them, by checkpoint."""
        found = [
            (float(cosine), name, place, int(index))
            for name, (cosines, indices) in nearest.items()
            for place, (cosine, index) in enumerate(zip(cosines, indices, strict=True))
        ]
        return [
            NearTraining(name, place, cosine, _small(self.known[index]), self.known[index].name, cosine > level)
            for cosine, name, place, index in sorted(found, key=lambda one: -one[0])[:WORST]
        ]


def _labels(photos: Sequence[Photo | TrainedPhoto]) -> list[str]:
    return [photo.label for photo in photos]


def _small(photo: TrainedPhoto) -> Image.Image:
    return smaller(photo.read(), SHOWN_SIDE)


def _embedded(
    photos: Sequence[TrainedPhoto], dino: DinoPictures, notes: list[str], count: Callable[[int], None]
) -> tuple[Tensor, list[TrainedPhoto]]:
    """A batch is read at a time: together they may be larger than memory."""
    rows, kept, unread = [dino([])], [], []
    for start in range(0, len(photos), BATCH_SIZE):
        batch = photos[start : start + BATCH_SIZE]
        pictures = []
        for photo in batch:
            try:
                pictures.append(photo.read())
                kept.append(photo)
            except UnreadableImage as error:
                unread.append(str(error))
        rows.append(dino(pictures))
        count(len(batch))
    if unread:
        notes.append(f"{plural(len(unread), 'picture')} of the training cannot be read (first: {unread[0]}).")
    return torch.cat(rows), kept
