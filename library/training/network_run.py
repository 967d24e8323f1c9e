"""Puts a run of train_network.py together from its options, pictures and caches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.caching.by_bucket import BucketCaches
from library.caching.masks import alpha_channel, latent_mask
from library.caching.prompts import PromptCache
from library.data.batches import Prefetcher
from library.data.bucket_order import BucketOrder
from library.data.buckets import Fitted
from library.data.network_batches import NetworkSamples, TrainedImage, groups_of, requests
from library.data.network_data import NetworkData
from library.data.training_images import TrainingImage
from library.diffusion.loss import PointwiseLoss
from library.diffusion.objective import Objective
from library.diffusion.predictions import VELOCITY
from library.diffusion.scheduler_config import parametrisation_of
from library.files import file_hash, read_json
from library.merging.source import read_source
from library.models.conditioning import CHUNK, TextConditioner
from library.models.configs import configs_of
from library.models.encoders import weight_fingerprint
from library.models.load import TextPart, load_scheduler_config
from library.models.locate import BaseLocation
from library.options.network import TrainNetworkOptions
from library.options.parser import flatten
from library.options.precision import TORCH_DTYPES
from library.processes import Processes
from library.training.alignment import PART, Alignment, head_group, head_parameters
from library.training.ema import ExponentialAverage
from library.training.loop import Run
from library.training.network import NetworkTask, equal_number
from library.training.network_checkpoints import NetworkCheckpoints, Patience, validation_due
from library.training.network_metadata import NetworkMetadata
from library.training.network_models import (
    COMPUTE_DTYPES,
    FrozenModels,
    build_heads,
    build_network,
    parameter_groups,
    round_frozen,
    start_weights,
)
from library.training.optimizers import make_optimizer, optimizer_notes
from library.training.plan import Plan
from library.training.scaling import LossScaler
from library.training.schedules import rate_multiplier
from library.training.speed import set_up_determinism, set_up_speed
from library.training.state import Trained
from networks.adapter_file import NETWORK_SPEC_KEY
from networks.original_names import SDXL, TEXT_ENCODER, UNET, Family

# Where data lie and how they are told about, which may change without another picture being shown.
_NOT_DRAWN = frozenset(
    """
    image_dir conditioning_data_dir metadata_file name place notes subsets cache_info num_repeats validation_split
    validation_seed
    """.split()  # noqa: SIM905
)


@dataclass
class Prepared:
    """What is there before a model is loaded for training."""

    base: BaseLocation
    family: Family
    data: NetworkData
    latents: BucketCaches
    prompts: PromptCache | None
    tokens: BucketCaches | None = None
    models: FrozenModels = field(default_factory=FrozenModels)

    def close(self) -> None:
        self.latents.close()
        if self.prompts is not None:
            self.prompts.close()
        if self.tokens is not None:
            self.tokens.close()


def make_objective(options: TrainNetworkOptions, base: BaseLocation, device: torch.device) -> Objective:
    o = options.objective
    parametrisation = parametrisation_of(load_scheduler_config(base), device)
    if o.v_parameterization:  # kohya's option says what the base predicts
        parametrisation = replace(parametrisation, output=VELOCITY)
    if options.noise.zero_terminal_snr:
        parametrisation = parametrisation.with_zero_terminal_snr()
    return Objective(
        parametrisation,
        min_snr_gamma=o.min_snr_gamma,
        scale_v_pred_loss_like_noise_pred=o.scale_v_pred_loss_like_noise_pred,
        v_pred_like_loss=o.v_pred_like_loss,
        debiased_estimation_loss=o.debiased_estimation_loss,
        pointwise=PointwiseLoss(o.loss_type, o.huber_schedule, o.huber_c, o.huber_scale),
        masked_loss_renormalize=o.masked_loss_renormalize,
    )


def build_run(
    options: TrainNetworkOptions,
    processes: Processes,
    prepared: Prepared,
    order: BucketOrder,
    plan: Plan,
    log_folder: Path,
    context: ExitStack,
) -> tuple[Run, NetworkTask]:
    """Models, adapters, data, optimizer and checkpoints of a run.

    log_folder: where its metrics go, for its states to tell. context: holds the feature hooks.
    """
    set_up_determinism(options.speed, processes.device)
    task = build_task(options, processes, prepared, plan, context)
    trained = _trained(options, task)
    with processes.main_first():
        facts = _facts(options, prepared, task)
        describe = NetworkMetadata(
            options,
            plan,
            prepared.data,
            prepared.family,
            task.network.spec,
            facts["prediction_type"],
            prepared.base.path,
        )
    dtype = getattr(torch, TORCH_DTYPES[options.output.save_precision or "float"])

    def export(step: int, name: str, finished: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = task.network.tensors(dtype)
        date = datetime.now().isoformat(timespec="seconds")
        return tensors, describe.at(step, tensors, name, date, finished=finished)

    every_n_steps, every_n_epochs = options.output.validate_every_n_steps, options.validation.validate_every_n_epochs
    patience = None if options.validation.early_stop is None else Patience(options.validation.early_stop, processes.say)
    run = Run(
        task=task,
        plan=plan,
        trained=trained,
        batches=lambda step: Prefetcher(task.training, requests(order, step), processes.device, workers=task.workers),
        multiplier=rate_multiplier(options.optimizer, plan),
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=options.training.seed,
        output=options.output,
        processes=processes,
        checkpoints=NetworkCheckpoints(
            options.output,
            flatten(options),
            facts | {"log_folder": str(log_folder)},
            plan,
            trained,
            processes,
            order=order,
            export=export,
            patience=patience,
        ),
        validates=bool(task.validation),
        micro_batches=lambda step: len(order.step(step).micro_batches),
        validation_due=lambda step: validation_due(step, every_n_steps, every_n_epochs, plan.steps_per_epoch),
        enough=patience,
    )
    if (limit := options.network.scale_weight_norms) is not None:
        run.after_step = lambda: {f"norm/{name}": value for name, value in task.network.clamp_norms(limit).items()}
    return run, task


def build_task(
    options: TrainNetworkOptions, processes: Processes, prepared: Prepared, plan: Plan, context: ExitStack
) -> NetworkTask:
    """Models with their adapters, and what they learn from."""
    base, family, seed = prepared.base, prepared.family, options.training.seed
    unet: Any = prepared.models.unet(options, base, family, processes.device)
    with_text = prepared.prompts is None
    parts = prepared.models.text(options, base, family, processes.device) if with_text else []
    models: dict[str, Any] = {UNET: unet, **{part.component: part.model for part in parts}}
    network = build_network(models, options, family, start_weights(options))
    round_frozen(models, options)
    groups = parameter_groups(network, options, family)
    alignment = None
    if prepared.tokens is not None:
        heads = build_heads(options, unet.config, prepared.tokens.width).to(processes.device)
        alignment = Alignment.attach(unet, heads, options.alignment, context)
        groups.append(head_group(heads, options.optimizer))
    for group in groups:
        processes.say(
            f"training {sum(p.numel() for p in group.parameters):,} parameters of {group.name} at {group.learning_rate:g}"
        )
    for note in optimizer_notes(options.optimizer, groups):
        processes.say(f"note: {note}")
    for model in models.values():
        model.train()
    set_up_speed(unet, options.speed)
    conditioner = _conditioner(options, processes, prepared, parts) if parts else None
    objective = make_objective(options, base, processes.device)
    make_samples = _samples_maker(options, prepared, conditioner, plan)
    return NetworkTask(
        models=models,
        network=network,
        groups=groups,
        objective=objective,
        recipe=options.noise,
        conditioner=conditioner,
        trains_text=options.trains_text_encoders,
        is_sdxl=family == SDXL,
        scaling_factor=scaling_factor(base, family),
        compute_dtype=COMPUTE_DTYPES[options.model.mixed_precision],
        processes=processes,
        training=make_samples(prepared.data.training, frozen=False),
        validation=_validation(prepared.data, make_samples),
        validation_batches=options.validation.max_validation_steps,
        validation_seed=seed if options.validation.validation_seed is None else options.validation.validation_seed,
        workers=options.speed.max_data_loader_n_workers,
        channels_last=options.speed.channels_last,
        alignment=alignment,
    )


def clip_skip(options: TrainNetworkOptions, family: Family) -> int:
    """The layer of the text encoder, counted from the end; SDXL's is fixed, whatever is asked."""
    return 1 if family == SDXL or options.text.clip_skip is None else options.text.clip_skip


def _conditioner(
    options: TrainNetworkOptions, processes: Processes, prepared: Prepared, parts: list[TextPart]
) -> TextConditioner:
    """Text encoders that run in the step; says which captions they do not see the end of."""
    if options.speed.gradient_checkpointing and options.trains_text_encoders:
        for part in parts:
            part.model.gradient_checkpointing_enable()
    family, chunks = prepared.family, options.text.chunks
    conditioner = TextConditioner(family, parts, clip_skip=clip_skip(options, family), chunks=chunks)
    captions = list(dict.fromkeys(one.image.caption for one in prepared.data.every))
    if cut := conditioner.overlong(captions):
        processes.say(
            f"{len(cut)} of {len(captions)} captions are longer than {chunks * CHUNK} tokens and are cut (first: "
            f"{captions[cut[0]]!r}). --max_token_length gives them room, up to 225."
        )
    return conditioner


def _trained(options: TrainNetworkOptions, task: NetworkTask) -> Trained:
    """What a step changes. Parameters whose rate is 0 are in the adapter's file, and are not among it."""
    learning = {id(parameter) for group in task.groups for parameter in group.parameters}
    for parameter in task.network.parameters.values():
        parameter.requires_grad_(id(parameter) in learning)
    metadata = {
        "format": "pt",
        "base_model": options.model.pretrained_model_name_or_path,
        NETWORK_SPEC_KEY: task.network.spec.to_json(),
    }
    parts = _by_component({name: p for name, p in task.network.parameters.items() if id(p) in learning})
    if task.alignment is not None:
        parts[PART] = head_parameters(task.alignment.heads)
    trained = Trained(parts, make_optimizer(task.groups, options.optimizer), None, metadata)
    if options.model.mixed_precision == "fp16":
        trained.scaler = LossScaler(task.processes.device)
    if options.optimizer.ema_decay > 0:
        trained.average = ExponentialAverage(trained.parameters, options.optimizer.ema_decay)
    return trained


def _validation(data: NetworkData, make: Callable[..., NetworkSamples]) -> dict[str, NetworkSamples]:
    """The held-out pictures, and beside them as many of those that are trained."""
    if not data.validation:
        return {}
    own = [one for one in data.training if not one.image.subset.is_reg]
    beside = [own[i] for i in equal_number([one.image.sample_id for one in own], len(data.validation))]
    return {"loss": make(data.validation, frozen=True), "train_loss": make(beside, frozen=True)}


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
    def make(images: Sequence[TrainedImage], *, frozen: bool) -> NetworkSamples:
        return NetworkSamples(
            images,
            prepared.latents,
            prepared.tokens,
            seed=options.training.seed,
            last_step=plan.last_step,
            tokenize=None if conditioner is None else conditioner.tokenize,
            prompts=prepared.prompts,
            read_mask=mask_of,
            frozen_captions=frozen,
        )

    return make


def mask_of(image: TrainingImage, fitted: Fitted, flipped: bool) -> np.ndarray:
    """How much each latent of a masked picture counts, float32 [h, w]."""
    return latent_mask(alpha_channel(image.path) if image.mask is None else image.mask, fitted, flipped)


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


def _facts(options: TrainNetworkOptions, prepared: Prepared, task: NetworkTask) -> dict[str, Any]:
    """What state.json says besides the counters."""
    family, memory = prepared.family, options.cache.cache_dir / "weight_hashes.json"
    tokens = {} if prepared.tokens is None else prepared.tokens.producers("tokens ")
    return {
        "base_model": options.model.pretrained_model_name_or_path,
        "family": family.key,
        "network": task.network.spec.to_json(),
        "prediction_type": task.objective.parametrisation.output.name.scheduler,
        "samples": samples_digest(prepared.data),
        "base_weights": base_weights_facts(options, prepared.base, (UNET, *family.text_encoders), memory),
        "caches": prepared.latents.producers() | tokens,
    }


def base_weights_facts(
    options: TrainNetworkOptions, base: BaseLocation, components: Sequence[str], memory: Path
) -> dict[str, Any]:
    """Hashes of the frozen weights: those of the base, and of the adapters folded into it with their strengths."""
    facts: dict[str, Any] = {component: weight_fingerprint(base, component, memory) for component in components}
    folded = options.network.base_weights_with_multipliers
    if folded:
        facts["folded_in"] = [[file_hash(read_source(path).file), multiplier] for path, multiplier in folded]
    return facts


def samples_digest(data: NetworkData) -> str:
    """Of everything that decides what is shown: pictures, cuts, captions, weights, and how each data set draws from them."""
    digest = hashlib.sha256()
    for one in data.training:
        kept = {
            **{name: value for name, value in vars(one.dataset).items() if name not in _NOT_DRAWN},
            **{name: value for name, value in vars(one.image.subset).items() if name not in _NOT_DRAWN},
        }
        line = (one.image.sample_id, one.repeats, one.loss_weight, one.fitted, one.image.caption, sorted(kept.items()))
        digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
