"""--dry_run: the resolved plan of a run, what it will need, and what is missing; nothing is built, encoded or downloaded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from library.data.class_pictures import numbered_pictures
from library.data.collect import TrainingData, collect_classes
from library.data.demo_pictures import CLASSES, DEFAULT_TRAINING_IMAGES
from library.device import choose_device, device_name
from library.errors import UserError, check_all
from library.files import free_bytes, human_bytes
from library.models.base_family import family_of
from library.models.block_swap import saved_bytes
from library.models.configs import published_family
from library.models.locate import BaseLocation, base_status, dino_status, locate_base
from library.models.lone_vae import vae_status
from library.options.kohya.dataset import DEMO_DATA
from library.options.run import RunOptions
from library.training.disk import cache_sizes, shortages, wanted_widths
from library.training.hours import hours_line, workload_of
from library.training.inputs import base_components, check_fit, family_note, input_checks, output_checks
from library.training.meta_step import StepSize, meta_step
from library.training.pictures import class_data, collect_pictures, print_data
from library.training.plan import Plan, make_order, make_plan
from library.training.sample_images import check_prompts
from networks.families import UNET, Family

# Contexts, kernels' workspaces and fragmentation; a guess, not a measurement.
WORKSPACE_BYTES = 2 << 30


def print_plan(options: RunOptions) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    prompts = partial(check_prompts, options.samples, print)
    check_all(*input_checks(options, planning=True), *output_checks(options), prompts)
    name = options.model.pretrained_model_name_or_path
    components = base_components(options)
    missing = [sentence for sentence in [base_status(name, components)] if sentence]
    location = None if missing else locate_base(name, components)
    family = published_family(name) if location is None else family_of(location)
    if family is None and options.class_pictures is None:
        raise UserError(missing[0])
    if location is not None and family is not None:
        for said in check_fit(options, location, family):
            print(said)
    data = _data(options, location, missing)
    if data is not None:
        order = make_order(data, options, 0, _world_size())
        plan = make_plan(order, options.training, options.optimizer)
        print(f"base             {name}{f', {family.title}' if family else ''}")
        if family is not None and (note := family_note(options, family)):
            print(note)
        print(f"samples          {order.samples_per_epoch} an epoch, of {len(data.training)} pictures")
        upper = "" if order.whole_steps else "up to "
        print(
            f"batch            {upper}{plan.batch_size} x {plan.accumulation} accumulated x {plan.world_size} processes"
        )
        print(f"steps per epoch  {plan.steps_per_epoch}")
        print(f"steps            {plan.last_step} ({plan.epochs:g} epochs), warm-up {plan.warmup_steps}")
        if family is None:
            print("trained          unknown until the base model is there")
        else:
            _print_model(options, location, family, data)
            _print_disk(options, family, data)
            _print_hours(options, family, data, plan)
    if options.alignment.needs_teacher:
        missing += filter(None, map(dino_status, options.model.dino_model))
    if options.model.vae is not None and (absent := vae_status(options.model.vae)):
        missing.append(absent)
    for sentence in missing or ["nothing"]:
        print(f"missing          {sentence}")


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _data(options: RunOptions, location: BaseLocation | None, missing: list[str]) -> TrainingData | None:
    """The pictures, or a planned number of class pictures; None where the base that decides their buckets is absent."""
    classes = options.class_pictures
    if classes is None:
        if location is None:
            return None
        data = collect_pictures(options, location, _world_size())
    elif classes.train_data == DEMO_DATA:
        count = min(DEFAULT_TRAINING_IMAGES, classes.max_train_samples or DEFAULT_TRAINING_IMAGES)
        data = _planned(options, count, CLASSES)
    else:
        try:
            data = class_data(options)
        except UserError as error:
            if classes.max_train_samples is None:
                raise
            missing.append(f"{error} Planning with max_train_samples, {classes.max_train_samples}.")
            return _planned(options, classes.max_train_samples, ["unknown"])
    print_data(data)
    return data


def _planned(options: RunOptions, count: int, names: Sequence[str]) -> TrainingData:
    assert options.class_pictures is not None and options.data.resolution is not None
    return collect_classes(
        numbered_pictures(count, names),
        options.class_pictures,
        side=options.data.resolution[0],
        batch_size=options.training.train_batch_size,
        validation_split=0.0,
        seed=0,
    )


def _print_model(options: RunOptions, location: BaseLocation | None, family: Family, data: TrainingData) -> None:
    largest = max(data.training, key=lambda one: math.prod(one.fitted.bucket) * one.dataset.batch_size)
    width, height = largest.fitted.bucket
    size = StepSize(
        width,
        height,
        largest.dataset.batch_size,
        masked=options.objective.masked_loss,
        teacher_widths=wanted_widths(options),
    )
    with ExitStack() as context:
        step = meta_step(_as_large(options), location, family, size, context, as_adamw=True)
        counts = {group.name: sum(p.numel() for p in group.parameters) for group in step.task.groups}
        described = " + ".join(f"{count:,} {name}" for name, count in counts.items())
        print(
            f"trained          {described} = {sum(counts.values()):,} parameters beside {step.frozen_parameters:,} frozen ones"
        )
        for sentence in step.at_rest:
            print(f"base             {sentence}")
        counted = step.count()
        swapped = options.speed.blocks_to_swap
        elsewhere = 0 if swapped is None else saved_bytes(step.models[UNET], swapped)
    each = (counted.peak - counted.before) // size.pictures
    print(
        f"device memory    about {human_bytes(counted.peak - elsewhere + WORKSPACE_BYTES)}: "
        f"{human_bytes(counted.before - elsewhere)} weights and "
        f"optimizer, {human_bytes(each)} gradients and activations for each of {size.pictures} pictures of {width} x {height}, "
        f"{human_bytes(WORKSPACE_BYTES)} workspace (forecast)"
    )


def _as_large(options: RunOptions) -> RunOptions:
    """A step that needs as much memory: a third micro-batch is like the second, which finds gradients of the first."""
    training = options.training
    fewer = min(training.gradient_accumulation_steps, 2)
    return replace(options, training=replace(training, gradient_accumulation_steps=fewer))


def _print_disk(options: RunOptions, family: Family, data: TrainingData) -> None:
    """What the caches will take."""
    sizes = cache_sizes(options, family, data)
    for size in sizes:
        there = ""
        if size.path != options.cache.cache_dir:
            there = f", {human_bytes(size.there)} there already" if size.there else ", to be built"
        free = human_bytes(free_bytes(size.path))
        print(f"disk             {human_bytes(size.needed)} for {size.kind} in {size.path}{there} ({free} free)")
    for sentence in shortages(sizes):
        print(f"warning          {sentence} The run would refuse to begin.")


def _print_hours(options: RunOptions, family: Family, data: TrainingData, plan: Plan) -> None:
    device = choose_device(options.model.device)
    areas = [math.prod(picture.fitted.bucket) * picture.repeats for picture in data.training]
    side = round(math.sqrt(sum(areas) / plan.samples) / 64) * 64  # buckets have about the area of their square
    workload = workload_of(options, family, side, plan.batch_size)
    if line := hours_line(workload, plan, device_name(device), on_gpu=device.type == "cuda"):
        print(f"time             {line}")
