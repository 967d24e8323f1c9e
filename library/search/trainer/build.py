"""A trial's run: options, pictures and caches as its script has them, with some pictures held out."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from library.data.cached_samples import CachedSamples, Request
from library.data.collect import TrainingData
from library.data.order import MicroBatch
from library.errors import UserError
from library.models.conditioning import Conditioning
from library.models.locate import BaseLocation
from library.options.network import parse_network_options
from library.options.parser import flatten
from library.options.repa import parse_repa_options
from library.options.run import RunOptions
from library.processes import Processes
from library.search.held_out_pictures import EVALUATION_SEED, held_out_count, require_enough_pictures
from library.search.messages import Job
from library.search.trainer.judge_by_loss import MOST_PICTURES, HeldOut, Judge, LossJudge, by_hash
from library.search.trainer.kept_models import KeptModels, file_facts, one_at_a_time
from library.search.trainer.trial import Training
from library.training.caches import Prepared, prepare_caches
from library.training.inputs import check_start
from library.training.models import base_weights_facts
from library.training.pictures import collect_pictures, print_data
from library.training.plan import make_order, make_plan
from library.training.run import build_run
from library.training.speed import prepare_environment, resolved_speed
from library.training.task import LoraTask
from library.words import plural
from networks.families import UNET, Family

# Groups of options that decide nothing about pictures and caches, but for the batch size, the dataset file and base_weights.
_NOT_OF_DATA = (
    "config",
    "noise",
    "optimizer",
    "training",
    "network",
    "samples",
    "output",
    "logging",
    "metadata",
    "speed",
)


def script_training(job: Job, config: Path, warm: KeptModels, context: ExitStack) -> Training:
    """Raises UserError for what the script refuses, and for pictures as the objective where they have no captions."""
    if job.script == "train_repa":
        options: RunOptions = parse_repa_options(
            ["--dataset_config", str(config)], prog="train_repa.py", description=None
        )
    else:
        options = parse_network_options(["--config_file", str(config)], prog="train_network.py", description=None)
    if job.objective == "image" and options.class_pictures is not None:
        raise UserError(
            "The objective image draws with captions, and class pictures have none. Use the objective loss."
        )
    prepare_environment(options.speed)
    processes = Processes(options.model.device)
    options = replace(options, speed=resolved_speed(options.speed, processes.device, processes.say))
    base, family = check_start(options, processes)
    prepared = warm.caches.get(_data_facts(options, base, family), lambda: _prepare(options, processes, base, family))
    prepared.models = warm
    order = make_order(prepared.data, options)
    plan = make_plan(order, options.training, options.optimizer)
    processes.say(
        f"{plural(order.samples_per_epoch, 'sample')} per epoch, {plural(plan.last_step, 'step')} on {processes.device}"
    )
    run, task = build_run(options, processes, prepared, order, plan, Path(job.folder) / "logs", context)
    judge = _judge(job, options, prepared, task, warm)

    def export(step: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        return run.checkpoints.export(step, options.output.output_name, True)

    return Training(run, judge, export, flatten(options))


def _prepare(options: RunOptions, processes: Processes, base: BaseLocation, family: Family) -> Prepared:
    # What is held out must not depend on the seed of the training.
    fixed = replace(options, training=replace(options.training, seed=EVALUATION_SEED))
    data = collect_pictures(fixed, base)
    if data.classes is not None and not data.validation:
        data = with_held_out(data)
        processes.say(
            f"{len(data.validation)} of {len(data.every)} pictures are held out to judge trials by, as there is no val_data"
        )
    print_data(data)
    with one_at_a_time(options.cache.cache_dir):
        prepared = prepare_caches(options, processes, base, family, data)
    if not prepared.data.validation:
        prepared.close()
        raise UserError("There is nothing to judge trials by: no picture is held out, or none of them could be read.")
    return prepared


def with_held_out(data: TrainingData) -> TrainingData:
    """A tenth of the class pictures held out, two at least, chosen by a hash. Raises UserError for fewer than three."""
    require_enough_pictures(len(data.training), "Add pictures, or give val_data.")
    chosen = by_hash(data.training, lambda picture: picture.image.sample_id, held_out_count(len(data.training)))
    names = {picture.image.sample_id for picture in chosen}
    return replace(
        data, training=[one for one in data.training if one.image.sample_id not in names], validation=list(chosen)
    )


def _data_facts(options: RunOptions, base: BaseLocation, family: Family) -> list[Any]:
    """All that decides what pictures there are and what their caches hold."""
    groups = {name: flatten(group) for name, group in vars(options).items() if name not in _NOT_OF_DATA}
    files = [file_facts(options.dataset_file), file_facts(options.data.in_json)]
    if (classes := options.class_pictures) is not None:
        files += [file_facts(path) for path in (classes.train_data, classes.val_data, classes.class_names)]
    weights = base_weights_facts(options, base, (UNET, *family.text_encoders))
    return [groups, files, weights, options.training.train_batch_size]


def _judge(job: Job, options: RunOptions, prepared: Prepared, task: LoraTask, warm: KeptModels) -> Judge:
    if job.objective == "image":
        from library.search.trainer.judge_by_pictures import network_image_judge

        return network_image_judge(job, options, prepared, task, warm)
    pictures = held_out_pictures(task, task.validation["loss"])
    known = warm.base_scores.setdefault(_base_key(options, prepared, task, pictures), {})
    return LossJudge(pictures, task.objective, task.models, task.network.disabled, known)


def _base_key(options: RunOptions, prepared: Prepared, task: LoraTask, pictures: list[HeldOut]) -> str:
    """Of all that decides the base's own losses, to the bit."""
    speed, captions = options.speed, {one.image.sample_id: one.image.caption for one in prepared.data.validation}
    facts = [
        base_weights_facts(options, prepared.base, (UNET, *prepared.family.text_encoders)),
        flatten(options.model),
        flatten(options.text),
        [speed.sdpa, speed.xformers, speed.compile, speed.channels_last, speed.deterministic],
        [options.cache.caches_text, options.objective.masked_loss, options.noise.zero_terminal_snr],
        [task.objective.compared.name, task.objective.parametrisation.output.name, str(task.processes.device)],
        [[one.ids, tuple(one.latents.shape), [captions[name] for name in one.ids]] for one in pictures],
        prepared.validation.latents.producers(),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def held_out_pictures(task: LoraTask, samples: CachedSamples) -> list[HeldOut]:
    """Of each bucket; at most MOST_PICTURES altogether, chosen by a hash."""
    names = by_hash(samples.sample_ids, str, MOST_PICTURES)
    places = {name: place for place, name in enumerate(samples.sample_ids)}
    buckets: dict[tuple[int, int], list[int]] = {}
    for name in names:
        buckets.setdefault(samples.images[places[name]].fitted.bucket, []).append(places[name])
    return [_of_bucket(task, samples, np.array(of, np.int64)) for of in buckets.values()]


@dataclass
class _Text:
    """What the encoders say of some captions, and SDXL's sizes."""

    conditioning: Conditioning
    sizes: Tensor

    def rows(self, rows: Tensor) -> tuple[Conditioning, Tensor]:
        states, pooled = self.conditioning
        return Conditioning(states[rows], None if pooled is None else pooled[rows]), self.sizes[rows]


def _of_bucket(task: LoraTask, samples: CachedSamples, places: np.ndarray) -> HeldOut:
    request = Request(0, 0, MicroBatch(0, places, np.zeros_like(places), len(places), len(places)), 1.0)
    batch = samples.read(request).to(task.processes.device)

    def text() -> _Text:
        task.network.set_multiplier(1.0)  # as it is going to be used, whatever a data set's network_multiplier is
        return _Text(task.condition(batch), batch.sizes)

    def predict(noisy: Tensor, timesteps: Tensor, text: _Text, rows: Tensor) -> Tensor:
        conditioning, sizes = text.rows(rows)
        return task.predict(noisy, timesteps, conditioning, sizes)

    ids = [samples.images[place].image.sample_id for place in places]
    return HeldOut(ids, task.latents(batch), batch.mask, text, predict)
