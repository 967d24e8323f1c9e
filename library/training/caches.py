"""Caches of a training: latents, a teacher's tokens, and what text encoders make of prompts that do not change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from library.caching.by_bucket import BucketCaches, BucketedPicture
from library.caching.class_caches import Cached, Caches, Preparation
from library.caching.latents import prepare_latents
from library.caching.prompt_cache import PromptCache, prepare_prompts
from library.caching.teacher import locate_teacher
from library.caching.tokens import prepare_tokens
from library.data.captions import cacheable_captions, variations
from library.data.collect import TrainingData
from library.data.store import TensorStore
from library.data.text_embeddings import TextEmbeddings
from library.errors import UserError
from library.models.conditioning import TextConditioner, clip_skip
from library.models.frozen import freeze_layers
from library.models.locate import BaseLocation
from library.models.lone_vae import locate_vae
from library.options.data import ClassCacheOptions
from library.options.model import token_kinds
from library.options.run import RunOptions
from library.processes import Processes
from library.training.models import FrozenModels, base_weights_facts, load_frozen_text, text_conditioner
from networks.families import Family


class Stores(NamedTuple):
    """Of one set of pictures. tokens: by teacher; none without one."""

    latents: BucketCaches
    tokens: Mapping[str, BucketCaches]

    @property
    def every(self) -> list[BucketCaches]:
        return [self.latents, *self.tokens.values()]


@dataclass
class Prepared:
    """What there is before models are loaded for training.

    training, validation: caches of the pictures. text: embeddings of captions, or of the prompts of classes; None where text
    encoders run in the step.
    """

    base: BaseLocation
    family: Family
    data: TrainingData
    training: Stores
    validation: Stores
    text: PromptCache | TextEmbeddings | None
    models: FrozenModels = field(default_factory=FrozenModels)

    def close(self) -> None:
        for caches in (*self.training.every, *self.validation.every):
            caches.close()
        if isinstance(self.text, PromptCache):
            self.text.close()


def prepare_caches(
    options: RunOptions, processes: Processes, base: BaseLocation, family: Family, data: TrainingData
) -> Prepared:
    """Everything that can be encoded beforehand, complete. Pictures that turn out unreadable leave the data."""
    if data.classes is not None:
        return prepare_classes(options, processes, base, family, data)
    if data.drawn is not None:
        return prepare_drawn(options, processes, base, family, data)
    pictures = [
        BucketedPicture(
            picture.image.sample_id,
            picture.image.path,
            picture.fitted,
            picture.image.subset.resize_interpolation or picture.dataset.resize_interpolation,
            picture.image.subset.flip_aug,
            picture.image.shows_hidden_colours,
        )
        for picture in data.every
    ]
    vae = None if options.model.vae is None else locate_vae(options.model.vae)
    latents = prepare_latents(
        pictures,
        base=base,
        vae=vae,
        family=family,
        fit_facts={},
        precision=options.model.vae_precision,
        cache_dir=options.cache.cache_dir,
        batch_size=options.cache.vae_batch_size,
        workers=options.speed.max_data_loader_n_workers,
        processes=processes,
        say=processes.say,
        kohya_caches=options.cache.cache_latents_to_disk,
    )
    data = _without(data, latents.dropped)
    tokens, dropped = dict[str, BucketCaches](), set(latents.dropped)
    for teacher in options.model.teachers if options.alignment.needs_teacher else ():
        readable = [picture for picture in pictures if picture.sample_id not in dropped]
        tokens[teacher] = _tokens(options, processes, teacher, readable)
        data = _without(data, tokens[teacher].dropped)
        dropped |= tokens[teacher].dropped.keys()
    prompts = _prompts(options, processes, base, family, data) if options.cache.caches_text else None
    stores = Stores(latents, tokens)
    return Prepared(base, family, data, stores, stores, prompts)


def prepare_drawn(
    options: RunOptions, processes: Processes, base: BaseLocation, family: Family, data: TrainingData
) -> Prepared:
    """Latents of a teacher are there already; their prompts are cached where that is asked for."""
    assert options.teacher is not None and options.teacher.teacher_latents is not None
    store, bucket = TensorStore(options.teacher.teacher_latents, "latents"), data.training[0].fitted.bucket
    prompts = _prompts(options, processes, base, family, data) if options.cache.caches_text else None
    stores = Stores(BucketCaches({bucket: store}, {}, {}), {})
    return Prepared(base, family, data, stores, stores, prompts)


def prepare_classes(
    options: RunOptions, processes: Processes, base: BaseLocation, family: Family, data: TrainingData
) -> Prepared:
    """The caches of class pictures: for each set a store of latents and one of tokens for each teacher; the prompts of all classes.

    Raises UserError where a store was made with other options: a training should not overwrite by a slip of an option what
    took days. prepare_cache.py does.
    """
    assert data.classes is not None
    caches = class_preparation(options, processes, family).prepare(data.classes, rebuild=False, say=processes.say)
    return prepared_classes(caches, base, family, data, options.model.teachers)


def class_preparation(options: RunOptions, processes: Processes, family: Family) -> Preparation:
    assert options.class_pictures is not None and isinstance(options.cache, ClassCacheOptions)
    assert options.data.resolution is not None
    return Preparation(
        options.model,
        options.class_pictures,
        options.cache,
        options.alignment,
        options.text,
        options.fusion,
        family,
        processes,
        side=options.data.resolution[0],
        workers=options.speed.max_data_loader_n_workers,
    )


def prepared_classes(
    caches: Caches, base: BaseLocation, family: Family, data: TrainingData, teachers: Iterable[str]
) -> Prepared:
    side, named = data.datasets[0].resolution, token_kinds(teachers)

    def stores(cached: Cached) -> Stores:
        found = {name: BucketCaches({side: store}, {}, cached.dropped) for name, store in cached.stores.items()}
        return Stores(found["latents"], {teacher: found[name] for teacher, name in named.items() if name in found})

    held_out = caches.val or caches.train
    data = _without(data, caches.train.dropped, held_out.dropped)
    caches.text.rows_of([picture.class_id for picture in data.every if picture.class_id is not None], caches.text_path)
    return Prepared(base, family, data, stores(caches.train), stores(held_out), caches.text)


def _without(
    data: TrainingData, of_training: Mapping[str, str], of_validation: Mapping[str, str] | None = None
) -> TrainingData:
    """The data without the pictures of these sample ids, for the reasons beside them. of_validation None: the same."""
    of_validation = of_training if of_validation is None else of_validation
    dropped = {**of_training, **of_validation}
    if not dropped:
        return data
    paths = {picture.image.sample_id: str(picture.image.path) for picture in data.every}
    data = replace(
        data,
        training=[picture for picture in data.training if picture.image.sample_id not in of_training],
        validation=[picture for picture in data.validation if picture.image.sample_id not in of_validation],
        dropped=data.dropped | {paths[name]: reason for name, reason in dropped.items()},
    )
    if not data.training:
        raise UserError("No picture is left to train on: none could be read.")
    return data


def _tokens(options: RunOptions, processes: Processes, teacher: str, pictures: list[BucketedPicture]) -> BucketCaches:
    # Like the VAE, it computes in float32 where that is not bf16: fp16 may overflow.
    precision = "bf16" if options.model.mixed_precision == "bf16" else "no"
    with processes.main_first():
        located = locate_teacher(teacher, options.model, options.alignment, precision)
    return prepare_tokens(
        pictures,
        located,
        cache_dir=options.cache.cache_dir,
        workers=options.speed.max_data_loader_n_workers,
        processes=processes,
        say=processes.say,
    )


def _prompts(
    options: RunOptions, processes: Processes, base: BaseLocation, family: Family, data: TrainingData
) -> PromptCache:
    captions: set[str] = set()
    for picture in data.every:
        found = cacheable_captions(picture.image.caption, picture.image.subset)
        if found is None:
            varying = ", ".join(variations(picture.image.subset, picture.image.caption))
            raise UserError(
                f"cache_text_encoder_outputs encodes each caption once, and {varying} changes captions each time "
                f"({picture.image.subset.place}). Leave one of them out."
            )
        captions.update(found)
    facts: dict[str, Any] = {
        "weights": base_weights_facts(options, base, family.text_encoders),
        "clip_skip": clip_skip(options.text, family),
        "chunks": options.text.chunks,
        "precision": options.model.mixed_precision,
    }

    def conditioner() -> TextConditioner:
        parts = load_frozen_text(options, base, family, processes.device)
        for part in parts:
            freeze_layers(part.model, linear=processes.device.type == "cpu")
        return text_conditioner(options, family, parts, processes.device)

    return prepare_prompts(
        sorted(captions),
        conditioner=conditioner,
        facts=facts,
        cache_dir=options.cache.cache_dir,
        processes=processes,
        say=processes.say,
    )
