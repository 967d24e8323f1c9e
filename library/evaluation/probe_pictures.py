"""Cached pictures that representations are measured on: one set to fit probes and heads, another one held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from library.data.class_pictures import PictureSet, choose_samples, open_pictures
from library.data.pixels import UnreadableImage, decode_rgb, square_crop
from library.data.store import StoreMeta, TensorStore
from library.data.text_embeddings import read_text_embeddings
from library.errors import UserError
from library.evaluation.feature_model import teachers_of
from library.models.encoders import dequantize_tokens
from library.options.data import ClassCacheOptions, ClassPictureOptions
from library.training.state import read_facts
from library.words import plural

Group = TypeVar("Group", ClassPictureOptions, ClassCacheOptions)


@dataclass(frozen=True)
class StoredPictures:
    """The latents and teacher tokens of pictures, in their stores."""

    sample_ids: list[str]
    latents: TensorStore
    tokens: TensorStore

    def __len__(self) -> int:
        return len(self.sample_ids)

    def read_latents(self, places: range) -> Tensor:
        """[n, C, h, w] float32, scaled."""
        return torch.from_numpy(self._read(self.latents, places)).float()

    def read_tokens(self, places: range) -> Tensor:
        """[n, N, D] float32."""
        tokens, meta = torch.from_numpy(self._read(self.tokens, places)), self.tokens.meta
        if not meta.has_scale:
            return tokens.float()
        scales = np.empty((len(places), meta.shape[0]), np.float16)
        self.tokens.read_scales_into(self._ids(places), scales)
        return dequantize_tokens(tokens, torch.from_numpy(scales))

    def _read(self, store: TensorStore, places: range) -> np.ndarray:
        values = np.empty((len(places), *store.meta.shape), store.meta.dtype)
        store.read_into(self._ids(places), values)
        return values

    def _ids(self, places: range) -> list[str]:
        return [self.sample_ids[place] for place in places]


@dataclass
class ProbeSet:
    """Cached pictures with teacher tokens. labels: [n] int64 class ids. photo(place): the picture as it was encoded."""

    samples: StoredPictures
    labels: Tensor
    photo: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def ids(self) -> list[str]:
        return self.samples.sample_ids

    def teacher(self, batch_size: int = 64) -> Tensor:
        """Teacher tokens [n, N, D] float32, as cached."""
        parts = [range(start, min(start + batch_size, len(self))) for start in range(0, len(self), batch_size)]
        return torch.cat([self.samples.read_tokens(part) for part in parts])


@dataclass
class ProbePictures:
    """fit: training pictures, for probes and heads. test: held-out pictures, on which everything is measured."""

    fit: ProbeSet
    test: ProbeSet
    empty_prompt: Tensor
    """[77, D] float16."""
    notes: list[str]
    """Sentences about the pictures that the report shows."""


def pictures_of_state(state: Path, *, fit: int, test: int) -> ProbePictures:
    """The pictures that a train_repa state was trained and validated on, from its caches.

    Raises UserError where `state` is incomplete or had no val_data, or its caches are missing or were rebuilt differently.
    """
    facts = read_facts(state)
    options = facts["options"]
    classes, caches = _group(ClassPictureOptions, options, state), _group(ClassCacheOptions, options, state)
    pictures = open_probe_pictures(classes, caches, side=options["resolution"][0], fit=fit, test=test)
    first, *others = teachers_of(options)
    if others:
        pictures.notes.append(
            f"The training has several teachers. All here is about the tokens of the first, {first}; heads of {', '.join(others)} "
            "are not measured."
        )
    for name, producer in facts.get("caches", {}).items():
        if name.startswith("tokens_"):  # of another teacher than the first
            continue
        store = pictures.fit.samples.tokens if name.startswith("tokens ") else pictures.fit.samples.latents
        if not store.foreign and store.meta.producer != producer:
            raise UserError(
                f"The store {store.path} is not the one that {state} was trained on: {_difference(producer, store.meta)}. "
                "Train anew, or restore the caches."
            )
    return pictures


def open_probe_pictures(
    classes: ClassPictureOptions, cache: ClassCacheOptions, *, side: int, fit: int, test: int
) -> ProbePictures:
    """At most `fit` training and `test` validation pictures of those that are cached, chosen by a stable hash.

    side: of the squares that they were encoded as. Caches are not built here: prepare_cache.py does that.
    Raises UserError where there is no validation set, or a store is missing or empty.
    """
    pictures = open_pictures(classes)
    if pictures.val is None:
        raise UserError(
            "Representations are measured on held-out pictures, and there are none: the training had no val_data. Give val_data, "
            "and build its caches with prepare_cache.py."
        )
    text = read_text_embeddings(cache.text_embeddings_path)
    notes: list[str] = []
    sets = {
        "train": _probe_set(pictures.train, side, cache, fit, notes),
        "val": _probe_set(pictures.val, side, cache, test, notes),
    }
    if shared := set(sets["train"].ids) & set(sets["val"].ids):
        notes.append(
            f"{len(shared)} of {plural(len(sets['val']), 'held-out picture')} share an id with a training picture (first: "
            f"{min(shared)}): if the pictures are the same, the numbers are too good."
        )
    return ProbePictures(sets["train"], sets["val"], text.embeddings[text.empty_row], notes)


def _probe_set(pictures: PictureSet, side: int, cache: ClassCacheOptions, limit: int, notes: list[str]) -> ProbeSet:
    stores = {
        kind: TensorStore(cache.store_path(pictures.name, kind), kind, made_elsewhere=shape and ("float16", shape))
        for kind, shape in (("latents", cache.latent_shape), ("tokens", cache.token_shape))
    }
    cached = [sample for sample in pictures.samples if all(sample.sample_id in store for store in stores.values())]
    if absent := len(pictures.samples) - len(cached):
        verb = "is" if absent == 1 else "are"
        notes.append(f"{absent} of {len(pictures.samples)} pictures of {pictures.source.location} {verb} not cached.")
    if len(cached) < 2:
        raise UserError(
            f"{len(cached)} of {len(pictures.samples)} pictures of {pictures.source.location} are in {stores['latents'].path} "
            f"and {stores['tokens'].path}; at least two are needed. prepare_cache.py builds the missing entries."
        )
    chosen = choose_samples(cached, limit)
    samples = StoredPictures([sample.sample_id for sample in chosen], stores["latents"], stores["tokens"])

    def photo(place: int) -> Image.Image:
        sample = chosen[place]
        try:
            picture = decode_rgb(pictures.source.read(sample), name=sample.path)
        except UnreadableImage as error:
            raise UserError(f"{error}. It was readable when the cache was built.") from None
        return Image.fromarray(square_crop(picture, side))

    return ProbeSet(samples, torch.tensor([sample.class_id for sample in chosen]), photo)


def _group(kind: type[Group], options: Mapping[str, Any], state: Path) -> Group:
    """An option group of the training; options that its version did not have are at their defaults."""
    values = {field.name: options[field.name] for field in fields(kind) if field.name in options}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"The options in {state} cannot be read: {error.errors()[0]['msg']}.") from None


def _difference(then: Mapping[str, Any], now: StoreMeta) -> str:
    names = sorted(name for name in then.keys() | now.producer.keys() if then.get(name) != now.producer.get(name))
    return "; ".join(f"{name} was {then.get(name)!s:.16}, is {now.producer.get(name)!s:.16}" for name in names)
