"""What a trial has to keep beside its value: numbers of at most 0 where it does, as Optuna's constraints are.

A component of a measurement whose name begins with `constraint_` is one. So far there is adherence to prompts, of the
objective image. A trial that broke one is never the best, whatever its value is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.models.locate import SHAPES, SHAPES_CLIP

if TYPE_CHECKING:
    from library.search.study.study import Terms

PREFIX = "constraint_"
ADHERENCE = "adherence"


def constraints_of(components: Mapping[str, float | None] | None) -> dict[str, float]:
    """Those among a measurement's components, under their own names."""
    found = (components or {}).items()
    return {name.removeprefix(PREFIX): value for name, value in found if name.startswith(PREFIX) and value is not None}


def is_broken(components: Mapping[str, float | None] | None) -> bool:
    return any(value > 0 for value in constraints_of(components).values())


def constraints_measured(terms: Terms) -> tuple[str, ...]:
    """Names of those that each trial of a study is measured by; none with the objective loss."""
    if terms.objective != "image":
        return ()
    options = {**terms.space.options, **terms.options}
    base = str(options.get("pretrained_model_name_or_path", ""))
    return () if clip_of(terms.judging.get("clip_model"), base) is None else (ADHERENCE,)


def clip_of(clip_model: str | None, base: str) -> str | None:
    """What looks whether pictures follow their prompts: the model that was asked for, or the embedded base's own."""
    return clip_model or (SHAPES_CLIP if base == SHAPES else None)
