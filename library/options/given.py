"""What a written value stands for: an empty one is not given, blanks around it do not count, zero or false may mean off.

Nothing is guessed: what is left is checked as it stands. A file's values and the words of a command line go the same way.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Marker:
    """Beside a type: how a value of it is read."""

    name: str


OFF_AT_ZERO = Marker("0 and false turn it off")
NEEDED = Marker("an empty value is a mistake")
VERBATIM = Marker("blanks around it count")

Needed = Annotated[str, NEEDED]
Verbatim = Annotated[str, VERBATIM]
Count = Annotated[int, OFF_AT_ZERO]
"""A whole number above 0; 0 and false are not given."""
OptionalCount = Annotated[int | None, OFF_AT_ZERO]
"""A whole number above 0, or None: off, which 0 and false mean too."""
OptionalAmount = Annotated[float | None, OFF_AT_ZERO]
"""A number above 0, or None: off, which 0 and false mean too."""

NOT_GIVEN = Marker("not given")


def value_given(value: Any, kind: Any) -> Any:
    """A file's value as `kind` is to read it, or NOT_GIVEN."""
    marks, leaves = markers(kind), plain_kinds(kind)
    if isinstance(value, list):
        items = [value_given(item, kind) if isinstance(item, str) else item for item in value]
        return [item for item in items if item is not NOT_GIVEN]
    if isinstance(value, str):
        text = value if VERBATIM in marks else value.strip()
        return text if text or NEEDED in marks else NOT_GIVEN
    if OFF_AT_ZERO in marks and value == 0:  # False too
        return None if _may_be_none(kind) else NOT_GIVEN
    if value == 0 and isinstance(value, int):
        if bool in leaves:
            return False
        if leaves & {int, float}:
            return 0  # of a number, false is 0, as in Python
        return "" if NEEDED in marks else NOT_GIVEN
    return value


def words_given(argv: list[str], kinds: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """`argv` without empty values and blanks around values, and the options that are not given then, here nor in a file, with
    what they say. What is turned off by 0 says None, as the parser wants it.
    """
    parts: list[tuple[str, list[str]]] = []
    empty: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_") if option.startswith("--") else ""
        kind = kinds.get(name)
        if kind is None:
            parts.append((name, [word]))
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        read = [_word_given(value, kind) for value in values]
        kept = read if NEEDED in markers(kind) else [word for word in read if word]
        if values and not kept:
            empty[name] = "".join(values).strip()
            parts = [part for part in parts if part[0] != name]
            continue
        empty.pop(name, None)
        parts.append((name, [f"{option}={kept[0]}"] if equals else [option, *kept]))
    return [word for _, words in parts for word in words], empty


def _word_given(word: str, kind: Any) -> str:
    marks = markers(kind)
    text = word if VERBATIM in marks else word.strip()
    if OFF_AT_ZERO in marks and _is_zero(text):
        return "None" if _may_be_none(kind) else ""
    return text


def _may_be_none(kind: Any) -> bool:
    return kind is types.NoneType or any(
        _may_be_none(part) for part in typing.get_args(kind) if not isinstance(part, Marker)
    )


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return text.lower() == "false"


def markers(kind: Any) -> set[Marker]:
    """The markers of a type, those of a list's items too."""
    found = {mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Marker)}
    return found.union(*(markers(part) for part in typing.get_args(kind) if not isinstance(part, str)))


def plain_kinds(kind: Any) -> set[type]:
    """The types a value may have: those of a union, of choices, of a list's items; a pair is a tuple."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return plain_kinds(parts[0])
    if origin is Literal:
        return {type(choice) for choice in parts} - {types.NoneType}
    if origin is tuple and ... not in parts:
        return {tuple}
    if parts:
        return set().union(*(plain_kinds(part) for part in parts if part is not ...)) - {types.NoneType}
    return {kind} if isinstance(kind, type) else set()


def wants_path(kind: Any) -> bool:
    return Path in plain_kinds(kind)
