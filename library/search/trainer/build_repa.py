"""A trial of train_repa.py: its options, pictures and caches as the script has them, with some pictures held out."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from library.caching.picture_sets import open_pictures
from library.caching.prepare import Cached, Caches, Preparation
from library.data.batches import CachedSamples
from library.errors import UserError
from library.models.encoders import weight_fingerprint
from library.models.load import load_unet
from library.models.locate import locate_base
from library.options.parser import flatten, parse
from library.options.repa import TrainRepaOptions
from library.processes import Processes
from library.search.held_out_pictures import held_out_count
from library.search.messages import Job
from library.search.trainer.judge_by_loss import MOST_PICTURES, HeldOut, LossJudge, by_hash
from library.search.trainer.kept_models import KeptModels, file_facts, one_at_a_time
from library.search.trainer.trial import Training
from library.training.adapters import adapter_file
from library.training.plan import make_plan
from library.training.repa import RepaTask
from library.training.repa_run import COMPUTE_DTYPES, build_run
from library.training.speed import check_attention, prepare_environment
from library.training.start import check_repa_start
from networks.lora import lora_disabled
from networks.original_names import UNET


@dataclass
class _Opened:
    """Caches that can be closed, as what is kept must be."""

    caches: Caches

    def close(self) -> None:
        for cached in (self.caches.train, self.caches.val):
            for store in cached.stores.values() if cached is not None else ():
                store.close()


def repa_training(job: Job, config: Path, warm: KeptModels, context: ExitStack) -> Training:
    """Raises UserError for what train_repa.py refuses."""
    options = parse(TrainRepaOptions, ["--dataset_config", str(config)], prog="train_repa.py", description=None)
    if job.objective == "image":
        raise UserError(
            "The objective image draws with captions, and train_repa.py has classes. Use the objective loss."
        )
    prepare_environment(options.speed)
    check_attention(options.speed)
    processes = Processes(options.model.device)
    check_repa_start(options, processes)
    caches = warm.caches.get(_data_facts(options), lambda: _prepare(options, processes)).caches
    plan = make_plan(len(caches.train.samples), options.training, options.optimizer)
    processes.say(f"{plan.samples} samples, {plan.last_step} steps on {processes.device}")
    run, task = build_run(options, processes, caches, plan, context, _unet(options, processes, warm))
    pictures = [held_out_pictures(task)]
    known = warm.base_scores.setdefault(_base_key(options, task, pictures[0], caches), {})
    judge = LossJudge(pictures, task.objective, {UNET: task.unet}, lambda: lora_disabled(task.unet), known)
    parameters = run.trained.parts["lora"]

    def export(step: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        date = datetime.now().isoformat(timespec="seconds")
        prediction_type = task.objective.schedule.prediction_type
        return adapter_file(parameters, options.output.output_name, options, plan, prediction_type, date)

    return Training(run, judge, export, flatten(options))


def _prepare(options: TrainRepaOptions, processes: Processes) -> _Opened:
    preparation = Preparation(
        options.model,
        options.data,
        options.cache,
        processes,
        workers=options.speed.max_data_loader_n_workers,
        tokens=options.alignment.alignment,
    )
    with one_at_a_time(options.cache.cache_dir):
        caches = preparation.prepare(open_pictures(options.data), rebuild=False, say=processes.say)
    return _Opened(caches if caches.val is not None else with_held_out(caches, processes))


def with_held_out(caches: Caches, processes: Processes) -> Caches:
    """The caches, with a tenth of the training pictures held out, two at least, chosen by a hash; says so.

    Raises UserError for fewer than three pictures.
    """
    samples = caches.train.samples
    if len(samples) < 3:
        raise UserError(
            f"A study judges its trials by pictures that they do not see: two at least, and there are {len(samples)} in all. Add "
            "pictures, or give val_data."
        )
    chosen = by_hash(samples, lambda one: one.sample_id, held_out_count(len(samples)))
    names = {one.sample_id for one in chosen}
    processes.say(f"{len(chosen)} of {len(samples)} pictures are held out to judge trials by, as there is no val_data")
    rest = [one for one in samples if one.sample_id not in names]
    return replace(caches, train=replace(caches.train, samples=rest), val=Cached(chosen, caches.train.stores))


def _unet(options: TrainRepaOptions, processes: Processes, warm: KeptModels) -> UNet2DConditionModel:
    base = locate_base(options.model.pretrained_model_name_or_path, (UNET, "scheduler"))
    dtype, channels_last = COMPUTE_DTYPES[options.model.mixed_precision], options.speed.channels_last
    weights = weight_fingerprint(base, UNET, options.cache.cache_dir / "weight_hashes.json")
    key = ["train_repa", str(base.path), weights, str(dtype), str(processes.device), channels_last]
    return warm.kept_unet(key, lambda: load_unet(base, dtype=dtype, device=processes.device), channels_last)


def _data_facts(options: TrainRepaOptions) -> list[Any]:
    """All that decides what pictures there are and what their caches hold."""
    data = options.data
    files = [file_facts(path) for path in (data.train_data, data.val_data, data.class_names)]
    groups = [flatten(group) for group in (options.model, data, options.cache)]
    return ["train_repa", groups, files, options.alignment.alignment]


def _base_key(options: TrainRepaOptions, task: RepaTask, pictures: HeldOut, caches: Caches) -> str:
    """Of all that decides the base's own losses, to the bit."""
    speed, val = options.speed, caches.val
    assert val is not None
    base = locate_base(options.model.pretrained_model_name_or_path, (UNET, "scheduler"))
    facts = [
        weight_fingerprint(base, UNET, options.cache.cache_dir / "weight_hashes.json"),
        flatten(options.model),
        [speed.sdpa, speed.xformers, speed.compile, speed.channels_last, speed.deterministic],
        [task.objective.kind, task.objective.schedule.prediction_type, str(task.processes.device)],
        [pictures.ids, tuple(pictures.latents.shape), [one.class_id for one in val.samples]],
        [val.stores["latents"].meta.producer, file_facts(caches.text_path)],
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def held_out_pictures(task: RepaTask) -> HeldOut:
    """At most MOST_PICTURES of the validation set, chosen by a hash."""
    samples = task.validation
    assert samples is not None
    names = set(by_hash(samples.sample_ids, str, MOST_PICTURES))
    places = np.array([place for place, name in enumerate(samples.sample_ids) if name in names], np.int64)
    without_tokens = CachedSamples(samples.sample_ids, samples.text_rows, samples.latents, None)
    batch = without_tokens.read(places).to(task.processes.device)

    def predict(noisy: Tensor, timesteps: Tensor, text: Tensor, rows: Tensor) -> Tensor:
        return task.predict(noisy, timesteps, text[rows])

    ids = [samples.sample_ids[place] for place in places]
    return HeldOut(ids, batch.latents.float(), None, lambda: task.embeddings[batch.text_rows], predict)
