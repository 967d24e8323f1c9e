"""Values that kohya's command lines and files spell in more ways than one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator
from tyro.constructors import PrimitiveConstructorSpec


def steps_or_share(value: Any) -> Any:
    """ "10%" as 0.1; anything else as it is. Raises ValueError for a percentage that is none, or is not below 100."""
    if not isinstance(value, str) or not value.strip().endswith("%"):
        return value
    share = float(value.strip()[:-1]) / 100
    if not 0 <= share < 1:
        raise ValueError(f"a share must lie between 0% and 100%, got {value}")
    return share


def size(value: Any) -> Any:
    """512, "512", "512,768" or [512, 768] as (width, height)."""
    if isinstance(value, str):
        value = [int(part) for part in value.split(",")]
    if isinstance(value, int):
        value = [value]
    if isinstance(value, list | tuple):
        value = tuple(value) * (2 if len(value) == 1 else 1)
    return value


def span(value: Any) -> Any:
    """ "1.0,2.5" or [1.0, 2.5] as (1.0, 2.5)."""
    if isinstance(value, str):
        value = [float(part) for part in value.split(",")]
    return tuple(value) if isinstance(value, list) else value


def _written(metavar: str, read: Callable[[str], Any], *, pair: bool) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads such a value from one word, and writes it in --help. A pair may be absent, None."""

    def from_words(words: list[str]) -> Any:
        if pair and words[0] == "None":
            return None
        try:
            value = read(words[0])
        except ValueError:
            value = None
        if value is None or (pair and len(value) != 2):
            raise ValueError(f"expected {metavar}, got {words[0]!r}")
        return value

    def to_words(value: Any) -> list[str]:
        return [",".join(str(part) for part in value) if isinstance(value, tuple) else f"{value}"]

    def is_one(value: Any) -> bool:
        return value is None or isinstance(value, tuple) if pair else isinstance(value, int | float)

    return PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=from_words, is_instance=is_one, str_from_instance=to_words
    )


StepsOrShare = Annotated[
    float,
    _written("STEPS, SHARE or N%", lambda word: float(steps_or_share(word)), pair=False),
    BeforeValidator(steps_or_share),
]
"""Optimizer steps, or below 1 a share of all steps, which may be written as "10%"."""

OptionalSize = Annotated[
    tuple[int, int] | None, _written("SIDE or WIDTH,HEIGHT", size, pair=True), BeforeValidator(size)
]
"""Width and height in pixels."""

OptionalSpan = Annotated[tuple[float, float] | None, _written("FROM,TO", span, pair=True), BeforeValidator(span)]
"""Two numbers, the smaller one first."""
