"""Puts a run of train_network.py together from its options, pictures and caches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.caching.latents import LatentCaches
from library.caching.masks import alpha_channel, latent_mask
from library.caching.prompts import PromptCache
from library.data.batches import Prefetcher
from library.data.bucket_order import BucketOrder
from library.data.buckets import Fitted
from library.data.network_batches import NetworkSamples, TrainedImage, groups_of, requests
from library.data.network_data import NetworkData
from library.data.training_images import TrainingImage
from library.diffusion.loss import PointwiseLoss
from library.diffusion.noise import NoiseRecipe
from library.diffusion.objective import Objective
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError
from library.files import read_json
from library.merging.merge import fold_into_modules
from library.merging.source import read_source
from library.models.conditioning import TextConditioner
from library.models.configs import configs_of
from library.models.encoders import weight_fingerprint
from library.models.load import TextPart, load_scheduler_config, load_text_encoders, load_unet
from library.models.locate import BaseLocation
from library.options.network import TrainNetworkOptions
from library.options.network_args import BlockCurve
from library.options.parser import flatten
from library.options.precision import TORCH_DTYPES
from library.processes import Processes
from library.training.ema import ExponentialAverage
from library.training.loop import Run
from library.training.network import NetworkTask, equal_number
from library.training.network_checkpoints import NetworkCheckpoints, in_epochs
from library.training.network_metadata import NetworkMetadata
from library.training.optimizers import ParameterGroup, make_optimizer
from library.training.plan import Plan
from library.training.scaling import LossScaler
from library.training.schedules import rate_multiplier
from library.training.speed import set_up_determinism, set_up_speed
from library.training.state import Trained
from networks import AdapterError
from networks.adapter_file import NETWORK_SPEC_KEY
from networks.adapters import Adapter
from networks.blocks import SECTIONS, block_weights
from networks.network import Network, add_network
from networks.original_names import SDXL, TEXT_ENCODER, UNET, Family
from networks.spec import NetworkSpec

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass
class Prepared:
    """What is there before a model is loaded for training."""

    base: BaseLocation
    family: Family
    data: NetworkData
    latents: LatentCaches
    prompts: PromptCache | None


def make_objective(options: TrainNetworkOptions, base: BaseLocation, device: torch.device) -> Objective:
    o = options.objective
    schedule = NoiseSchedule.from_config(load_scheduler_config(base), device)
    if options.noise.zero_terminal_snr:
        schedule = schedule.with_zero_terminal_snr()
    return Objective(
        schedule,
        # kohya's option says what the base predicts.
        "raw_v" if o.v_parameterization else "base",
        min_snr_gamma=o.min_snr_gamma,
        scale_v_pred_loss_like_noise_pred=o.scale_v_pred_loss_like_noise_pred,
        v_pred_like_loss=o.v_pred_like_loss,
        debiased_estimation_loss=o.debiased_estimation_loss,
        pointwise=PointwiseLoss(o.loss_type, o.huber_schedule, o.huber_c, o.huber_scale),
        masked_loss_renormalize=o.masked_loss_renormalize,
    )


def build_run(
    options: TrainNetworkOptions, processes: Processes, prepared: Prepared, order: BucketOrder, plan: Plan
) -> tuple[Run, NetworkTask]:
    """Models, adapters, data, optimizer and checkpoints of a run."""
    set_up_determinism(options.speed, processes.device)
    base, family, data = prepared.base, prepared.family, prepared.data
    unet, parts = load_models(options, base, family, processes.device, with_text=prepared.prompts is None)
    models: dict[str, Any] = {UNET: unet, **{part.component: part.model for part in parts}}
    network = build_network(models, options, family, start_weights(options))
    groups = parameter_groups(network, options, family)
    for group in groups:
        processes.say(
            f"training {sum(p.numel() for p in group.parameters):,} parameters of {group.name} at {group.learning_rate:g}"
        )
    for model in models.values():
        model.train()
    set_up_speed(unet, options.speed)
    conditioner = None
    if parts:
        if options.speed.gradient_checkpointing and options.trains_text_encoders:
            for part in parts:
                part.model.gradient_checkpointing_enable()
        conditioner = TextConditioner(family, parts, clip_skip=clip_skip(options, family), chunks=options.text.chunks)

    trained_names = {id(parameter) for group in groups for parameter in group.parameters}
    trained_parts = _by_component({n: p for n, p in network.parameters.items() if id(p) in trained_names})
    metadata = {
        "format": "pt",
        "base_model": options.model.pretrained_model_name_or_path,
        NETWORK_SPEC_KEY: network.spec.to_json(),
    }
    trained = Trained(trained_parts, make_optimizer(groups, options.optimizer), None, metadata)
    if options.model.mixed_precision == "fp16":
        trained.scaler = LossScaler(processes.device)
    if options.optimizer.ema_decay > 0:
        trained.average = ExponentialAverage(trained.parameters, options.optimizer.ema_decay)

    seed, workers = options.training.seed, options.speed.max_data_loader_n_workers
    objective = make_objective(options, base, processes.device)
    make_samples = _samples_maker(options, prepared, conditioner, plan)
    training = make_samples(data.training, frozen=False)
    validation: dict[str, NetworkSamples] = {}
    if data.validation:
        beside = [
            data.training[i] for i in equal_number([one.image.sample_id for one in data.training], len(data.validation))
        ]
        validation = {
            "loss": make_samples(data.validation, frozen=True),
            "train_loss": make_samples(beside, frozen=True),
        }
    task = NetworkTask(
        models=models,
        network=network,
        groups=groups,
        objective=objective,
        recipe=NoiseRecipe.of(options.noise),
        conditioner=conditioner,
        trains_text=options.trains_text_encoders,
        is_sdxl=family == SDXL,
        scaling_factor=scaling_factor(base, family),
        sample_latents=False,
        compute_dtype=COMPUTE_DTYPES[options.model.mixed_precision],
        processes=processes,
        training=training,
        validation=validation,
        validation_batch=max(dataset.batch_size for dataset in data.datasets),
        validation_batches=options.validation.max_validation_steps,
        validation_seed=seed if options.validation.validation_seed is None else options.validation.validation_seed,
        workers=workers,
        channels_last=options.speed.channels_last,
    )
    output = in_epochs(options.output, options.validation.validate_every_n_epochs, plan.steps_per_epoch)
    with processes.main_first():
        facts = _facts(options, prepared, network, objective.schedule.prediction_type)
        describe = NetworkMetadata(options, plan, data, family, network.spec, facts["prediction_type"], base.path)
    dtype = getattr(torch, TORCH_DTYPES[options.output.save_precision or "float"])

    def export(step: int, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = network.tensors(dtype)
        return tensors, describe.at(step, tensors, name, datetime.now().isoformat(timespec="seconds"))

    run = Run(
        task=task,
        plan=plan,
        trained=trained,
        batches=lambda step: Prefetcher(training, requests(order, step), processes.device, workers=workers),
        multiplier=rate_multiplier(options.optimizer, plan),
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=seed,
        output=output,
        processes=processes,
        checkpoints=NetworkCheckpoints(
            output, flatten(options), facts, plan, trained, processes, order=order, export=export
        ),
        validates=bool(validation),
        micro_batches=lambda step: len(order.step(step).micro_batches),
    )
    if (limit := options.network.scale_weight_norms) is not None:
        run.after_step = lambda: {f"norm/{name}": value for name, value in network.clamp_norms(limit).items()}
    return run, task


def clip_skip(options: TrainNetworkOptions, family: Family) -> int:
    """SDXL's layer is fixed; a clip_skip beside it is passed over with a word by the script."""
    return 1 if family == SDXL or options.text.clip_skip is None else options.text.clip_skip


def make_order(data: NetworkData, options: TrainNetworkOptions, rank: int = 0, world_size: int = 1) -> BucketOrder:
    training = options.training
    return BucketOrder(
        groups_of(data.training),
        training.seed,
        rank,
        world_size,
        training.gradient_accumulation_steps,
        pad_short=options.speed.compile != "none",
    )


def make_plan(data: NetworkData, order: BucketOrder, options: TrainNetworkOptions) -> Plan:
    """Steps of the run. A step has batch_size x accumulation x processes pictures, and fewer at the end of an epoch."""
    training = options.training
    if training.max_train_epochs is not None:
        last_step = training.max_train_epochs * order.steps_per_epoch
    else:
        assert training.max_train_steps is not None
        last_step = training.max_train_steps
    share = options.optimizer.lr_warmup_steps
    warmup = int(share * last_step) if share < 1 else int(share)
    batch_size = max(dataset.batch_size for dataset in data.datasets)
    return Plan(
        order.samples_per_epoch,
        batch_size,
        training.gradient_accumulation_steps,
        order.world_size,
        order.steps_per_epoch,
        last_step,
        warmup,
    )


def _samples_maker(
    options: TrainNetworkOptions, prepared: Prepared, conditioner: TextConditioner | None, plan: Plan
) -> Callable[..., NetworkSamples]:
    masks = any(one.image.subset.alpha_mask or one.image.mask is not None for one in prepared.data.every)

    def make(images: Sequence[TrainedImage], *, frozen: bool) -> NetworkSamples:
        return NetworkSamples(
            images,
            prepared.latents.stores,
            prepared.latents.flipped,
            seed=options.training.seed,
            last_step=plan.last_step,
            tokenize=None if conditioner is None else conditioner.tokenize,
            prompts=prepared.prompts,
            read_mask=mask_of if masks else None,
            frozen_captions=frozen,
        )

    return make


def mask_of(image: TrainingImage, fitted: Fitted, flipped: bool) -> np.ndarray | None:
    """How much each latent of a picture counts, [h, w]; None where nothing is masked."""
    if image.mask is not None:
        return latent_mask(image.mask, fitted, flipped)
    return latent_mask(alpha_channel(image.path), fitted, flipped) if image.subset.alpha_mask else None


def scaling_factor(base: BaseLocation, family: Family) -> float:
    """What latents are multiplied with, from the VAE's configuration."""
    if base.is_file:
        return float(configs_of(family).vae["scaling_factor"])
    return float(read_json(base.path / "vae" / "config.json").get("scaling_factor", 0.18215))


def _by_component(parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """File stem of a state -> parameters."""
    stems = {UNET: "lora_unet", TEXT_ENCODER: "lora_text_encoder"}
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        component = name.split(".", 1)[0]
        parts.setdefault(stems.get(component, f"lora_{component}"), {})[name] = parameter
    return parts


def _facts(options: TrainNetworkOptions, prepared: Prepared, network: Network, prediction_type: str) -> dict[str, Any]:
    """What state.json says besides the counters."""
    digest = hashlib.sha256()
    for one in prepared.data.training:
        digest.update(f"{one.image.sample_id}\t{one.repeats}\t{one.fitted}\t{one.image.caption}\n".encode())
    memory = options.cache.cache_dir / "weight_hashes.json"
    return {
        "base_model": options.model.pretrained_model_name_or_path,
        "family": prepared.family.key,
        "network": network.spec.to_json(),
        "prediction_type": "v_prediction" if options.objective.v_parameterization else prediction_type,
        "samples": digest.hexdigest(),
        "base_weights": weight_fingerprint(prepared.base, UNET, memory),
        "caches": {f"{w}x{h}": store.meta.producer for (w, h), store in sorted(prepared.latents.stores.items())},
    }
