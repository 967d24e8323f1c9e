"""A trial of train_network.py: its options, pictures and caches as the script has them, with some pictures held out."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from library.data.bucket_order import MicroBatch
from library.data.network_batches import NetworkSamples, Request
from library.errors import UserError
from library.models.conditioning import Conditioning
from library.models.locate import BaseLocation
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import flatten
from library.processes import Processes
from library.search.held_out_pictures import EVALUATION_SEED
from library.search.messages import Job
from library.search.trainer.judge_by_loss import MOST_PICTURES, HeldOut, Judge, LossJudge, by_hash
from library.search.trainer.kept_models import KeptModels, file_facts, one_at_a_time
from library.search.trainer.trial import Training
from library.training.network import NetworkTask
from library.training.network_checkpoints import NetworkCheckpoints
from library.training.network_plan import collect_pictures, print_data
from library.training.network_prepare import prepare_caches
from library.training.network_run import Prepared, base_weights_facts, build_run, make_order, make_plan
from library.training.speed import with_usable_attention
from library.training.start import check_network_start
from networks.original_names import UNET, Family

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


def network_training(job: Job, config: Path, warm: KeptModels, context: ExitStack) -> Training:
    """Raises UserError for what train_network.py refuses."""
    options = parse_network_options(["--config_file", str(config)], prog="train_network.py", description=None)
    processes = Processes(options.model.device)
    options = replace(options, speed=with_usable_attention(options.speed, processes.say))
    base, family = check_network_start(options, processes)
    prepared = warm.caches.get(_data_facts(options, base, family), lambda: _prepare(options, processes, base, family))
    prepared.models = warm
    order = make_order(prepared.data, options)
    plan = make_plan(prepared.data, order, options)
    processes.say(f"{order.samples_per_epoch} samples an epoch, {plan.last_step} steps on {processes.device}")
    run, task = build_run(options, processes, prepared, order, plan, Path(job.folder) / "logs", context)
    judge = _judge(job, options, prepared, task, warm)
    checkpoints = run.checkpoints
    assert isinstance(checkpoints, NetworkCheckpoints)

    def export(step: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        return checkpoints.export(step, options.output.output_name, True)

    return Training(run, judge, export, flatten(options))


def _prepare(options: TrainNetworkOptions, processes: Processes, base: BaseLocation, family: Family) -> Prepared:
    # What is held out must not depend on the seed of the training.
    fixed = replace(options, training=replace(options.training, seed=EVALUATION_SEED))
    data = collect_pictures(fixed, base)
    print_data(data)
    with one_at_a_time(options.cache.cache_dir):
        prepared = prepare_caches(options, processes, base, family, data)
    if not prepared.data.validation:
        prepared.close()
        raise UserError("There is nothing to judge trials by: no picture is held out, or none of them could be read.")
    return prepared


def _data_facts(options: TrainNetworkOptions, base: BaseLocation, family: Family) -> list[Any]:
    """All that decides what pictures there are and what their caches hold."""
    groups = {name: flatten(group) for name, group in vars(options).items() if name not in _NOT_OF_DATA}
    files = [file_facts(options.config.dataset_config), file_facts(options.data.in_json)]
    memory = options.cache.cache_dir / "weight_hashes.json"
    weights = base_weights_facts(options, base, (UNET, *family.text_encoders), memory)
    return ["train_network", groups, files, weights, options.training.train_batch_size]


def _judge(job: Job, options: TrainNetworkOptions, prepared: Prepared, task: NetworkTask, warm: KeptModels) -> Judge:
    if job.objective == "image":
        from library.search.trainer.judge_by_pictures import network_image_judge

        return network_image_judge(job, options, prepared, task, warm)
    pictures = held_out_pictures(task, task.validation["loss"])
    known = warm.base_scores.setdefault(_base_key(options, prepared, task, pictures), {})
    return LossJudge(pictures, task.objective, task.models, task.network.disabled, known)


def _base_key(options: TrainNetworkOptions, prepared: Prepared, task: NetworkTask, pictures: list[HeldOut]) -> str:
    """Of all that decides the base's own losses, to the bit."""
    memory, family = options.cache.cache_dir / "weight_hashes.json", prepared.family
    speed, captions = options.speed, {one.image.sample_id: one.image.caption for one in prepared.data.validation}
    facts = [
        base_weights_facts(options, prepared.base, (UNET, *family.text_encoders), memory),
        flatten(options.model),
        flatten(options.text),
        [speed.sdpa, speed.xformers, speed.compile, speed.channels_last, speed.deterministic],
        [options.cache.caches_text, options.objective.masked_loss, options.noise.zero_terminal_snr],
        [task.objective.kind, task.objective.schedule.prediction_type, str(task.processes.device)],
        [[one.ids, tuple(one.latents.shape), [captions[name] for name in one.ids]] for one in pictures],
        prepared.latents.producers(),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def held_out_pictures(task: NetworkTask, samples: NetworkSamples) -> list[HeldOut]:
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


def _of_bucket(task: NetworkTask, samples: NetworkSamples, places: np.ndarray) -> HeldOut:
    request = Request(0, 0, MicroBatch(0, places, np.zeros_like(places), len(places)), 1.0)
    batch = samples.empty_batch(request, pin=False)
    samples.fill(batch, slice(0, len(batch)))
    batch = batch.to(task.processes.device)

    def text() -> _Text:
        task.network.set_multiplier(1.0)  # as it is going to be used, whatever a data set's network_multiplier is
        return _Text(task.condition(batch), batch.sizes)

    def predict(noisy: Tensor, timesteps: Tensor, text: _Text, rows: Tensor) -> Tensor:
        conditioning, sizes = text.rows(rows)
        return task.predict(noisy, timesteps, conditioning, sizes)

    ids = [samples.images[place].image.sample_id for place in places]
    return HeldOut(ids, task.latents(batch), batch.mask, text, predict)
