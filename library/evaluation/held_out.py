"""Pictures that representations are measured on: some to fit probes and heads on, others held out, read from the caches."""

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
from library.models.encoders import dequantize_tokens
from library.options.data import ClassCacheOptions, ClassPictureOptions
from library.training.state import read_facts

Group = TypeVar("Group", ClassPictureOptions, ClassCacheOptions)


@dataclass(frozen=True)
class StoredPictures:
    """Latents and teacher tokens of some pictures, in their stores."""

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
class ProbedSet:
    """Cached pictures with teacher tokens. labels: [n] int64 class ids. photo: the picture by its place, as it was encoded."""

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
class ProbedPictures:
    """fit: training pictures, for probes and heads. test: held-out ones, of which every number is."""

    fit: ProbedSet
    test: ProbedSet
    empty_prompt: Tensor
    """[77, D] float16."""
    notes: list[str]
    """What of the pictures should be known beside the numbers."""


def pictures_of_state(state: Path, *, fit: int, test: int) -> ProbedPictures:
    """The pictures a train_repa state was trained and validated on, from the caches it names.

    Raises UserError where `state` is no whole state, had no val_data, or its caches are gone or were made differently since.
    """
    facts = read_facts(state)
    options = facts["options"]
    classes, caches = _group(ClassPictureOptions, options, state), _group(ClassCacheOptions, options, state)
    pictures = open_probed(classes, caches, side=options["resolution"][0], fit=fit, test=test)
    for name, producer in facts.get("caches", {}).items():
        store = pictures.fit.samples.tokens if name.startswith("tokens ") else pictures.fit.samples.latents
        if not store.foreign and store.meta.producer != producer:
            raise UserError(
                f"The store {store.path} is not the one that {state} was trained on: {_difference(producer, store.meta)}. "
                "Train anew, or restore the caches."
            )
    return pictures


def open_probed(
    classes: ClassPictureOptions, cache: ClassCacheOptions, *, side: int, fit: int, test: int
) -> ProbedPictures:
    """At most `fit` training and `test` validation pictures, chosen by a stable hash, of those that are cached.

    side: of the squares that they were encoded as. Nothing is built: prepare_cache.py does that.
    Raises UserError where there is no validation set, no store, or nothing in it.
    """
    pictures = open_pictures(classes)
    if pictures.val is None:
        raise UserError(
            "Representations are measured on held-out pictures, and there are none: val_data was not given. Give val_data, "
            "and build its caches with prepare_cache.py."
        )
    text = read_text_embeddings(cache.text_embeddings_path)
    notes: list[str] = []
    sets = {
        "train": _probed(pictures.train, side, cache, fit, notes),
        "val": _probed(pictures.val, side, cache, test, notes),
    }
    if shared := set(sets["train"].ids) & set(sets["val"].ids):
        notes.append(
            f"{len(shared)} of {len(sets['val'])} held-out pictures have ids that are among the fitted ones (first: "
            f"{min(shared)}): where these are the same pictures, the numbers are too good."
        )
    return ProbedPictures(sets["train"], sets["val"], text.embeddings[text.empty_row], notes)


def _probed(pictures: PictureSet, side: int, cache: ClassCacheOptions, limit: int, notes: list[str]) -> ProbedSet:
    stores = {
        kind: TensorStore(
            cache.store_path(f"{pictures.name}_{kind}"), kind, made_elsewhere=shape and ("float16", shape)
        )
        for kind, shape in (("latents", cache.latent_shape), ("tokens", cache.token_shape))
    }
    cached = [one for one in pictures.samples if all(one.sample_id in store for store in stores.values())]
    if absent := len(pictures.samples) - len(cached):
        notes.append(f"{absent} of {len(pictures.samples)} pictures of {pictures.source.location} are not cached.")
    if len(cached) < 2:
        raise UserError(
            f"{len(cached)} of {len(pictures.samples)} pictures of {pictures.source.location} are in {stores['latents'].path} "
            f"and {stores['tokens'].path}; two at least are needed. prepare_cache.py builds what is missing."
        )
    chosen = choose_samples(cached, limit)
    samples = StoredPictures([one.sample_id for one in chosen], stores["latents"], stores["tokens"])

    def photo(place: int) -> Image.Image:
        one = chosen[place]
        try:
            picture = decode_rgb(pictures.source.read(one), name=one.path)
        except UnreadableImage as error:
            raise UserError(f"{error}. It was readable when it was cached.") from None
        return Image.fromarray(square_crop(picture, side))

    return ProbedSet(samples, torch.tensor([one.class_id for one in chosen]), photo)


def _group(kind: type[Group], options: Mapping[str, Any], state: Path) -> Group:
    """An option group as it was when the state was saved; what an older version did not have is at its default."""
    values = {field.name: options[field.name] for field in fields(kind) if field.name in options}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"The options in {state} cannot be read: {error.errors()[0]['msg']}.") from None


def _difference(then: Mapping[str, Any], now: StoreMeta) -> str:
    names = sorted(name for name in then.keys() | now.producer.keys() if then.get(name) != now.producer.get(name))
    return "; ".join(f"{name} was {then.get(name)!s:.16}, is {now.producer.get(name)!s:.16}" for name in names)
