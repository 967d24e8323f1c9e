"""What an evaluation of checkpoints found: numbers with their errors, which differences are significant, and which one to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from library.evaluation.measure_table import MEASURES
from library.evaluation.standard_errors import Estimate

BASE = "base"
"""The name of the base without an adapter among the checkpoints."""


@dataclass
class CheckpointPictures:
    """The pictures of one checkpoint, and its losses [photos, timesteps]."""

    subject: list[Image.Image]
    unrelated: list[Image.Image]
    losses: Tensor | None


@dataclass(frozen=True)
class NearTraining:
    """A drawn picture of the subject beside the training picture that is nearest to it. place: among the checkpoint's."""

    checkpoint: str
    place: int
    cosine: float
    photo: Image.Image
    photo_name: str
    is_copy: bool


@dataclass
class GenerationResult:
    """steps: of each checkpoint, in order. drawn, estimates: by checkpoint, BASE first.

    against_base: the paired difference to the base, of measures not from_base; against_last: of all measures, of each checkpoint
    but the last to the last.
    anchors: values to compare a measure with, by its name. strength: the checkpoint to use at several weights. near_training: the
    pictures of checkpoints that are nearest to a training picture, the nearest first.
    """

    steps: Mapping[str, int | None]
    drawn: dict[str, CheckpointPictures]
    estimates: dict[str, dict[str, Estimate]]
    against_base: dict[str, dict[str, Estimate]]
    against_last: dict[str, dict[str, Estimate]]
    best: dict[str, Best]
    anchors: dict[str, float]
    notes: list[str]
    strength: Strength | None = None
    near_training: Sequence[NearTraining] = ()

    @property
    def names(self) -> list[str]:
        """The checkpoints' names, without the base."""
        return list(self.steps)

    @property
    def measured(self) -> list[str]:
        return list(self.estimates[BASE])

    def to_json(self) -> dict[str, Any]:
        """Everything except the pictures; nan becomes null."""
        rows = []
        for name, step in {BASE: 0, **self.steps}.items():
            row: dict[str, Any] = {"name": name, "step": step}
            row["metrics"] = {measure: estimate.to_json() for measure, estimate in self.estimates[name].items()}
            if name != BASE:
                row["against_base"] = {
                    measure: {**gap.to_json(), "told_apart": gap.is_significant}
                    for measure, gap in self.against_base[name].items()
                }
            rows.append(row)
        return {
            "meanings": {name: MEASURES[name].meaning for name in self.measured},
            "checkpoints": rows,
            "best": {name: {"checkpoint": best.name, "not_told_apart": best.alike} for name, best in self.best.items()},
            "anchors": self.anchors,
            "left_out": self.notes,
            "near_training": [
                {
                    "checkpoint": one.checkpoint,
                    "picture": one.place,
                    "training_picture": one.photo_name,
                    "cosine": one.cosine,
                    "is_copy": one.is_copy,
                }
                for one in self.near_training
            ],
            "strength": None if self.strength is None else self.strength.to_json(),
        }


@dataclass(frozen=True)
class Strength:
    """A checkpoint at several weights, ascending. swept: the same measures, with weights in place of checkpoints."""

    checkpoint: str
    weights: Sequence[float]
    swept: GenerationResult

    @property
    def alike(self) -> list[float]:
        """The weights around the one of the highest likeness, without a gap, whose likeness does not differ significantly from it.

        None where likeness was not measured, or is nowhere significantly above the base's.
        """
        best = self.swept.best.get("likeness")
        if best is None or not rises(self.swept.against_base[best.name]["likeness"]):
            return []
        among = [place for place, name in enumerate(self.swept.names) if name in (best.name, *best.alike)]
        place = self.swept.names.index(best.name)
        low, high = place, place
        while low - 1 in among and rises(self.swept.against_base[self.swept.names[low - 1]]["likeness"]):
            low -= 1
        while high + 1 in among:
            high += 1
        return list(self.weights[low : high + 1])

    @property
    def recommended(self) -> float | None:
        """The weight from which on likeness no longer rises beyond its interval."""
        return self.alike[0] if self.alike else None

    def to_json(self) -> dict[str, Any]:
        swept = self.swept.to_json()
        alike = self.alike
        return {
            "checkpoint": self.checkpoint,
            "recommended": self.recommended,
            "interval": [alike[0], alike[-1]] if alike else None,
            "weights": [{**row, "name": float(row["name"])} for row in swept["checkpoints"] if row["name"] != BASE],
        }


def rises(gap: Estimate) -> bool:
    """Whether a difference is significantly above 0."""
    return gap.is_significant and gap.value > 0


@dataclass(frozen=True)
class Best:
    """The best checkpoint by one measure. alike: those that do not differ from it significantly."""

    name: str
    alike: list[str]


def to_use(result: GenerationResult) -> str:
    """The checkpoint to use: of those that are not significantly less like the subject than the most like one (without likeness:
    whose loss is not significantly above the lowest) the one with the least drift, where that is significantly less than the last
    one's. One that follows unrelated prompts significantly less than the base does or copies training pictures is taken only where
    all do. Where nothing says what is like the subject, the last."""
    last, best = result.names[-1], result.best.get("likeness") or result.best.get("loss")
    if best is None:
        return last
    among = [name for name in result.names if name in (best.name, *best.alike)]
    obeys = [name for name in among if not (follows_less(result, name) or copies(result, name))] or among
    least = min(obeys, key=lambda name: result.estimates[name]["drift"].value)
    drifts_less = least != last and result.against_last[least]["drift"].is_significant
    return least if drifts_less or last not in obeys else last


def follows_less(result: GenerationResult, name: str) -> bool:
    """Whether a checkpoint follows unrelated prompts significantly less than the base."""
    gap = result.against_base[name].get("adherence")
    return gap is not None and gap.is_significant and gap.value < 0


def copies(result: GenerationResult, name: str) -> bool:
    """Whether significantly more of its pictures are copies of training pictures than may be by chance, and than of the base's."""
    share, gap = result.estimates[name].get("copies"), result.against_base[name].get("copies")
    return (
        share is not None and gap is not None and rises(gap) and share.value - share.margin > result.anchors["copies"]
    )
