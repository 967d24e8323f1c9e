"""What is compared: the studies, their runs, and what all runs of a folder share. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from library.errors import UserError
from library.models.embedded import SHAPES, SHAPES_CLIP, SHAPES_DINOV2
from tools.alignment_study.arms import WITHOUT, Arm

SCRATCH, PLAIN, CLASSES, CONCEPT = "scratch", "plain", "classes", "concept"
STUDIES = (SCRATCH, PLAIN, CLASSES, CONCEPT)


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
    """Optimizer steps of a run on the new classes, and of a LoRA on the control's pictures."""
    concept_steps: int = 300
    """Optimizer steps of a run on the new concept."""
    batch_size: int = 8
    """Pictures per step of the new classes."""
    learning_rate: float = 1e-3
    """Peak learning rate of LoRA and heads."""
    lora_scope: str = "all"
    """Blocks with LoRA in these two: mid, down_mid or all."""
    resolution: int = 128
    """Side of the pictures, in pixels."""
    dino_resolution: int = 224
    """Side of the teacher's pictures, in pixels."""
    mixed_precision: str = "no"
    """Number format of the trainings: no, fp16 or bf16."""
    train_pictures: int = 360
    """Drawn pictures of the new classes to train on; there are 9 classes."""
    held_out: int = 180
    """Further ones to measure on."""
    drawn_seeds: int = 4
    """Pictures of each prompt."""
    sampling_steps: int = 20
    """Steps of the sampler."""
    reader_steps: int = 600
    """Steps that the classifier is trained for that reads shape and colour off the pictures."""
    scratch_steps: int = 1000
    """Optimizer steps of a run from nothing, the positive control."""
    scratch_teacher_steps: int = 500
    """Steps that the teacher of the control's pictures is trained for, on others like them."""
    class_data: str = ""
    """Folder of class folders instead of the drawn new classes."""
    concept_data: str = ""
    """Folder of captioned pictures instead of the drawn new concept."""

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

    @property
    def own_pictures(self) -> bool:
        """Whether the pictures are the user's: no classifier knows what is on them."""
        return bool(self.class_data or self.concept_data)

    @property
    def clip_judges(self) -> bool:
        """Not the one of the tiny base of photos, which it has never seen."""
        return not self.own_pictures or self.clip != SHAPES_CLIP


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
