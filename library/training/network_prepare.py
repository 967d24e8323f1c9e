"""Caches of a LoRA training: latents and a teacher's tokens by bucket, and what text encoders make of fixed captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from library.caching.by_bucket import BucketCaches, BucketedPicture
from library.caching.latents import prepare_latents
from library.caching.prompts import PromptCache, prepare_prompts
from library.caching.tokens import Teacher, prepare_tokens
from library.data.captions import cacheable_captions, variations
from library.data.network_data import NetworkData
from library.errors import UserError
from library.models.conditioning import TextConditioner
from library.models.locate import BaseLocation, locate_base, locate_dino
from library.options.network import TrainNetworkOptions
from library.processes import Processes
from library.training.network_models import load_frozen_text
from library.training.network_run import Prepared, base_weights_facts, clip_skip
from networks.original_names import Family


def prepare_caches(
    options: TrainNetworkOptions, processes: Processes, base: BaseLocation, family: Family, data: NetworkData
) -> Prepared:
    """Everything that can be encoded beforehand, complete. Pictures that turn out unreadable leave the data."""
    pictures = [
        BucketedPicture(
            one.image.sample_id,
            one.image.path,
            one.fitted,
            one.image.subset.resize_interpolation or one.dataset.resize_interpolation,
            one.image.subset.flip_aug,
        )
        for one in data.every
    ]
    vae = None if options.model.vae is None else locate_base(options.model.vae, ("vae",))
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
    tokens = None
    if options.alignment.alignment:
        readable = [one for one in pictures if one.sample_id not in latents.dropped]
        tokens = _tokens(options, processes, readable)
        data = _without(data, tokens.dropped)
    prompts = _prompts(options, processes, base, family, data) if options.cache.caches_text else None
    return Prepared(base, family, data, latents, prompts, tokens)


def _without(data: NetworkData, dropped: Mapping[str, str]) -> NetworkData:
    """The data without the pictures of these sample ids, for the reasons beside them."""
    if not dropped:
        return data
    paths = {one.image.sample_id: str(one.image.path) for one in data.every}
    data = replace(
        data,
        training=[one for one in data.training if one.image.sample_id not in dropped],
        validation=[one for one in data.validation if one.image.sample_id not in dropped],
        dropped=data.dropped | {paths[name]: reason for name, reason in dropped.items()},
    )
    if not data.training:
        raise UserError("No picture is left to train on: none could be read.")
    return data


def _tokens(options: TrainNetworkOptions, processes: Processes, pictures: list[BucketedPicture]) -> BucketCaches:
    alignment = options.alignment
    with processes.main_first():
        location = locate_dino(options.model.dino_model)
    # Like the VAE, it computes in float32 where that is not bf16: fp16 may overflow.
    precision = "bf16" if options.model.mixed_precision == "bf16" else "no"
    teacher = Teacher(location, alignment.dino_resolution, alignment.token_grid, alignment.token_dtype, precision)
    return prepare_tokens(
        pictures,
        teacher,
        cache_dir=options.cache.cache_dir,
        workers=options.speed.max_data_loader_n_workers,
        processes=processes,
        say=processes.say,
    )


def _prompts(
    options: TrainNetworkOptions, processes: Processes, base: BaseLocation, family: Family, data: NetworkData
) -> PromptCache:
    captions: set[str] = set()
    for one in data.every:
        found = cacheable_captions(one.image.caption, one.image.subset)
        if found is None:
            varying = ", ".join(variations(one.image.subset, one.image.caption))
            raise UserError(
                f"cache_text_encoder_outputs encodes each caption once, and {varying} changes captions each time "
                f"({one.image.subset.place}). Leave one of them out."
            )
        captions.update(found)
    facts: dict[str, Any] = {
        "weights": base_weights_facts(
            options, base, family.text_encoders, options.cache.cache_dir / "weight_hashes.json"
        ),
        "clip_skip": clip_skip(options, family),
        "chunks": options.text.chunks,
        "precision": options.model.mixed_precision,
    }

    def conditioner() -> TextConditioner:
        parts = load_frozen_text(options, base, family, processes.device)
        return TextConditioner(family, parts, clip_skip=clip_skip(options, family), chunks=options.text.chunks)

    return prepare_prompts(
        sorted(captions),
        conditioner=conditioner,
        facts=facts,
        cache_dir=options.cache.cache_dir,
        processes=processes,
        say=processes.say,
    )
