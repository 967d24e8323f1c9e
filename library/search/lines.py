"""Messages of `library.search.messages` as lines of JSON. No torch: the parent of a study reads them too."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

Message = TypeVar("Message")


def to_line(kind: str, message: Any = None, **values: Any) -> bytes:
    """message: a dataclass. Raises ValueError for numbers that JSON has not (NaN)."""
    content = {} if message is None else dataclasses.asdict(message)
    return json.dumps({"kind": kind, **content, **values}, allow_nan=False).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any] | None:
    """A message; None where the line is none, such as one torn by a kill."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("kind"), str) else None


def read_as(kind: type[Message], content: dict[str, Any]) -> Message:
    """The dataclass of a message. Raises TypeError where fields are missing; unknown ones are left out."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content.items() if name in names})
