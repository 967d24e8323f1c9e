"""Puts a run together from its options, pictures and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from library.data.batches import Prefetcher
from library.data.cached_samples import CachedSamples, requests
from library.data.order import BatchOrder
from library.device import named_dtype
from library.diffusion.loss import PointwiseLoss
from library.diffusion.objective import Objective
from library.diffusion.predictions import EPSILON, FLOW, VELOCITY, Prediction
from library.diffusion.scheduler_config import parametrisation_of
from library.freed_memory import keep_freed_memory
from library.models.base_family import native_side
from library.models.frozen import freeze_layers
from library.models.load import load_scheduler_config
from library.options.parser import flatten
from library.options.repa import RepaObjectiveOptions
from library.options.run import RunOptions
from library.processes import Processes
from library.training.alignment import PART, Alignment, head_group, head_parameters, head_widths
from library.training.bins import bin_facts, make_bins
from library.training.caches import Prepared
from library.training.checkpoints import Checkpoints, Memory
from library.training.distillation import BridgedTeacher, bridged_teacher, distillation_facts, without_prompt
from library.training.earlier import run_record
from library.training.ema import ExponentialAverage
from library.training.facts import state_facts
from library.training.flow import flow_facts, flow_mode, trained_path
from library.training.frozen_weights import quantise, swap_of
from library.training.graphs import CudaRecorder, Graphs
from library.training.loop import Run, backward
from library.training.loss_scaling import LossScaler
from library.training.metadata import AdapterMetadata
from library.training.models import (
    build_network,
    parameter_groups,
    scaling_factor,
    start_weights,
)
from library.training.optimizers import make_optimizer, optimizer_notes
from library.training.patience import Patience, validation_due
from library.training.plan import Plan
from library.training.samples import make_samples
from library.training.saving import saving_of
from library.training.schedules import learning_rates_of
from library.training.speed import set_up_determinism, set_up_speed
from library.training.state import Trained
from library.training.task import LoraTask
from library.training.text import Text, make_text
from library.training.trained_pictures import marks_of_prepared
from networks.adapter_alphas import NETWORK_SPEC_KEY
from networks.families import UNET, Family

COMPARED: dict[str, Prediction | None] = {"auto": None, "epsilon": EPSILON, "v": VELOCITY}
"""What the loss compares, by the values of --objective."""


def make_objective(
    options: RunOptions, scheduler: Mapping[str, Any], family: Family, side: int, processes: Processes
) -> Objective:
    """scheduler: the base's scheduler_config.json. side: that it was trained at, in pixels."""
    o = options.objective
    parametrisation = parametrisation_of(scheduler, processes.device)
    raw_v = isinstance(o, RepaObjectiveOptions) and o.raw_v_target
    if raw_v and parametrisation.output is EPSILON:
        processes.say(
            "warning: --raw_v_target takes the output of an epsilon model for v. The documented run never got below the zero "
            "predictor's loss that way; --objective v is the exact form."
        )
    if o.v_parameterization or raw_v:  # kohya's option says what the base predicts
        parametrisation = replace(parametrisation, output=VELOCITY)
    if options.noise.zero_terminal_snr:
        parametrisation = parametrisation.with_zero_terminal_snr()
    compared = COMPARED[o.objective]
    if (mode := flow_mode(options, scheduler)) is not None:
        parametrisation, compared = trained_path(options, scheduler, family, side, mode, parametrisation), FLOW
    return Objective(
        parametrisation,
        compared,
        flow_loss_weight=options.flow.loss_weight,
        min_snr_gamma=o.min_snr_gamma,
        scale_v_pred_loss_like_noise_pred=o.scale_v_pred_loss_like_noise_pred,
        v_pred_like_loss=o.v_pred_like_loss,
        debiased_estimation_loss=o.debiased_estimation_loss,
        pointwise=PointwiseLoss(o.loss_type, o.huber_schedule, o.huber_c, o.huber_scale),
        masked_loss_renormalize=o.masked_loss_renormalize,
    )


def build_run(
    options: RunOptions,
    processes: Processes,
    prepared: Prepared,
    order: BatchOrder,
    plan: Plan,
    log_folder: Path,
    context: ExitStack,
    samples: str = "",
) -> tuple[Run, LoraTask]:
    """Models, adapters, data, optimizer and checkpoints of a run.

    log_folder: where its metrics go, for its states to tell. context: holds the feature hooks. samples: digest of the pictures as
    they were collected, by which the run knows its adapters again; "" where it is never asked.
    """
    set_up_determinism(options.speed, processes.device)
    task = build_task(options, processes, prepared, plan, context)
    trained = make_trained(options, task)
    with processes.main_first():
        facts = state_facts(options, prepared, task.network.spec, task.objective)
        describe = AdapterMetadata(
            options,
            plan,
            prepared.data,
            prepared.family,
            task.network.spec,
            facts["prediction_type"],
            prepared.base.path,
            run_record(options, samples, facts["base_weights"]) if samples else None,
            flow_facts(options.flow, task.objective.parametrisation) | bin_facts(options) | distillation_facts(options),
        )
    dtype = named_dtype(options.output.save_precision or "float")

    def export(step: int, name: str, finished: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = task.network.tensors(dtype)
        date = datetime.now().isoformat(timespec="seconds")
        return tensors, describe.at(step, tensors, name, date, finished=finished)

    every_n_steps, every_n_epochs = options.output.validate_every_n_steps, options.validation.validate_every_n_epochs
    patience = None if options.validation.early_stop is None else Patience(options.validation.early_stop, processes.say)
    end = None if task.alignment is None else task.alignment.end
    found: dict[str, Memory | None] = {"patience": patience, "alignment_end": end}
    memories = {name: memory for name, memory in found.items() if memory is not None}
    run = Run(
        task=task,
        plan=plan,
        trained=trained,
        batches=lambda step: Prefetcher(task.training, requests(order, step), processes.device, workers=task.workers),
        rates=learning_rates_of(options.optimizer, plan, task.groups),
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=options.training.seed,
        output=options.output,
        processes=processes,
        checkpoints=Checkpoints(
            options.output,
            flatten(options),
            facts | {"log_folder": str(log_folder)},
            plan,
            trained,
            processes,
            order=order,
            export=export,
            memories=memories,
            pictures=marks_of_prepared(prepared) if samples else {},
        ),
        validates=bool(task.validation),
        micro_batches=lambda step: len(order.step(step).micro_batches),
        validation_due=lambda step: validation_due(step, every_n_steps, every_n_epochs, plan.steps_per_epoch),
        enough=patience,
        after_step=after_step_of(options, task),
        watch=end,
    )
    if options.speed.compile == "graphs":
        run.graphs = Graphs(
            task,
            partial(backward, scaler=trained.scaler),
            list(trained.parameters.values()),
            CudaRecorder(processes.device),
            processes.say,
        )
    if processes.device.type == "cpu":
        keep_freed_memory()
    return run, task


def after_step_of(options: RunOptions, task: LoraTask) -> Callable[[], dict[str, Tensor]] | None:
    """What happens when the optimizer has stepped: --scale_weight_norms, and bins learn from the losses of all processes."""
    limit, bins = options.network.scale_weight_norms, task.bins
    if limit is None and bins is None:
        return None

    def after_step() -> dict[str, Tensor]:
        if bins is not None:
            bins.update(task.processes.sum)
        norms = {} if limit is None else task.network.clamp_norms(limit)
        return {f"norm/{name}": value for name, value in norms.items()}

    return after_step


def build_task(
    options: RunOptions, processes: Processes, prepared: Prepared, plan: Plan, context: ExitStack
) -> LoraTask:
    """Models with their adapters, and what they learn from."""
    base, family = prepared.base, prepared.family
    unet = prepared.models.unet(options, base, family, processes.device)
    parts = prepared.models.text(options, base, family, processes.device) if prepared.text is None else []
    text = make_text(options, processes, prepared, unet, parts)
    training, validation = make_samples(options, prepared, text, plan)
    scheduler = load_scheduler_config(base)
    return make_task(
        options,
        processes,
        family,
        {UNET: unet, **{part.component: part.model for part in parts}},
        text,
        make_objective(options, scheduler, family, native_side(base), processes),
        context,
        teacher=bridged_teacher(options, scheduler, processes.device, lambda: without_prompt(text, family)),
        head_widths=head_widths(
            options.alignment, {teacher: caches.width for teacher, caches in prepared.training.tokens.items()}
        ),
        scaling_factor=scaling_factor(options, base, family),
        training=training,
        validation=validation,
        plan=plan,
    )


def make_task(
    options: RunOptions,
    processes: Processes,
    family: Family,
    models: dict[str, Any],
    text: Text,
    objective: Objective,
    context: ExitStack,
    *,
    teacher: BridgedTeacher | None,
    head_widths: Mapping[str, int],
    scaling_factor: float,
    training: CachedSamples,
    validation: dict[str, CachedSamples],
    plan: Plan,
) -> LoraTask:
    """The same of models that are there. teacher: of a flow, the base itself. head_widths: of what heads predict; empty: none."""
    unet = models[UNET]
    for sentence in quantise(models, options):
        processes.say(sentence)
    network = build_network(models, options, family, start_weights(options))
    groups = parameter_groups(network, options, family)
    alignment = None
    if head_widths:
        adapters = [parameter for group in groups for parameter in group.parameters]
        alignment = Alignment.attach(unet, options, head_widths, adapters, plan, processes, context)
        groups.append(head_group(alignment.heads, options.optimizer))
    for group in groups:
        processes.say(
            f"training {sum(p.numel() for p in group.parameters):,} parameters of {group.name} at {group.learning_rate:g}"
        )
    for note in optimizer_notes(options.optimizer, groups):
        processes.say(f"note: {note}")
    for model in models.values():
        freeze_layers(model, linear=processes.device.type == "cpu")
        model.train()
    set_up_speed(unet, options.speed)
    if (count := options.speed.blocks_to_swap) is not None:
        processes.say(swap_of(unet, count))
    if options.speed.gradient_checkpointing and options.trains_text_encoders:
        for component in models.keys() - {UNET}:
            models[component].gradient_checkpointing_enable()
    seed = options.training.seed
    return LoraTask(
        models=models,
        network=network,
        groups=groups,
        objective=objective,
        recipe=options.noise,
        text=text,
        has_size_conditions=family.has_size_conditions,
        latent_channels=unet.config["in_channels"],
        scaling_factor=scaling_factor,
        compute_dtype=named_dtype(options.model.mixed_precision),
        processes=processes,
        training=training,
        validation=validation,
        validation_batches=options.validation.max_validation_steps,
        validation_seed=seed if options.validation.validation_seed is None else options.validation.validation_seed,
        workers=options.speed.max_data_loader_n_workers,
        channels_last=bool(options.speed.channels_last),
        alignment=alignment,
        teacher=teacher,
        bins=make_bins(options, objective.parametrisation, processes.device),
    )


def make_trained(options: RunOptions, task: LoraTask, optimizer: Optimizer | None = None) -> Trained:
    """What a step changes. Parameters whose rate is 0 are in the adapter's file, and are not among it.

    optimizer: of the task's groups; default: the one that the options name.
    """
    learning = {id(parameter) for group in task.groups for parameter in group.parameters}
    for parameter in task.network.parameters.values():
        parameter.requires_grad_(id(parameter) in learning)
    metadata = {
        "format": "pt",
        "base_model": options.model.pretrained_model_name_or_path,
        NETWORK_SPEC_KEY: task.network.spec.to_json(),
    }
    part = saving_of(options.output).part
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in task.network.parameters.items():
        if id(parameter) in learning:
            parts.setdefault(part(name.split(".", 1)[0]), {})[name] = parameter
    if task.alignment is not None:
        parts[PART] = head_parameters(task.alignment.heads)
    trained = Trained(parts, optimizer or make_optimizer(task.groups, options.optimizer), None, metadata)
    if options.model.mixed_precision == "fp16":
        trained.scaler = LossScaler(task.processes.device)
    if options.optimizer.ema_decay > 0:
        trained.average = ExponentialAverage(trained.parameters, options.optimizer.ema_decay)
    trained.bins = task.bins
    return trained
