"""X/Y grids: a picture for every pair of values of two settings, on a sheet with headings. No torch.

An axis is a line of text, `name: values`, with the values of A1111's X/Y/Z plot:

    sampler: Euler, Euler a, DPM++ 2M           cfg: 3-9:2   or 3-9 (+2): 3, 5, 7, 9
    checkpoint: a.safetensors | b.safetensors   cfg: 3-9 [4]: four values, both ends among them
    prompt: cat, dog, "cat, sleeping"           seed: 1-4   steps: 10, 20-40:10

Values are separated by commas; one that contains a comma is written in double quotes, as in CSV. Checkpoints may be separated by |.
The first value of a prompt axis is searched for in the prompts and replaced by each value.
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from PIL import Image

from library.errors import UserError
from library.inference.grids import grid
from library.inference.picture_infotext import model_name
from library.inference.picture_request import PictureRequest
from library.inference.sampler_names import sampler_named, schedule_named
from library.options.parser import nearest

MOST_VALUES = 100
# The cost of changing a setting from cell to cell: the costliest changes least often.
_LOADS_A_MODEL, _FOLDS_ADAPTERS, _ENCODES_PROMPTS, _FREE, _IN_ONE_BATCH = 4, 3, 2, 1, 0


@dataclass(frozen=True)
class Axis:
    """A setting and its values. field: the name in a cell's changes."""

    name: str
    field: str
    values: tuple[Any, ...]
    headings: tuple[str, ...]
    cost: int


@dataclass(frozen=True)
class Cell:
    """A place of the sheet, and the settings of its picture.

    changes: some of the fields of PictureRequest (prompt, negative_prompt, steps, cfg_scale, sampler, schedule, clip_skip,
    denoising_strength; see `changed`), and four others: align_guidance (a strength), checkpoint (a base, as text), adapter_weight
    (of every adapter) and seed. The tags in a changed prompt already have the adapter_weight; the caller finds their files.
    """

    column: int
    row: int
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class _Kind:
    """A setting that can be an axis. read: parses one value; raises ValueError or UserError."""

    field: str
    read: Callable[[str], Any]
    heading: str = ""
    """Written before the value; empty where the value is self-explanatory."""
    cost: int = _FREE
    numbers: bool = False
    whole: bool = False


def parse_axis(text: str) -> Axis:
    """Parse an axis. Raises UserError for an unknown name (with the nearest), and for values of another type, out of bounds,
    repeated, missing, or more than MOST_VALUES."""
    written, colon, rest = text.partition(":")
    if not colon:
        raise UserError(f"An axis is written as name: values, for example cfg: 3-9:2. Got {text!r}.")
    name = _name_of(written)
    kind = _KINDS[name]
    values: list[Any] = []
    for piece in _split(name, rest):
        values += _range(name, kind, piece) or [_read(name, kind, piece)]
    if not values:
        raise UserError(f"The axis {name} has no values. Write {name}: {_EXAMPLES[name]}.")
    _at_most(name, len(values))
    for place, value in enumerate(values):
        if value in values[:place]:
            raise UserError(f"The axis {name} has {_text(value)} twice.")
    return Axis(name, kind.field, tuple(values), _headings(kind, values), kind.cost)


def plan_cells(x: Axis, y: Axis | None = None, *, prompt: str, negative_prompt: str = "") -> list[Cell]:
    """All cells in the order to draw them in: costly settings (a checkpoint, then adapters) change least often, and cells that
    differ in the seed alone are adjacent.

    Raises UserError where both axes are the same setting, or neither prompt contains what a prompt axis searches for.
    """
    if y is not None and x.field == y.field and x.name != _PROMPT:
        raise UserError(f"Both axes are {x.name}. Put another setting on one of them.")
    for axis in (x, y):
        searched = axis.values[0] if axis is not None and axis.name == _PROMPT else ""
        if searched not in prompt and searched not in negative_prompt:
            raise UserError(f"The axis prompt searches for {searched!r}, which is in neither prompt.")
    cells = [
        Cell(column, row, _changes([(x, column)] + ([] if y is None else [(y, row)]), prompt, negative_prompt))
        for row in range(1 if y is None else len(y.values))
        for column in range(len(x.values))
    ]
    if y is not None and x.cost > y.cost:
        cells.sort(key=lambda cell: cell.column)  # stable: rows stay in order
    return cells


def changed(request: PictureRequest, changes: Mapping[str, Any]) -> PictureRequest:
    """The request with a cell's changes, except checkpoint, adapter_weight and seed, which the caller applies.

    A denoising strength is that of the hires fix where there is one. Raises UserError where it would have no effect.
    """
    own = {name: value for name, value in changes.items() if name not in _NOT_OF_REQUESTS}
    if "denoising_strength" in own:
        if request.hires is not None:
            own["hires"] = replace(request.hires, denoising_strength=own.pop("denoising_strength"))
        elif request.init_image is None:
            raise UserError("The axis denoising needs the hires fix or a picture to begin with; there is neither.")
    if "align_guidance" in own:
        if request.reference is None:
            raise UserError("The axis align guidance needs a photo to steer towards. Name one with --align_reference.")
        own["reference"] = replace(request.reference, strength=own.pop("align_guidance"))
    return replace(request, **own)


def sheet(
    x: Axis,
    y: Axis | None,
    pictures: Mapping[tuple[int, int], Image.Image],
    *,
    title: str | None = None,
    say: Callable[[str], None] = lambda note: print(note, file=sys.stderr),
) -> Image.Image:
    """The pictures by (column, row) under their headings; places without one are crossed out. say: see `grid`."""
    rows = 1 if y is None else len(y.values)
    places = [(column, row) for row in range(rows) for column in range(len(x.values))]
    return grid(
        [pictures.get(place) for place in places],
        len(x.values),
        column_headings=x.headings,
        row_headings=None if y is None else y.headings,
        title=title,
        say=say,
    )


# The cells


def _changes(places: Sequence[tuple[Axis, int]], prompt: str, negative_prompt: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    prompts = (prompt, negative_prompt)
    for axis, place in places:
        if axis.name == _PROMPT:
            prompts = tuple(text.replace(axis.values[0], axis.values[place]) for text in prompts)  # type: ignore[assignment]
        else:
            changes[axis.field] = axis.values[place]
    if "adapter_weight" in changes:
        prompts = (_with_weight(prompts[0], changes["adapter_weight"]), prompts[1])
    after = dict(zip(("prompt", "negative_prompt"), prompts, strict=True))
    before = {"prompt": prompt, "negative_prompt": negative_prompt}
    return {**{name: text for name, text in after.items() if text != before[name]}, **changes}


def _with_weight(prompt: str, weight: float) -> str:
    """The prompt with this weight in every adapter's tag, so that the parameters text of the picture is right."""
    return _ADAPTER_TAG.sub(lambda tag: f"<{tag[1]}:{tag[2]}:{weight:g}>", prompt)


# Values of an axis


def _name_of(written: str) -> str:
    word = " ".join(written.replace("_", " ").split()).lower()
    name = _ALIASES.get(word, word)
    if name not in _KINDS:
        near = nearest(word, [*_KINDS, *_ALIASES])
        raise UserError(f"{written.strip() or 'Nothing'} is no axis of a grid{near}. Known are {', '.join(_KINDS)}.")
    return name


def _split(name: str, text: str) -> list[str]:
    """The values of an axis as text, without quotes; a line break separates them too."""
    delimiter = "|" if name == "checkpoint" and "|" in text else ","
    rows = csv.reader(io.StringIO(text.strip(), newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        return [value.strip() for row in rows for value in row if value.strip()]
    except csv.Error:
        raise UserError(
            f"The axis {name} has unpaired quotes: {text.strip()}. A value in quotes ends before the next comma, and a quote "
            'inside it is written twice ("").'
        ) from None


def _read(name: str, kind: _Kind, text: str) -> Any:
    try:
        return kind.read(text)
    except ValueError as error:
        raise UserError(f"The axis {name} wants {error}, got {text!r}.") from None
    except UserError as error:
        raise UserError(f"The axis {name}: {error}") from None


def _range(name: str, kind: _Kind, text: str) -> list[Any]:
    """Values of `3-9`, `3-9:2`, `3-9 (+2)` or `3-9 [4]`, where numbers are wanted; empty if it is none of these."""
    found = _RANGE.fullmatch(text) if kind.numbers else None
    if found is None:
        return []
    start, end = Decimal(found["start"]), Decimal(found["end"])
    if found["count"]:
        count = int(found["count"])
        step = (end - start) / max(count - 1, 1)
    else:
        step = abs(Decimal(found["step"] or 1)) * (1 if end >= start else -1)
        if found["signed"]:
            step = Decimal(found["signed"])
        if step == 0 or (end - start) / step < 0:
            raise UserError(f"The axis {name} cannot get from {start} to {end} in steps of {step}.")
        count = math.floor((end - start) / step) + 1
    _at_most(name, count)
    numbers = [round(start + step * place, 10) for place in range(count)]
    if found["count"] and kind.whole:
        numbers = [Decimal(math.trunc(number)) for number in numbers]  # as A1111: 1-10 [5] is 1, 3, 5, 7, 10
    return [_read(name, kind, f"{number.normalize():f}") for number in numbers]


def _at_most(name: str, count: int) -> None:
    if count > MOST_VALUES:
        raise UserError(f"The axis {name} has {count} values; at most {MOST_VALUES} are allowed.")


def _headings(kind: _Kind, values: Sequence[Any]) -> tuple[str, ...]:
    if kind.field == "checkpoint":
        names = [model_name(value) for value in values]
        return tuple(names if len(set(names)) == len(names) else values)
    prefix = f"{kind.heading}: " if kind.heading else ""
    return tuple(f"{prefix}{_text(value)}" for value in values)


def _text(value: Any) -> str:
    """3 for 3.0, and all digits of a seed."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise ValueError(f"whole numbers from {low} to {'2^63' if high > 2**60 else high}")
        return int(text)

    return read


def _number(wanted: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not holds(value):
            raise ValueError(wanted)
        return value

    return read


def _sampler(text: str) -> str:
    """The sampler of a request: "DPM++ 2M", or with a schedule, "DPM++ 2M Karras"."""
    name, schedule = sampler_named(text)
    return f"{name} {schedule}" if schedule else name


_PROMPT = "prompt"
_KINDS: dict[str, _Kind] = {
    "sampler": _Kind("sampler", _sampler),
    "schedule": _Kind("schedule", schedule_named),
    "steps": _Kind("steps", _whole(1, 1000), "Steps", numbers=True, whole=True),
    "cfg": _Kind("cfg_scale", _number("numbers from 1 on", lambda value: value >= 1), "CFG scale", numbers=True),
    "seed": _Kind("seed", _whole(0, 2**63 - 1), "Seed", _IN_ONE_BATCH, numbers=True, whole=True),
    "weight": _Kind("adapter_weight", _number("numbers", lambda _: True), "Weight", _FOLDS_ADAPTERS, numbers=True),
    "denoising": _Kind(
        "denoising_strength",
        _number("numbers above 0, up to 1", lambda value: 0 < value <= 1),
        "Denoising",
        numbers=True,
    ),
    "clip skip": _Kind("clip_skip", _whole(1, 12), "Clip skip", _ENCODES_PROMPTS, numbers=True, whole=True),
    "align guidance": _Kind(
        "align_guidance", _number("numbers from 0 on", lambda value: value >= 0), "Align guidance", numbers=True
    ),
    "checkpoint": _Kind("checkpoint", str, cost=_LOADS_A_MODEL),
    _PROMPT: _Kind("prompt", str, cost=_ENCODES_PROMPTS),
}
_ALIASES = {
    "sampling method": "sampler",
    "schedule type": "schedule",
    "scheduler": "schedule",
    "cfg scale": "cfg",
    "seeds": "seed",
    "lora": "weight",
    "lora weight": "weight",
    "adapter weight": "weight",
    "denoising strength": "denoising",
    "denoise": "denoising",
    "checkpoint name": "checkpoint",
    "model": "checkpoint",
    "prompt s/r": _PROMPT,
    "prompt sr": _PROMPT,
}
_EXAMPLES = {
    "sampler": "Euler, DPM++ 2M",
    "schedule": "Normal, Karras",
    "steps": "10, 20, 30",
    "cfg": "3-9:2",
    "seed": "1-4",
    "weight": "0, 0.5, 1",
    "denoising": "0.3, 0.5",
    "clip skip": "1, 2",
    "align guidance": "0, 0.5, 1",
    "checkpoint": "a.safetensors | b.safetensors",
    _PROMPT: "cat, dog",
}
_NOT_OF_REQUESTS = ("checkpoint", "adapter_weight", "seed")
_ADAPTER_TAG = re.compile(r"<(lora|lyco):([^:>]+)(?::[^>]*)?>")
_NUMBER = r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})"
_RANGE = re.compile(
    rf"(?P<start>{_NUMBER})\s*-\s*(?P<end>{_NUMBER})\s*"
    rf"(?::\s*(?P<step>{_NUMBER})|\(\s*(?P<signed>{_NUMBER})\s*\)|\[\s*(?P<count>[0-9]{{1,9}})\s*\])?"
)
