"""Whether an evaluation can begin, before anything large is loaded: for dry runs, and before every run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from library.errors import check_all
from library.evaluation.generation import GenerationPlan
from library.evaluation.picture_encoders import check_clip_pictures
from library.inference.base_check import check_base_fits
from library.models.dinov2 import check_dinov2
from library.models.locate import base_status, check_base, locate_base


def check_generation(plan: GenerationPlan) -> None:
    """Raise UserError, a line for each fault, where `evaluate_generation` would before its first picture.

    Models that the hub has yet to send are not looked into. Reads headers and configurations.
    """

    def check_base_of_plan() -> None:
        check_base(plan.base)
        if base_status(plan.base) is None:
            adapters = {candidate.path: plan.adapters[candidate.name] for candidate in plan.candidates}
            check_base_fits(locate_base(plan.base), adapters, clip_skip=plan.clip_skip)

    checks: list[Callable[[], object]] = [check_base_of_plan, partial(check_dinov2, plan.dino_model)]
    if plan.clip_model is not None:
        checks.append(partial(check_clip_pictures, plan.clip_model))
    check_all(*checks)
