"""Puts a U-REPA run together from its options and caches."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import nn

from library.caching.prepare import Cached, Caches
from library.data.batches import BatchOrder, CachedSamples, Prefetcher
from library.diffusion.objective import Objective
from library.diffusion.predictions import VELOCITY
from library.diffusion.scheduler_config import parametrisation_of
from library.errors import UserError
from library.models.encoders import weight_fingerprint
from library.models.load import load_scheduler_config, load_unet
from library.models.locate import BaseLocation, locate_base
from library.options.parser import flatten
from library.options.repa import TrainRepaOptions
from library.processes import Processes
from library.training.alignment import PART, Alignment, head_group, head_parameters, make_heads
from library.training.checkpoints import Checkpoints
from library.training.ema import ExponentialAverage
from library.training.loop import Run
from library.training.optimizers import ParameterGroup, make_optimizer
from library.training.plan import Plan
from library.training.repa import RepaTask
from library.training.schedules import rate_multiplier
from library.training.speed import set_up_determinism, set_up_speed
from library.training.state import Trained
from networks import AdapterError
from networks.align_head import AlignHeads
from networks.lora import LoraSpec, add_lora

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}


def lora_spec(options: TrainRepaOptions) -> LoraSpec:
    adapters = options.adapters
    return LoraSpec(
        rank=adapters.network_dim,
        alpha=adapters.network_alpha,
        dropout=adapters.network_dropout,
        scope=adapters.lora_scope,
        conv_rank=adapters.conv_dim,
        conv_alpha=adapters.conv_alpha if adapters.conv_dim is not None else None,
    )


def add_trained_parts(
    unet: nn.Module, options: TrainRepaOptions, teacher_width: int, device: torch.device
) -> tuple[dict[str, dict[str, nn.Parameter]], AlignHeads]:
    """Put LoRA into `unet` and make the heads. Returns the trained parts, by file stem, and the heads (maybe none)."""
    try:
        parts = {"lora": add_lora(unet, lora_spec(options), options.training.seed)}
    except AdapterError as error:
        raise UserError(str(error)) from None
    heads = make_heads(
        unet.config,  # type: ignore[arg-type]
        options.adapters.taps if options.alignment.alignment else (),
        teacher_width,
        grid=options.cache.token_grid,
        kind=options.adapters.align_head,
        seed=options.training.seed,
    ).to(device)
    if heads:
        parts[PART] = head_parameters(heads)
    return parts, heads


def parameter_groups(
    parts: dict[str, dict[str, nn.Parameter]], heads: AlignHeads, options: TrainRepaOptions
) -> list[ParameterGroup]:
    o = options.optimizer
    groups = [ParameterGroup("lora", list(parts["lora"].values()), o.learning_rate, o.weight_decay)]
    return [*groups, head_group(heads, o)] if heads else groups


def make_objective(options: TrainRepaOptions, base: BaseLocation, processes: Processes) -> Objective:
    parametrisation, o = parametrisation_of(load_scheduler_config(base), processes.device), options.objective
    if o.raw_v_target and parametrisation.output is not VELOCITY:
        parametrisation = replace(parametrisation, output=VELOCITY)
        processes.say(
            "warning: --raw_v_target takes the output of an epsilon model for v. The documented run never got below the zero "
            "predictor's loss that way; --v_parameterization is the exact form."
        )
    return Objective(parametrisation, VELOCITY if o.v_parameterization else None, o.min_snr_gamma)


def open_samples(cached: Cached, caches: Caches) -> CachedSamples:
    rows = caches.text.rows_of([sample.class_id for sample in cached.samples], caches.text_path)
    ids = [sample.sample_id for sample in cached.samples]
    return CachedSamples(ids, rows, cached.stores["latents"], cached.stores.get("tokens"))


def build_run(
    options: TrainRepaOptions,
    processes: Processes,
    caches: Caches,
    plan: Plan,
    context: ExitStack,
    unet: UNet2DConditionModel | None = None,
) -> tuple[Run, RepaTask]:
    """Model, adapters, heads, data, optimizer and checkpoints of a run. `context` holds the feature hooks.

    unet: the base's, loaded already and frozen, in the compute dtype.
    """
    set_up_determinism(options.speed, processes.device)
    _check_validation(caches, plan, processes)
    dtype = COMPUTE_DTYPES[options.model.mixed_precision]
    workers, seed = options.speed.max_data_loader_n_workers, options.training.seed
    base = locate_base(options.model.pretrained_model_name_or_path, ("unet", "scheduler"))
    unet = load_unet(base, dtype=dtype, device=processes.device) if unet is None else unet
    _check_text(caches, unet.config["cross_attention_dim"])
    teacher_width = caches.train.stores["tokens"].meta.shape[1] if options.alignment.alignment else 0
    parts, heads = add_trained_parts(unet, options, teacher_width, processes.device)
    groups = parameter_groups(parts, heads, options)
    for group in groups:
        processes.say(f"training {sum(p.numel() for p in group.parameters):,} parameters of {group.name}")

    # The hooks stand for the whole run, entered before anything is compiled.
    alignment = None
    if heads:
        alignment = Alignment.attach(unet, heads, options.alignment, context, processes.gather_rows)
    unet.train()
    set_up_speed(unet, options.speed)

    trained = Trained(parts, make_optimizer(groups, options.optimizer), None, _metadata(options))
    if options.optimizer.ema_decay > 0:
        trained.average = ExponentialAverage(trained.parameters, options.optimizer.ema_decay)
    task = RepaTask(
        unet=unet,
        unet_config=unet.config,
        groups=groups,
        objective=make_objective(options, base, processes),
        text=caches.text,
        alignment=alignment,
        class_dropout=options.objective.class_dropout,
        compute_dtype=dtype,
        processes=processes,
        training=open_samples(caches.train, caches),
        validation=None if caches.val is None else open_samples(caches.val, caches),
        batch_size=plan.batch_size,
        workers=workers,
        seed=seed,
        channels_last=options.speed.channels_last,
    )
    with processes.main_first():
        facts = _facts(options, caches, base, task.objective.parametrisation.output.name.scheduler)
    order = BatchOrder(plan.samples, plan.batch_size, seed, processes.rank, plan.world_size, plan.accumulation)
    run = Run(
        task=task,
        plan=plan,
        trained=trained,
        batches=lambda step: Prefetcher(task.training, order.from_step(step), processes.device, workers=workers),
        multiplier=rate_multiplier(options.optimizer, plan),
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=seed,
        output=options.output,
        processes=processes,
        checkpoints=Checkpoints(options.output, flatten(options), facts, plan, trained, processes),
        validates=task.validation is not None,
    )
    return run, task


def _check_validation(caches: Caches, plan: Plan, processes: Processes) -> None:
    count = len(caches.val.samples) if caches.val is not None else 0
    if 0 < count < processes.world_size:
        raise UserError(
            f"The validation set has {count} samples for {processes.world_size} processes. Leave val_data out."
        )
    if left_out := count % (plan.batch_size * processes.world_size) % processes.world_size:
        processes.say(f"validation leaves out the last {left_out} samples, which do not divide by the processes")


def _check_text(caches: Caches, width: int) -> None:
    shape = tuple(caches.text.embeddings.shape[1:])
    if shape[-1] != width:
        raise UserError(
            f"{caches.text_path} holds prompt embeddings {shape}, and the U-Net wants {width} wide ones: they are another text "
            "encoder's. Name another file, or leave text_embeddings out to have them built."
        )


def _metadata(options: TrainRepaOptions) -> dict[str, str]:
    return {
        "format": "pt",
        "lora_spec": lora_spec(options).to_json(),
        "base_model": options.model.pretrained_model_name_or_path,
    }


def _samples_hash(caches: Caches) -> str:
    """Of the training samples in their order, with their classes: on these an epoch's permutation depends."""
    digest = hashlib.sha256()
    for sample in caches.train.samples:
        digest.update(f"{sample.sample_id}\t{sample.class_id}\n".encode())
    return digest.hexdigest()


def _facts(options: TrainRepaOptions, caches: Caches, base: BaseLocation, prediction_type: str) -> dict[str, Any]:
    """What state.json says besides the counters: enough to rebuild the model around the saved weights."""
    return {
        "base_model": options.model.pretrained_model_name_or_path,
        "lora_spec": lora_spec(options).to_json(),
        "prediction_type": prediction_type,
        "samples": _samples_hash(caches),
        "base_weights": weight_fingerprint(base, "unet", options.cache.cache_dir / "weight_hashes.json"),
        "caches": {kind: store.meta.producer for kind, store in caches.train.stores.items()},
        "teacher_width": caches.train.stores["tokens"].meta.shape[1] if options.alignment.alignment else 0,
    }
