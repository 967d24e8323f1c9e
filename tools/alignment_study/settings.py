"""What is compared: two studies, their runs, and the commands that train them. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import file_hash, read_json, write_json
from library.models.embedded import SHAPES, SHAPES_CLIP, SHAPES_DINOV2
from library.models.locate import DINOV2, locate_base, locate_dino, weight_files
from tools.alignment_study.arms import WITHOUT, Arm

SIDE = 128
CLASSES, CONCEPT = "classes", "concept"
STUDIES = (CLASSES, CONCEPT)
BASE = "base"
WARMUP = 0.05  # of the steps: Track A's 3,000 of 62,480
AVERAGED = 0.05  # of the steps: train_repa's 0.9995 averages about 2,000 of 62,480, and would hardly leave a short run's beginning
VALIDATIONS = 8
CONCEPT_BATCH = 4
TEACHER_RESOLUTION = 224  # the tiny teacher's own
ADAPTER = ("--network_dim", "8", "--network_alpha", "8")


@dataclass(frozen=True)
class Settings:
    """Everything that moves the numbers of a run but its arm and its seed; one for all runs of a folder."""

    base: str = SHAPES
    """Base model."""
    teacher: str = SHAPES_DINOV2
    """DINOv2 that the heads learn from, and that judges likeness and drift."""
    clip: str = SHAPES_CLIP
    """CLIP that judges likeness too: no run has learned from it."""
    tap: str = "mid"
    """Where the heads sit, and where features are measured. Its map at mid is 2 x 2 at 128 px, at up_blocks.1 8 x 8."""
    token_grid: int = 4
    """Rows and columns of the teacher's tokens: at mid twice those of the map, as at 512 px."""
    steps: int = 400
    """Optimizer steps of a run on the new classes."""
    concept_steps: int = 300
    """Optimizer steps of a run on the new concept."""
    batch_size: int = 8
    """Pictures per step of the new classes."""
    learning_rate: float = 1e-3
    """Peak learning rate of LoRA and heads."""
    lora_scope: str = "all"
    """Blocks with LoRA on the new classes: mid, down_mid or all."""
    train_pictures: int = 360
    """Pictures of the new classes to train on; there are 9 classes."""
    held_out: int = 180
    """Further ones to measure on."""
    drawn_seeds: int = 4
    """Pictures of each prompt."""
    sampling_steps: int = 20
    """Steps of the sampler."""
    reader_steps: int = 600
    """Steps that the classifier is trained for that reads shape and colour off the pictures."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"{field.name} must be positive, got {value}.")
        if self.drawn_seeds < 2:
            raise UserError(f"drawn_seeds must be at least 2, to know a spread, got {self.drawn_seeds}.")
        for name in ("train_pictures", "held_out"):
            if getattr(self, name) % 9:
                raise UserError(
                    f"{name} must be a multiple of 9, so that each class has as many, got {getattr(self, name)}."
                )


@dataclass(frozen=True)
class Run:
    """One training."""

    study: str
    arm: Arm
    seed: int

    @property
    def folder_name(self) -> str:
        arm = f"{self.arm.recipe}_" if self.arm.recipe else ""
        return f"{arm}lambda{self.arm.coefficient:g}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.study}, {self.arm.title}, seed {self.seed}"


@dataclass(frozen=True)
class Folders:
    """Where everything of a comparison lies."""

    out: Path

    def study(self, study: str) -> Path:
        return self.out / study

    def run(self, run: Run) -> Path:
        return self.study(run.study) / run.folder_name

    def pictures(self, study: str) -> Path:
        return self.study(study) / "pictures"

    def caches(self, study: str) -> Path:
        return self.study(study) / "caches"


def make_runs(studies: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """All arms of a seed before the next seed, so that what is there at any time can be compared.

    An arm with a teacher comes first: it builds all caches. Raises UserError where there is nothing to compare.
    """
    found = list(dict.fromkeys(map(Arm.parse, arms)))
    if len(found) < 2 or WITHOUT not in map(str, found):
        raise UserError(f"arms must name 0 and at least one other, got {' '.join(arms)}.")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must name each once, none below 0, got {list(seeds)}.")
    found.sort(key=lambda arm: not arm.needs_teacher)
    return [Run(study, arm, seed) for study in studies for seed in seeds for arm in found]


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Without alignment first, then other lambdas, then recipes."""
    return sorted(runs, key=lambda run: (run.arm.recipe, run.arm.coefficient, run.seed))


def cache_command(settings: Settings, folders: Folders) -> list[str]:
    """Caches of the new classes; train_network.py builds its own."""
    return [
        sys.executable,
        "prepare_cache.py",
        *_classes_options(settings, folders),
        "--max_data_loader_n_workers",
        "2",
    ]


def train_command(run: Run, settings: Settings, folders: Folders) -> list[str]:
    """As a user would start it, from the repository's root."""
    if run.study == CLASSES:
        return [
            sys.executable,
            "train_repa.py",
            *_classes_options(settings, folders),
            *_repa_options(run, settings, folders),
        ]
    return [sys.executable, "train_network.py", *_concept_options(run, settings, folders)]


def _classes_options(settings: Settings, folders: Folders) -> list[str]:
    pictures = folders.pictures(CLASSES)
    return _words(
        ["--pretrained_model_name_or_path", settings.base, "--dino_model", settings.teacher, "--mixed_precision", "no"],
        ["--train_data", pictures / "train.csv", "--val_data", pictures / "val.csv"],
        ["--class_names", pictures / "class_names.json", "--resolution", SIDE],
        ["--cache_dir", folders.caches(CLASSES), *_tokens(settings)],
    )


def _tokens(settings: Settings) -> list[Any]:
    return ["--dino_resolution", TEACHER_RESOLUTION, "--token_grid", settings.token_grid]


def _repa_options(run: Run, settings: Settings, folders: Folders) -> list[str]:
    every = max(1, settings.steps // VALIDATIONS)
    return _words(
        [*ADAPTER, "--lora_scope", settings.lora_scope, "--taps", settings.tap],
        ["--align_coeff", f"{run.arm.coefficient:g}", "--align_warmup_steps", round(settings.steps * WARMUP)],
        run.arm.words(settings.steps),
        ["--train_batch_size", settings.batch_size, "--max_train_steps", settings.steps],
        ["--learning_rate", settings.learning_rate, "--ema_decay", ema_decay(settings.steps), "--seed", run.seed],
        ["--validate_every_n_steps", every, "--save_every_n_steps", 2 * every, "--save_last_n_states", 1],
        ["--max_data_loader_n_workers", 1, "--output_dir", folders.run(run), "--output_name", CLASSES],
    )


def ema_decay(steps: int) -> float:
    """So that the average reaches back over `AVERAGED` of the steps."""
    return round(1 - 1 / max(2.0, AVERAGED * steps), 4)


def _concept_options(run: Run, settings: Settings, folders: Folders) -> list[str]:
    alignment: list[Any] = []
    if run.arm.coefficient:
        alignment = ["--alignment", "--dino_model", settings.teacher, *_tokens(settings), "--taps", settings.tap]
        alignment += ["--align_coeff", f"{run.arm.coefficient:g}"]
        alignment += ["--align_warmup_steps", round(settings.concept_steps * WARMUP)]
        alignment += run.arm.words(settings.concept_steps)
    return _words(
        ["--pretrained_model_name_or_path", settings.base],
        ["--train_data_dir", folders.pictures(CONCEPT) / "train", "--caption_extension", ".txt", "--resolution", SIDE],
        ["--cache_dir", folders.caches(CONCEPT), *ADAPTER, *alignment],
        ["--train_batch_size", CONCEPT_BATCH, "--max_train_steps", settings.concept_steps],
        ["--learning_rate", settings.learning_rate, "--seed", run.seed],
        ["--output_dir", folders.run(run), "--output_name", CONCEPT],
    )


def _words(*parts: Sequence[Any]) -> list[str]:
    return [str(word) for part in parts for word in part]


def adapter_file(run: Run, folders: Folders) -> Path:
    """What a finished training leaves: of train_repa.py the averaged weights, which its validation measures too."""
    return folders.run(run) / (f"{CLASSES}-ema.safetensors" if run.study == CLASSES else f"{CONCEPT}.safetensors")


def claim_folder(folders: Folders, settings: Settings, make_teacher: Callable[[], object] | None = None) -> None:
    """Note in the folder what its runs are made with. Raises UserError where it holds runs that were made otherwise.

    make_teacher: trains the teacher that `settings` name, if it is not there; called when all else agrees.
    """
    file = folders.out / "settings.json"
    commands = [train_command(Run(study, Arm("", 1.0), 1), settings, Folders(Path("out")))[1:] for study in STUDIES]
    wanted = {**asdict(settings), "commands": commands}
    there = read_json(file) if file.exists() else None
    _refuse_others(folders, there, wanted)
    if make_teacher is not None:
        make_teacher()
    wanted["weights"] = _weights(settings)
    _refuse_others(folders, there, wanted)
    if there is None:
        write_json(file, wanted)


def _refuse_others(folders: Folders, there: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    changed = [] if there is None else [name for name in wanted if there.get(name) != wanted[name]]
    if there is not None and changed:
        said = [f"{name} {there.get(name)!s:.40} is now {wanted[name]!s:.40}" for name in changed if name != "commands"]
        raise UserError(
            f"{folders.out} holds runs made otherwise: {', '.join(said) or 'the commands that train are others now'}. "
            "Name another --out, move it away, or go back to its settings."
        )


def _weights(settings: Settings) -> str:
    """Of base and teacher: trained anew, they make other numbers."""
    base, teacher = locate_base(settings.base), locate_dino(settings.teacher)
    files = (
        [base.path]
        if base.is_file
        else [file for part in ("unet", "vae", "text_encoder") for file in weight_files(base.path, part)]
    )
    files += [teacher.path] if teacher.is_file else weight_files(teacher.path, DINOV2)
    return " ".join(file_hash(file)[:8] for file in files)
