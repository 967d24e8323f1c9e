"""Constraints of a trial beside its value: numbers that are at most 0 where the trial keeps them, as Optuna defines them.

A component of a measurement whose name begins with `constraint_` is a constraint. There is one so far: that pictures follow
their prompts (adherence), of the objective image. A trial that breaks a constraint is never the best, whatever its value.
"""

from __future__ import annotations

from collections.abc import Mapping

from library.models.embedded import SHAPES, SHAPES_CLIP
from library.search.terms import Terms

PREFIX = "constraint_"
ADHERENCE = "adherence"


def constraints_of(components: Mapping[str, float | None] | None) -> dict[str, float]:
    """The constraints among a measurement's components, under their names without the prefix."""
    found = (components or {}).items()
    return {name.removeprefix(PREFIX): value for name, value in found if name.startswith(PREFIX) and value is not None}


def is_broken(components: Mapping[str, float | None] | None) -> bool:
    return any(value > 0 for value in constraints_of(components).values())


def constraints_measured(terms: Terms) -> tuple[str, ...]:
    """Names of the constraints that each trial of a study is measured by; the objective loss has none."""
    if terms.objective != "image":
        return ()
    options = {**terms.space.options, **terms.options}
    base = str(options.get("pretrained_model_name_or_path", ""))
    return () if clip_of(terms.judging.get("clip_model"), base) is None else (ADHERENCE,)


def clip_of(clip_model: str | None, base: str) -> str | None:
    """The CLIP that measures adherence: the one that was asked for, or the embedded base's own; None where there is none."""
    return clip_model or (SHAPES_CLIP if base == SHAPES else None)
