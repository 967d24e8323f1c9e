"""A training of a Lyra from its options to its file: what train_lyra.py does, on the engine of the other trainings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from library.caching.prompt_cache import PromptCache, prepare_prompts
from library.data.order import BatchOrder
from library.device import named_dtype
from library.errors import UserError
from library.files import public_name
from library.freed_memory import keep_freed_memory
from library.models.base_family import family_of
from library.models.conditioning import Conditioning, TextConditioner
from library.models.fingerprint import weight_fingerprint
from library.models.language import LanguageModel, load_language
from library.models.language_files import language_kind, locate_language
from library.models.load import load_text_encoders, text_config
from library.models.locate import LANGUAGE, BaseLocation, locate_base
from library.models.text_fusion import PROBE, FusedEncoder, FusionHeader, fusion_tensors
from library.options.lyra import TrainLyraOptions
from library.options.model import SpeedOptions
from library.options.parser import flatten
from library.processes import Processes
from library.progress import doing
from library.training.checkpoints import Checkpoints, changes_since
from library.training.earlier import run_record, state_to_resume
from library.training.ema import ExponentialAverage
from library.training.loop import Run, train
from library.training.lyra_inputs import Captions, order_of, read_captions, split
from library.training.lyra_task import LyraSamples, LyraTask, measure
from library.training.optimizers import ParameterGroup, check_optimizer, make_optimizer, optimizer_notes
from library.training.output import open_log, own_output
from library.training.plan import Plan, make_plan
from library.training.preflight import try_save
from library.training.schedules import check_schedule, learning_rates_of
from library.training.session import end_of, finish, is_done, unless_changed
from library.training.speed import prepare_environment, set_up_determinism
from library.training.state import Trained
from library.words import plural
from networks import AdapterError
from networks.families import Family
from networks.lyra import LyraSpec, new_lyra
from networks.spec import RUN_KEY

SPEED = SpeedOptions()  # what there is to choose there is about U-Nets
PART = "lyra"


@dataclass(frozen=True)
class Sources:
    """The encoders that are fused. encoders: the base's own first, then the others."""

    base: BaseLocation
    family: Family
    clip_skip: int
    others: list[BaseLocation]
    encoders: list[FusedEncoder]


class LanguageEncoder:
    """Another encoder, as a cache of captions sees it: it reads the words that CLIP's tokenizer makes of the first 75 tokens."""

    def __init__(self, language: LanguageModel, clip: TextConditioner) -> None:
        self.language, self.clip = language, clip

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        ids = self.language.ids(self.clip.texts(prompts))
        return Conditioning(self.language.states(ids.to(self.language.model.device)), None)

    def overlong(self, prompts: Sequence[str]) -> list[int]:
        return self.language.overlong(self.clip.texts(prompts))


def train_lyra(options: TrainLyraOptions, context: ExitStack) -> None:
    """Train to the end, from where a state left off; see `library.training.session.run_training`."""
    prepare_environment(SPEED)
    processes = Processes(options.model.device)
    check_optimizer(options.optimizer, processes.device)
    sources = find_sources(options, processes)
    state, facts = state_to_resume(options, processes.world_size)
    captions = split(read_captions(options), options)
    with processes.main_first():
        weights = weights_of(sources, options)
    if state is not None:
        changes = changes_since(state, {}, {"base_weights": weights, "samples": captions.digest})
        state = unless_changed(state, changes, options.output)
    order = order_of(captions, options, processes.rank, processes.world_size)
    plan = make_plan(order, options.training, options.optimizer)
    check_schedule(options.optimizer, plan)
    state, ended = end_of(state, facts, plan, options.output)
    if is_done(options, processes, state if ended else None, facts, captions.digest, weights):
        return
    caches = encode(captions, sources, weights, options, processes)
    for cache in caches:
        context.callback(cache.close)
    processes.say(
        f"{plural(len(captions.training), 'caption')} an epoch, {len(captions.validation)} held out, "
        f"{plural(plan.steps_per_epoch, 'step')} per epoch, {plural(plan.last_step, 'step')}, batch {plan.batch_size} x "
        f"{plan.accumulation} accumulated x {plan.world_size} processes on {processes.device}"
    )
    run = build(options, processes, sources, captions, caches, order, plan, weights)
    if processes.is_main:
        context.enter_context(own_output(options.output.output_dir))
    step = 0 if state is None else run.checkpoints.resume(state)
    if ended:
        run.checkpoints.save(step, finished=True)  # the file was lost after the last state
        return
    if step:
        processes.say(f"resuming from {state} at step {step}")
    if processes.is_main:
        try_save(run.checkpoints)
        run.log = open_log(options.output.output_dir, options.output.log_dir, flatten(options), step, {})
    train(run, step)
    if processes.is_main:
        finish(run, "fusion")


def find_sources(options: TrainLyraOptions, processes: Processes) -> Sources:
    """The encoders, fetched from the hub where need be. Raises UserError."""
    model = options.model
    with processes.main_first():
        base = locate_base(model.pretrained_model_name_or_path)
        others = [locate_language(name) for name in model.encoders]
    family = family_of(base)
    skip = 1 if family.text_layer is not None or model.clip_skip is None else model.clip_skip
    if family.text_layer is not None and model.clip_skip not in (None, family.text_layer):
        raise UserError(
            f"clip_skip {model.clip_skip} cannot be used: {family.title} was trained on layer {family.text_layer}."
        )
    encoders = [FusedEncoder(component, "CLIPTextModel", True) for component in family.text_encoders]
    encoders += [FusedEncoder(public_name(other.name), language_kind(other.path), False) for other in others]
    return Sources(base, family, skip, others, encoders)


def weights_of(sources: Sources, options: TrainLyraOptions) -> dict[str, str]:
    """Hashes of the encoders' weights, the others' by their numbers: a file that may be published names no folders."""
    cache_dir = options.data.cache_dir
    own = {name: weight_fingerprint(sources.base, name, cache_dir) for name in sources.family.text_encoders}
    others = {
        f"encoder_{number}": weight_fingerprint(other, LANGUAGE, cache_dir)
        for number, other in enumerate(sources.others, 1)
    }
    return own | others


def encode(
    captions: Captions, sources: Sources, weights: dict[str, str], options: TrainLyraOptions, processes: Processes
) -> list[PromptCache]:
    """What the encoders say of all captions and of the probe, cached: the base's side by side, then each of the others."""
    precision, family = options.model.mixed_precision, sources.family
    dtype = named_dtype(precision)
    texts = [*captions.training, *captions.validation, PROBE]
    own = {name: weights[name] for name in family.text_encoders}
    prepare = partial(prepare_prompts, texts, cache_dir=options.data.cache_dir, processes=processes, say=processes.say)

    def base() -> TextConditioner:
        parts = load_text_encoders(sources.base, families=(family,), dtype=dtype, device=processes.device)
        return TextConditioner(family, parts, clip_skip=sources.clip_skip)

    def language(location: BaseLocation) -> LanguageEncoder:
        return LanguageEncoder(load_language(location, dtype=dtype, device=processes.device), base())

    facts: dict[str, Any] = {"clip_skip": sources.clip_skip, "chunks": 1, "precision": precision}
    caches = [prepare(conditioner=base, facts={"weights": own, **facts})]
    for number, other in enumerate(sources.others, 1):
        of_other = {
            "weights": weights[f"encoder_{number}"],
            "words": own[family.text_encoders[0]],
            "precision": precision,
        }
        caches.append(prepare(conditioner=partial(language, other), facts=of_other))
    return caches


def build(
    options: TrainLyraOptions,
    processes: Processes,
    sources: Sources,
    captions: Captions,
    caches: list[PromptCache],
    order: BatchOrder,
    plan: Plan,
    weights: dict[str, str],
) -> Run:
    """The Lyra, data, optimizer and checkpoints of a run."""
    set_up_determinism(SPEED, processes.device)
    samples = LyraSamples(captions.training, caches)
    probes = probe_states(sources, caches)
    header = header_of(options, sources, [probe.shape[-1] for probe in probes])
    lyra = new_lyra(header.spec, options.training.seed)
    with doing("measuring the encoders' states"):
        measure(lyra, samples, plan.batch_size)
    lyra.to(processes.device)
    group = ParameterGroup(
        PART, list(lyra.parameters()), options.optimizer.learning_rate, options.optimizer.weight_decay
    )
    processes.say(f"training {sum(p.numel() for p in group.parameters):,} parameters at {group.learning_rate:g}")
    for note in optimizer_notes(options.optimizer, [group]):
        processes.say(f"note: {note}")
    task = LyraTask(
        lyra,
        [encoder.name.rpartition("/")[2] for encoder in sources.encoders],
        [group],
        options.lyra,
        plan.last_step,
        plan.batch_size,
        processes.device,
        samples,
        LyraSamples(captions.validation, caches) if captions.validation else None,
    )
    metadata = {
        "format": "pt",
        "base_model": public_name(options.model.pretrained_model_name_or_path),
        **header.metadata(),
    }
    trained = Trained(
        {PART: dict(lyra.named_parameters())}, make_optimizer(task.groups, options.optimizer), None, metadata
    )
    if options.optimizer.ema_decay > 0:
        trained.average = ExponentialAverage(trained.parameters, options.optimizer.ema_decay)
    record = run_record(options, captions.digest, weights)
    dtype = named_dtype(options.output.save_precision or "float")

    def export(step: int, name: str, finished: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
        own = {"ss_steps": str(step), RUN_KEY: json.dumps({**record, "finished": finished})}
        return fusion_tensors(lyra, probes, dtype), metadata | own

    facts = {
        "base_model": options.model.pretrained_model_name_or_path,
        "family": sources.family.key,
        "samples": captions.digest,
        "base_weights": weights,
    }
    if processes.device.type == "cpu":
        keep_freed_memory()
    return Run(
        task=task,
        plan=plan,
        trained=trained,
        batches=partial(task.batches, order),
        rates=learning_rates_of(options.optimizer, plan, task.groups),
        max_grad_norm=options.optimizer.max_grad_norm,
        seed=options.training.seed,
        output=options.output,
        processes=processes,
        checkpoints=Checkpoints(
            options.output, flatten(options), facts, plan, trained, processes, order=order, export=export
        ),
        validates=task.validation is not None,
    )


def header_of(options: TrainLyraOptions, sources: Sources, widths: Sequence[int]) -> FusionHeader:
    """What the file will say of itself. Raises UserError for sizes that cannot be."""
    o = options.lyra
    try:
        latent = o.latent_dim or widths[0]
        hidden = o.hidden_dim or round(latent * 4 / 3)
        spec = LyraSpec(tuple(widths), latent, hidden, o.depth, o.fusion_heads, o.fusion)
    except AdapterError as error:
        raise UserError(f"{error} latent_dim, hidden_dim, depth and fusion_heads say how large it is.") from None
    path = options.output.output_dir / f"{options.output.output_name}.safetensors"
    return FusionHeader(path, sources.family, sources.clip_skip, tuple(sources.encoders), spec)


def probe_states(sources: Sources, caches: Sequence[PromptCache]) -> list[Tensor]:
    """What each encoder says of the probe, [T, width], from the caches."""
    said = [cache.read(cache.rows([PROBE])).states[0] for cache in caches]
    count = len(sources.family.text_encoders)
    if count == 1:
        return said
    own = (text_config(sources.base, sources.family, component) for component in sources.family.text_encoders)
    widths = [config.hidden_size for config in own]
    return [*said[0].split(widths, dim=-1), *said[1:]]
