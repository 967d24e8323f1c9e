"""A run on the meta device, by the engine's own code: models of the real size, a batch of any, nothing loaded or computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from library.data.cached_samples import Batch, CachedSamples
from library.data.text_embeddings import TextEmbeddings
from library.device import named_dtype
from library.models.conditioning import CHUNK, Conditioning, TextConditioner, clip_skip
from library.models.configs import configs_of
from library.models.encoders import grid_in_aspect
from library.models.load import TextPart, load_scheduler_config
from library.models.locate import BaseLocation
from library.options.run import RunOptions
from library.processes import Processes
from library.training.alignment import head_widths
from library.training.caches import Stores
from library.training.checkpoints import Checkpoints
from library.training.distillation import bridged_teacher
from library.training.loop import Run, take_step
from library.training.models import meta_models
from library.training.plan import Plan
from library.training.randomness import StepRandomness
from library.training.run import after_step_of, make_objective, make_task, make_trained
from library.training.schedules import learning_rates_of
from library.training.step_count import META, StepCount, gpu_kernels
from library.training.task import LoraTask
from library.training.text import CachedText, EncodedText, PromptTable, Text
from networks.families import UNET, Family


@dataclass(frozen=True)
class StepSize:
    """What a batch of one bucket holds. width, height: of its pictures, in pixels."""

    width: int
    height: int
    pictures: int = 1
    masked: bool = False
    preserved: bool = False
    """With pictures of diff_output_preservation."""
    teacher_widths: Mapping[str, int] = field(default_factory=dict)
    """Of the tokens of each teacher that heads learn from."""


@dataclass
class MetaStep:
    """A run that can take steps, and where its memory is counted."""

    run: Run
    task: LoraTask
    batch: Batch
    models: dict[str, Any]
    frozen_parameters: int
    at_rest: list[str]
    """How the base's weights are kept, where otherwise than plainly."""

    def __post_init__(self) -> None:
        self.randomness = StepRandomness(0, 0, torch.device("cpu"))
        self.randomness.generator = _MetaGenerator()
        self.step = 1000  # far enough for any warm-up

    def count(self) -> StepCount:
        """One step, counted, as every step but the first is: what the optimizer keeps is there before it.

        Raises HostRead where it would wait for the device, or is given a tensor of another one.
        """
        with gpu_kernels():
            self._make_moments()
            with StepCount(self.tensors()) as counter:
                take_step(self.run, _Endless(self.batch), self.randomness, self.step)
        return counter

    def tensors(self) -> Iterator[Tensor]:
        """What there is between steps."""
        for model in self.models.values():
            yield from (*model.parameters(), *model.buffers())
        trained = self.run.trained
        yield from trained.parameters.values()
        for state in trained.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.is_meta)
        if trained.average is not None:
            yield from trained.average.shadows.values()
        yield from self.batch.tensors()

    def _make_moments(self) -> None:
        parameters = self.run.trained.parameters.values()
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        self.run.trained.optimizer.step()
        self.run.trained.optimizer.zero_grad(set_to_none=True)


class _MetaGenerator(torch.Generator):
    """torch has no generator there; one of the CPU draws as little, once it says where it is."""

    device = META  # type: ignore[assignment]


class _Alone(Processes):
    """One process on the meta device, without accelerate, that keeps what it says to itself."""

    def __init__(self) -> None:
        self.device, self.rank, self.world_size = META, 0, 1
        self.said: list[str] = []

    def say(self, *words: object) -> None:
        self.said.append(" ".join(map(str, words)))


@dataclass
class _Endless:
    """The same batch for every micro-batch."""

    batch: Batch
    waited: float = 0.0

    def __next__(self) -> Batch:
        return self.batch

    def close(self) -> None:
        pass


def meta_step(
    options: RunOptions,
    location: BaseLocation | None,
    family: Family,
    size: StepSize,
    context: ExitStack,
    models: dict[str, Any] | None = None,
    as_adamw: bool = False,
) -> MetaStep:
    """A run of these options in eager mode, with the attention that torch has.

    location: of the base; None: the family's published one. context: holds the feature hooks. models: frozen ones without
    adapters that are there already, on the meta device. as_adamw: with AdamW's two moments of a weight in float32, whatever
    the optimizer: many read the device, and have no place here.
    """
    attention = {"xformers": False, "sdpa": options.speed.sdpa or options.speed.xformers}
    options = replace(options, speed=replace(options.speed, compile="none", blocks_to_swap=None, **attention))
    caches_text = options.cache.caches_text or options.class_pictures is not None
    if models is None:
        models = meta_models(options, location, family, text=not caches_text)
    elif caches_text:
        models = {UNET: models[UNET]}
    text = _text(options, family, models)
    scheduler = configs_of(family).scheduler if location is None else load_scheduler_config(location)
    frozen = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
    processes = _Alone()
    plan = Plan(size.pictures, size.pictures, options.training.gradient_accumulation_steps, 1, 1, 10_000, 0)
    unused = cast(Any, None)
    task = make_task(
        options,
        processes,
        family,
        models,
        text,
        make_objective(options, scheduler, family, family.native_side, processes),
        context,
        teacher=bridged_teacher(
            options, scheduler, META, lambda: Conditioning(*_conditioning(options, family, models, 1))
        ),
        head_widths=head_widths(options.alignment, size.teacher_widths),
        scaling_factor=family.scaling_factor,
        training=CachedSamples((), *Stores(unused, {}), text, seed=0, last_step=1),
        validation={},
        plan=plan,
    )
    optimizer = rates = None
    if as_adamw:
        optimizer = AdamW([{"params": list(group.parameters), "name": group.name} for group in task.groups], fused=True)
        rates = lambda step: [group.learning_rate for group in task.groups]  # noqa: E731
    run = Run(
        task=task,
        plan=plan,
        trained=make_trained(options, task, optimizer),
        batches=unused,
        rates=rates or learning_rates_of(options.optimizer, plan, task.groups),
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=0,
        output=options.output,
        processes=processes,
        checkpoints=cast(Checkpoints, unused),
        validates=False,
        after_step=after_step_of(options, task),
        watch=None if task.alignment is None else task.alignment.end,
    )
    at_rest = processes.said[: sum(options.model.format_at_rest(name) is not None for name in models)]
    return MetaStep(run, task, _batch(options, family, models, text, size), models, frozen, at_rest)


def _text(options: RunOptions, family: Family, models: dict[str, Any]) -> Text:
    unused = cast(Any, None)
    if options.class_pictures is not None:
        states, pooled = _conditioning(options, family, models, 3)
        table = TextEmbeddings(states, {0: 0, 1: 1}, pooled=pooled)
        dtype = named_dtype(options.model.mixed_precision)
        return PromptTable(table, options.class_pictures.class_dropout, device=META, dtype=dtype)
    if options.cache.caches_text:
        return CachedText(unused)
    parts = [TextPart(component, unused, models[component]) for component in family.text_encoders]
    conditioner = TextConditioner(family, parts, clip_skip=clip_skip(options.text, family), chunks=options.text.chunks)
    return EncodedText(conditioner, options.trains_text_encoders)


def _conditioning(
    options: RunOptions, family: Family, models: dict[str, Any], count: int
) -> tuple[Tensor, Tensor | None]:
    config = models[UNET].config
    states = _half(count, CHUNK * options.text.chunks + 2, config["cross_attention_dim"])
    if not family.has_size_conditions:
        return states, None
    # What is not the embedding of six sizes is the pooled prompt (SDXL, arXiv 2307.01952).
    return states, _half(count, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])


def _batch(options: RunOptions, family: Family, models: dict[str, Any], text: Text, size: StepSize) -> Batch:
    """As `CachedSamples` makes them, on the device."""
    count = size.pictures
    rows, columns = family.latent_size(size.width, size.height)
    of_classes, teacher = options.class_pictures is not None, options.teacher
    scaled = of_classes or teacher is not None
    batch = Batch(
        indices=np.arange(count),
        latents=_half(count, family.latent_channels * (1 if scaled else 2), rows, columns),
        sizes=torch.empty(count, 6, device=META),
        captions=[],
        flipped=np.zeros(count, bool),
    )
    if not of_classes:
        batch.real, batch.weights = (torch.empty(count, device=META) for _ in range(2))
    if isinstance(text, PromptTable):
        batch.text_rows = torch.empty(count, dtype=torch.int64, device=META)
    elif isinstance(text, CachedText):
        batch.states, batch.pooled = _conditioning(options, family, models, count)
    else:
        encoders = len(family.text_encoders)
        batch.ids = torch.empty(count, encoders, options.text.chunks, CHUNK + 2, dtype=torch.int64, device=META)
    if teacher is not None and teacher.flow_target == "reflow":
        batch.noise = torch.empty(batch.latents.shape, device=META)
    if size.masked:
        batch.mask = torch.empty(count, 1, rows, columns, device=META)
    if size.preserved:
        batch.preserve = torch.empty(count, dtype=torch.bool, device=META)
    if size.teacher_widths:
        batch.token_grid = grid_in_aspect(options.alignment.token_grid, size.width, size.height)
        tokens = batch.token_grid[0] * batch.token_grid[1]
        batch.tokens = {name: _half(count, tokens, width) for name, width in size.teacher_widths.items()}
    return batch


def _half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device=META)
