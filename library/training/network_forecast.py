"""--dry_run of train_network.py: pictures, steps, trained parameters, memory; nothing is built, encoded or downloaded."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from library.data.network_data import NetworkData
from library.data.store import StoreMeta
from library.errors import UserError
from library.files import free_bytes, human_bytes
from library.models.configs import configs_of, published_family
from library.models.encoders import grid_in_aspect
from library.models.family import family_of
from library.models.frozen import save_no_inputs
from library.models.locate import BaseLocation, base_status, dino_status, locate_base
from library.options.network import TrainNetworkOptions
from library.training.alignment import head_group
from library.training.forecast import WORKSPACE_BYTES, kept_bytes, teacher_width
from library.training.network_models import (
    COMPUTE_DTYPES,
    build_heads,
    build_network,
    meta_models,
    parameter_groups,
    round_frozen,
    start_weights,
)
from library.training.network_plan import collect_pictures, print_data
from library.training.network_run import make_order, make_plan
from networks.align_head import AlignHeads
from networks.features import capture
from networks.original_names import SDXL, TEXT_ENCODER_2, UNET, Family

_VAE_FACTOR = 8


def print_plan(options: TrainNetworkOptions) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    name = options.model.pretrained_model_name_or_path
    missing = base_status(name)
    family = published_family(name) if missing else None
    if missing and family is None:
        raise UserError(missing)
    location = None if missing else locate_base(name)
    if family is None:
        assert location is not None
        family = family_of(location)
    if location is not None:
        data = collect_pictures(options, location)
        print_data(data)
        order = make_order(data, options, 0, int(os.environ.get("WORLD_SIZE", "1")))
        plan = make_plan(data, order, options)
        print(f"base             {name}, {family.title}")
        print(f"samples          {order.samples_per_epoch} an epoch, of {len(data.training)} pictures")
        print(
            f"batch            up to {plan.batch_size} x {plan.accumulation} accumulated x {plan.world_size} processes"
        )
        print(f"steps per epoch  {plan.steps_per_epoch}")
        print(f"steps            {plan.last_step} ({plan.epochs:g} epochs), warm-up {plan.warmup_steps}")
        _print_model(options, location, family, data)
        if options.alignment.alignment:
            _print_tokens(options, data)
    absent = [missing, dino_status(options.model.dino_model) if options.alignment.alignment else None]
    for sentence in [one for one in absent if one] or ["nothing"]:
        print(f"missing          {sentence}")


def _print_model(options: TrainNetworkOptions, location: BaseLocation, family: Family, data: NetworkData) -> None:
    dtype = COMPUTE_DTYPES[options.model.mixed_precision]
    models = meta_models(options, location, family)
    frozen = sum(p.numel() for model in models.values() for p in model.parameters())
    bases = {name: list(model.parameters()) for name, model in models.items()}
    network = build_network(models, options, family, start_weights(options))
    groups = parameter_groups(network, options, family)
    heads = None
    if options.alignment.alignment:
        heads = build_heads(options, models[UNET].config, teacher_width(options.model.dino_model)).to("meta")
        groups.append(head_group(heads, options.optimizer))
    counts = {group.name: sum(p.numel() for p in group.parameters) for group in groups}
    described = " + ".join(f"{count:,} {name}" for name, count in counts.items())
    print(f"trained          {described} = {sum(counts.values()):,} parameters beside {frozen:,} frozen ones")
    round_frozen(models, options)
    kept = [UNET] if options.cache.caches_text else list(models)
    # Weights, gradients, two moments and the average, float32.
    copies = 5 if options.optimizer.ema_decay else 4
    fixed = sum(p.nbytes for name in kept for p in bases[name]) + sum(counts.values()) * 4 * copies
    largest = max(data.training, key=lambda one: math.prod(one.fitted.bucket) * one.dataset.batch_size)
    width, height = largest.fitted.bucket
    per_sample = _activation_bytes(options, models, heads, family, dtype, width, height)
    total = fixed + per_sample * largest.dataset.batch_size + WORKSPACE_BYTES
    print(
        f"device memory    about {human_bytes(total)}: {human_bytes(fixed)} weights and optimizer, {human_bytes(per_sample)} "
        f"activations for each of {largest.dataset.batch_size} pictures of {width} x {height}, "
        f"{human_bytes(WORKSPACE_BYTES)} workspace (forecast)"
    )


def _activation_bytes(
    options: TrainNetworkOptions,
    models: dict[str, Any],
    heads: AlignHeads | None,
    family: Family,
    dtype: torch.dtype,
    width: int,
    height: int,
) -> int:
    """Bytes that the backward pass of one sample of this size keeps, with heads and trained text encoders where there are any."""
    unet = models[UNET]
    latents = torch.empty(1, 4, height // _VAE_FACTOR, width // _VAE_FACTOR, dtype=dtype, device="meta")
    length = 75 * options.text.chunks + 2
    text = torch.empty(1, length, unet.config["cross_attention_dim"], dtype=dtype, device="meta")
    added = None
    if family == SDXL:
        pooled = configs_of(family).text_encoders[TEXT_ENCODER_2]["projection_dim"]
        pooled = models[TEXT_ENCODER_2].config.projection_dim if TEXT_ENCODER_2 in models else pooled
        added = {
            "text_embeds": torch.empty(1, pooled, dtype=dtype, device="meta"),
            "time_ids": torch.empty(1, 6, dtype=dtype, device="meta"),
        }
    unet.train()
    save_no_inputs(unet)
    if options.speed.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    def forward() -> None:
        with capture(unet, list(heads or ())) as features:
            unet(latents, torch.zeros(1, device="meta"), text, added_cond_kwargs=added, return_dict=False)
        for tap, head in (heads or {}).items():
            head(features[tap], grid_in_aspect(options.alignment.token_grid, width, height))
        if options.trains_text_encoders:
            ids = torch.zeros(options.text.chunks, 77, dtype=torch.int64, device="meta")
            for component in family.text_encoders:
                models[component](ids, output_hidden_states=True)

    return kept_bytes([*models.values(), *([heads] if heads is not None else [])], forward)


def _print_tokens(options: TrainNetworkOptions, data: NetworkData) -> None:
    """Disk that the teacher's tokens take, each picture with its mirror image where that is shown."""
    alignment, folder = options.alignment, options.cache.cache_dir
    width, total = teacher_width(options.model.dino_model), 0
    for one in data.every:
        rows, columns = grid_in_aspect(alignment.token_grid, *one.fitted.bucket)
        meta = StoreMeta("tokens", alignment.token_dtype, (rows * columns, width))
        total += meta.entry_bytes * (1 + one.image.subset.flip_aug)
    print(f"disk             {human_bytes(total)} for tokens in {folder} ({human_bytes(free_bytes(folder))} free)")
