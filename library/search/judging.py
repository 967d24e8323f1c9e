"""Settings of the objective image, as --objective_args gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from library.errors import UserError
from library.options.command_line import nearest


@dataclass(frozen=True)
class Judging:
    """How pictures of a trial are drawn and compared; the same for all trials of a study."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompts: tuple[str, ...] = ()
    """Prompts of the subject. Default: captions of held-out pictures, at most four."""
    unrelated: tuple[str, ...] = ()
    """Prompts of other things, for drift and adherence. Default: four of evaluate.py's."""
    seeds: int = 2
    """Pictures drawn for each prompt."""
    steps: int = 20
    cfg_scale: float = 7.0
    size: int | None = None
    """Side in pixels. Default: the size that the base was trained at."""
    dino_model: str | None = None
    """Default: the training's dino_model, the first of several."""
    clip_model: str | None = None
    """CLIP that measures adherence, which is not measured without one. The embedded base comes with its own."""
    drift_weight: float = 0.5
    """A guess: half a point of likeness for a point of drift."""
    adherence_margin: float = 0.02
    """How far the mean CLIP cosine may fall below the base's, or two standard errors of the base's where that is more."""


def read_judging(values: Mapping[str, Any]) -> Judging:
    """Raises UserError for unknown settings and values of the wrong type."""
    try:
        judging = TypeAdapter(Judging).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        where = f"The setting {name} of the objective image"
        if first["type"] == "unexpected_keyword_argument":
            raise UserError(f"{where} is unknown{nearest(name, Judging.__dataclass_fields__)}.") from None
        raise UserError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}.") from None
    for name in ("seeds", "steps"):
        if getattr(judging, name) < 1:
            raise UserError(
                f"The setting {name} of the objective image must be at least 1, got {getattr(judging, name)}."
            )
    if judging.size is not None and (judging.size < 64 or judging.size % 8):
        raise UserError(
            f"The setting size of the objective image must be a multiple of 8 from 64 on, got {judging.size}."
        )
    return judging
