"""The commands that train the runs of a comparison, as a user would start them from the repository's root. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.alignment_study.settings import CONCEPT, PLAIN, SCRATCH, Folders, Run, Settings

WARMUP = 0.05  # of the steps: Track A's 3,000 of 62,480
AVERAGED = 0.05  # of the steps: train_repa's 0.9995 averages about 2,000 of 62,480, and would hardly leave a short run's beginning
VALIDATIONS = 8
ADAPTER = ("--network_dim", "8", "--network_alpha", "8")
CONCEPT_BATCH = 4
CONTROL_SIDE, CONTROL_BATCH, SCRATCH_RATE = 64, 16, 1.5e-3
WHOLE_UNET = (
    *("--network_dim", "64", "--network_alpha", "64", "--lora_scope", "all"),
    *("--train_parts", "time_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out"),
)
"""Every linear layer and convolution of a U-Net is trained, those of the attention by adapters of nearly full rank, the others
themselves. The scales of the normalisations keep what they begin with, 1 and 0."""
FEW_VALIDATED = ("--max_validation_samples", "200")
KEEP_ALL = 1000
"""States of a run from nothing: also those that an interruption leaves."""


@dataclass(frozen=True)
class Plan:
    """What is trained in a study, on what, and for how long. words: the options that say what; base: model that its runs begin
    with; teacher: what its heads learn from; side: of its pictures, in pixels."""

    words: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    base: str
    teacher: str
    side: int


def plan_of(study: str, settings: Settings, folders: Folders) -> Plan:
    """Of a study of `STUDIES`. The two on the control's pictures share a teacher."""
    rate, of_control = settings.learning_rate, (str(folders.study(SCRATCH) / "teacher"), CONTROL_SIDE)
    if study == SCRATCH:
        untrained = str(folders.study(SCRATCH) / "untrained")
        return Plan(
            (*WHOLE_UNET, *FEW_VALIDATED), settings.scratch_steps, CONTROL_BATCH, SCRATCH_RATE, untrained, *of_control
        )
    own = (settings.base, settings.teacher, settings.resolution)
    if study == CONCEPT:
        return Plan(ADAPTER, settings.concept_steps, CONCEPT_BATCH, rate, *own)
    words = (*ADAPTER, "--lora_scope", settings.lora_scope)
    if study == PLAIN:
        return Plan((*words, *FEW_VALIDATED), settings.steps, CONTROL_BATCH, rate, settings.base, *of_control)
    return Plan(words, settings.steps, settings.batch_size, rate, *own)


def cache_command(study: str, settings: Settings, folders: Folders) -> list[str]:
    """Caches for train_repa.py; train_network.py builds its own."""
    words = [*_classes_options(study, settings, folders), "--max_data_loader_n_workers", "2"]
    return [sys.executable, "prepare_cache.py", *words]


def train_command(run: Run, settings: Settings, folders: Folders, into: Path | None = None) -> list[str]:
    """into: the output folder, instead of the run's own."""
    output = ["--output_dir", str(into or folders.run(run)), "--output_name", run.study]
    if run.study == CONCEPT:
        return [sys.executable, "train_network.py", *_concept_options(run, settings, folders), *output]
    words = [*_classes_options(run.study, settings, folders), *_repa_options(run, settings, folders)]
    return [sys.executable, "train_repa.py", *words, *output]


def adapter_file(run: Run, folders: Folders) -> Path:
    """What a finished training leaves: of train_repa.py the averaged weights, which its validation measures too."""
    return folders.run(run) / f"{run.study}{'' if run.study == CONCEPT else '-ema'}.safetensors"


def validation_steps(steps: int) -> int:
    """Steps between two validations; every second one leaves a state."""
    return max(1, steps // VALIDATIONS)


def ema_decay(steps: int) -> float:
    """So that the average reaches back over `AVERAGED` of the steps."""
    return round(1 - 1 / max(2.0, AVERAGED * steps), 4)


def _classes_options(study: str, settings: Settings, folders: Folders) -> list[str]:
    pictures, plan = folders.pictures(study), plan_of(study, settings, folders)
    return _words(
        ["--pretrained_model_name_or_path", plan.base, "--dino_model", plan.teacher],
        ["--mixed_precision", settings.mixed_precision],
        ["--train_data", pictures / "train.csv", "--val_data", pictures / "val.csv"],
        ["--class_names", pictures / "class_names.json", "--resolution", plan.side],
        ["--cache_dir", folders.caches(study), *_tokens(settings)],
    )


def _tokens(settings: Settings) -> list[Any]:
    return ["--dino_resolution", settings.dino_resolution, "--token_grid", settings.token_grid]


def _repa_options(run: Run, settings: Settings, folders: Folders) -> list[str]:
    plan = plan_of(run.study, settings, folders)
    every, states = validation_steps(plan.steps), KEEP_ALL if run.study == SCRATCH else 1
    return _words(
        [*plan.words, "--taps", settings.tap],
        ["--align_coeff", f"{run.arm.coefficient:g}", "--align_warmup_steps", round(plan.steps * WARMUP)],
        run.arm.words(plan.steps),
        ["--train_batch_size", plan.batch_size, "--max_train_steps", plan.steps],
        ["--learning_rate", plan.learning_rate, "--ema_decay", ema_decay(plan.steps), "--seed", run.seed],
        ["--validate_every_n_steps", every, "--save_every_n_steps", 2 * every, "--save_last_n_states", states],
        ["--max_data_loader_n_workers", 1],
    )


def _concept_options(run: Run, settings: Settings, folders: Folders) -> list[str]:
    plan, alignment = plan_of(CONCEPT, settings, folders), list[Any]()
    if run.arm.coefficient:
        alignment = ["--alignment", "--dino_model", plan.teacher, *_tokens(settings), "--taps", settings.tap]
        alignment += ["--align_coeff", f"{run.arm.coefficient:g}"]
        alignment += ["--align_warmup_steps", round(plan.steps * WARMUP)]
        alignment += run.arm.words(plan.steps)
    return _words(
        ["--pretrained_model_name_or_path", plan.base],
        ["--mixed_precision", settings.mixed_precision],
        ["--train_data_dir", folders.pictures(CONCEPT) / "train", "--caption_extension", ".txt"],
        ["--resolution", plan.side, "--cache_dir", folders.caches(CONCEPT), *plan.words, *alignment],
        ["--train_batch_size", plan.batch_size, "--max_train_steps", plan.steps],
        ["--learning_rate", plan.learning_rate, "--seed", run.seed],
    )


def _words(*parts: Sequence[Any]) -> list[str]:
    return [str(word) for part in parts for word in part]
