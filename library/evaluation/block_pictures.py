"""Which pictures a block probe is made with, what their labels are, and the probe of a base and a checkpoint on them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from library.data.demo_pictures import CLASSES, draw, imagine
from library.errors import UserError
from library.evaluation.block_probe import LEAST_PICTURES, BlockProbe, BlockProbeSettings, LabelledPictures, Prober
from library.evaluation.clusters import k_means
from library.evaluation.denoising import encode_photos, predicted
from library.evaluation.generated_pictures import AppliedAdapter, apply_adapter
from library.evaluation.generation import BASE
from library.evaluation.photos import Photo, read_photos
from library.evaluation.probe_pictures import ProbePictures, ProbeSet, pictures_of_state
from library.evaluation.prompt_sets import is_ours
from library.inference.drawing_model import DrawingModel, load_model
from library.models.conditioning import TextConditioner
from library.models.locate import locate_base
from library.training.randomness import seed_of

CAPTION_CLUSTERS = 10


@dataclass(frozen=True)
class PictureSource(ABC):
    where: str
    """For who reads the plan."""
    size: int
    """Side of the pictures in pixels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def labelled(self, model: DrawingModel, seed: int) -> LabelledPictures: ...


@dataclass(frozen=True)
class Photos(PictureSource):
    """Pictures that are encoded here. Their labels are their folders, where they lie in several, or clusters of their captions."""

    photos: Sequence[Photo]

    def __len__(self) -> int:
        return len(self.photos)

    def labelled(self, model: DrawingModel, seed: int) -> LabelledPictures:
        names = [photo.name for photo in self.photos]
        encoded = encode_photos(model, [photo.picture for photo in self.photos], [""] * len(names), names, self.size)
        folders = [photo.label for photo in self.photos]
        if len(set(folders)) > 1:
            kinds = sorted(set(folders))
            return LabelledPictures(
                encoded.latents, names, torch.tensor([kinds.index(one) for one in folders]), "class"
            )
        captions = [photo.caption or "" for photo in self.photos]
        labels = caption_clusters(model, captions, seed) if len(set(captions)) > 1 else None
        return LabelledPictures(encoded.latents, names, labels, "caption cluster")


@dataclass(frozen=True)
class CachedPictures(PictureSource):
    """Those of a training of train_repa.py, by its caches, with their classes."""

    found: ProbePictures

    def __len__(self) -> int:
        return len(self.found.fit) + len(self.found.test)

    def labelled(self, model: DrawingModel, seed: int) -> LabelledPictures:
        sets: tuple[ProbeSet, ...] = (self.found.fit, self.found.test)
        latents = torch.cat([one.samples.read_latents(range(len(one))) for one in sets])
        labels = torch.cat([one.labels for one in sets])
        ids = [f"{part}/{id_}" for part, one in zip(("fit", "test"), sets, strict=True) for id_ in one.ids]
        return LabelledPictures(latents, ids, labels.unique(return_inverse=True)[1], "class")


def find_pictures(
    given: Path | None, states: Sequence[Path], beside: Path | None, base: str, size: int, count: int
) -> PictureSource:
    """The pictures of a folder that was named, of a state's caches, of a folder beside a training, or generated ones.

    beside: `held_out_photos`. count: at most so many. Raises UserError where there are none, or too few.
    """
    source: PictureSource
    if given is None and states:
        found = pictures_of_state(states[-1], fit=count - count // 2, test=count // 2)
        source = CachedPictures(f"the caches of {states[-1]}", size, found)
    elif (folder := given or beside) is not None:
        source = Photos(str(folder), size, read_photos(folder, count))
    elif is_ours(base):
        source = Photos("generated", size, generated(count, size))
    else:
        raise UserError(
            f"--block_probe needs pictures to show {base}. Name a folder of at least {LEAST_PICTURES} with --reference_dir, in a "
            "folder for each class, or with captions."
        )
    if len(source) < LEAST_PICTURES:
        raise UserError(
            f"--block_probe needs at least {LEAST_PICTURES} pictures, and {source.where} holds {len(source)}."
        )
    return source


def generated(count: int, size: int) -> list[Photo]:
    """Pictures of the demo set's classes in turn, other ones than those of the set itself."""
    photos = []
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        picture = imagine(name, random.Random(f"block probe {number}"))
        photos.append(Photo(f"{name}/{number}", draw(picture, size), picture.caption))
    return photos


@torch.no_grad()
def caption_clusters(model: DrawingModel, captions: Sequence[str], seed: int) -> Tensor:
    """Clusters of captions by what the base's text encoders say, [n]."""
    unique = sorted(set(captions))
    conditioner = TextConditioner(model.family, model.parts)
    states = torch.cat([conditioner([text]).states.mean(dim=1).float().cpu() for text in unique])
    clusters = k_means(states, min(CAPTION_CLUSTERS, len(unique)), seed_of(seed, "captions"))
    return clusters[[unique.index(text) for text in captions]]


def probe_models(
    base: str,
    checkpoints: Mapping[str, AppliedAdapter],
    source: PictureSource,
    settings: BlockProbeSettings,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> BlockProbe:
    """The base and its checkpoints, one after the other, on the same inputs. Raises UserError for what does not fit the base."""
    model = load_model(locate_base(base), dtype=dtype, device=device)
    model.folded.check([applied.adapter for applied in checkpoints.values()])
    prober = Prober(model.parametrisation, source.labelled(model, settings.seed), settings)
    readings = {}
    for name, applied in {BASE: None, **checkpoints}.items():
        apply_adapter(model, applied)
        with torch.no_grad():
            empty = TextConditioner(model.family, model.parts)([""])
        predict = partial(predicted, model, states=empty.states, pooled=empty.pooled, size=source.size)
        readings[name] = prober.probe(name, model.unet, predict)
    return prober.result(readings)
