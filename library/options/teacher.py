"""Latents that a frozen base draws from prompts: how they are drawn (prepare_cache.py), and trained on (train_network.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.checks import finite, require
from library.options.given import Count
from library.options.kohya.values import OptionalSize

FlowTarget = Literal["cfm", "reflow", "kd"]


@dataclass(frozen=True)
class TeacherDrawingOptions:
    """Latents to draw instead of encoding pictures (docs/flow.md)."""

    teacher_latents: Path | None = None
    """Draw latents with the base, from teacher_prompts, into an LMDB store in this folder. Run again, it continues."""
    teacher_prompts: Path | None = None
    """Prompts: .txt, one a line, where --n is a negative prompt and --d a seed; or .toml or .json, as for generate.py."""
    teacher_images: Count = 1
    """Latents of each prompt."""
    teacher_sampler: str = "DPM++ 2M"
    """Sampler, as in generate.py. flow_target reflow needs one that adds no noise of its own."""
    teacher_steps: Count = 30
    """Steps of the sampler."""
    teacher_cfg: float = 7.5
    """Guidance scale; 1 is without guidance."""
    teacher_seed: int = 42
    """Latents number i have the seed teacher_seed + i, where their prompt has none of its own."""
    teacher_size: OptionalSize = None
    """Side in pixels, or width and height. Default: the square that the base was trained at."""

    def __post_init__(self) -> None:
        for name in ("teacher_images", "teacher_steps"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}.")
        finite("teacher_cfg", self.teacher_cfg)
        require(self.teacher_cfg >= 1, "teacher_cfg", f"must be at least 1, got {self.teacher_cfg}.")
        require(0 <= self.teacher_seed < 2**63, "teacher_seed", f"must lie in 0..2^63, got {self.teacher_seed}.")
        if self.teacher_latents is None:
            for option in dataclasses.fields(self):
                is_default = getattr(self, option.name) == option.default
                require(
                    is_default, option.name, "has no effect without teacher_latents, the folder that is drawn into."
                )
            return
        require(
            self.teacher_prompts is not None, "teacher_prompts", "is missing: what teacher_latents are to be drawn of."
        )


@dataclass(frozen=True)
class DistillationOptions:
    """Training on latents that a teacher drew, in place of pictures (docs/flow.md)."""

    teacher_latents: Path | None = None
    """Train on the latents of this store, of prepare_cache.py --teacher_latents; their prompts are the captions."""
    flow_target: FlowTarget = "cfm"
    """What a flow learns of them. cfm: the way from fresh noise; reflow: from the noise that they were drawn from; kd: what the
    base says through its bridge, of a native student of the same base."""
    flow_kd_cfg: float = 1.0
    """With kd: guidance scale of the teacher, which the student then has built in. 1 is without."""
    any_teacher: bool = False
    """Take latents of another teacher than the base that is trained."""

    def __post_init__(self) -> None:
        finite("flow_kd_cfg", self.flow_kd_cfg)
        require(self.flow_kd_cfg >= 1, "flow_kd_cfg", f"must be at least 1, got {self.flow_kd_cfg}.")
        require(
            self.flow_kd_cfg == 1 or self.flow_target == "kd",
            "flow_kd_cfg",
            f"guides the teacher of kd, and flow_target {self.flow_target} asks none. Leave it out.",
        )
        require(
            not (self.any_teacher and self.flow_target == "kd"),
            "any_teacher",
            "does not go with flow_target kd, whose teacher is the base itself. Leave it out.",
        )
        for name in ("flow_target", "any_teacher"):
            is_default = getattr(self, name) == getattr(type(self), name)
            require(
                self.teacher_latents is not None or is_default,
                name,
                "has no effect without teacher_latents, the store of prepare_cache.py --teacher_latents.",
            )
