"""What train_lyra.py looks at before torch is imported: encoders, captions, what will be written; and its --dry_run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from library.data.caption_lists import captions_of_datasets, captions_of_file, demo_captions
from library.data.order import BatchOrder, Group
from library.data.training_images import held_out
from library.errors import check_all
from library.files import require_file_name, require_writable
from library.models.language_files import check_language, language_status
from library.models.locate import base_status, check_base
from library.options.lyra import DEMO_CAPTIONS, TrainLyraOptions
from library.training.earlier import check_earlier
from library.training.plan import make_plan
from library.training.saving import saving_of


@dataclass(frozen=True)
class Captions:
    """training: with the empty prompt as often as it is to be seen in an epoch."""

    training: list[str]
    validation: list[str]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.training, self.validation]).encode()).hexdigest()


def check_lyra(options: TrainLyraOptions) -> None:
    """Look at encoders, captions and what will be written, which takes no second. Raises UserError with a line for each fault."""
    output, captions = options.output, options.data.captions
    checks: list[Callable[[], object]] = [partial(check_base, options.model.pretrained_model_name_or_path)]
    checks += [partial(check_language, name) for name in options.model.encoders]
    if captions not in (None, DEMO_CAPTIONS):
        checks.append(lambda: read_captions(options))
    checks += [partial(require_writable, folder) for folder in (output.output_dir, options.data.cache_dir)]
    longest = saving_of(output).longest_name(options.optimizer.ema_decay > 0)
    checks += [partial(require_file_name, output.output_dir / longest), partial(check_earlier, options)]
    check_all(*checks)


def print_plan(options: TrainLyraOptions) -> None:
    """--dry_run."""
    if os.environ.get("RANK", "0") != "0":
        return
    check_lyra(options)
    captions = split(read_captions(options), options)
    plan = make_plan(
        order_of(captions, options, 0, int(os.environ.get("WORLD_SIZE", "1"))), options.training, options.optimizer
    )
    base = options.model.pretrained_model_name_or_path
    print(f"encoders         those of {base}, {', '.join(options.model.encoders)}")
    print(f"captions         {len(captions.training)} an epoch, {len(captions.validation)} held out")
    print(f"batch            {plan.batch_size} x {plan.accumulation} accumulated x {plan.world_size} processes")
    print(f"steps            {plan.last_step} ({plan.epochs:g} epochs), warm-up {plan.warmup_steps}")
    absent = [base_status(base), *map(language_status, options.model.encoders)]
    for sentence in list(filter(None, absent)) or ["nothing"]:
        print(f"missing          {sentence}")


def read_captions(options: TrainLyraOptions) -> list[str]:
    """Each once, without the empty one. Raises UserError."""
    named = options.data.captions
    if named is not None and named != DEMO_CAPTIONS:
        return captions_of_file(Path(named))
    if (file := options.dataset_file) is not None:
        return captions_of_datasets(file)
    return demo_captions()


def split(captions: Sequence[str], options: TrainLyraOptions) -> Captions:
    """Those to train on and those held out, by a hash of each."""
    held = held_out(captions, options.data.validation_split, options.training.seed)
    training = [caption for caption in captions if caption not in held]
    share = options.data.empty_share
    empty = round(len(training) * share / (1 - share))
    return Captions([*training, *[""] * empty], [caption for caption in captions if caption in held])


def order_of(captions: Captions, options: TrainLyraOptions, rank: int, world_size: int) -> BatchOrder:
    training = options.training
    group = Group(np.arange(len(captions.training)), training.train_batch_size)
    return BatchOrder([group], training.seed, rank, world_size, training.gradient_accumulation_steps, whole_steps=True)
