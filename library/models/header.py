"""The names and shapes of tensors in a safetensors file, without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from library.errors import UserError

Shapes = dict[str, tuple[int, ...]]


class Entry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    """As the format calls it, "F16"."""
    shape: tuple[int, ...]


Result = TypeVar("Result")


NESTING = "state_dict."
"""What precedes every name in a file made of a whole training checkpoint, as if it were not there."""


def read_shapes(path: Path) -> Shapes:
    """Name -> shape of every tensor in a safetensors file, from its header alone."""
    return {name: entry.shape for name, entry in read_entries(path).items()}


def read_entries(path: Path) -> dict[str, Entry]:
    """Name -> number format and shape of every tensor."""

    def entry(found: Any) -> Entry:
        return Entry(found.get_dtype(), tuple(found.get_shape()))

    return with_safetensors(
        path,
        lambda file: {name.removeprefix(NESTING): entry(file.get_slice(name)) for name in file.keys()},
        "numpy",
    )


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    return with_safetensors(path, lambda file: file.metadata() or {}, "numpy")


def with_safetensors(path: Path, read: Callable[[Any], Result], framework: str = "pt") -> Result:
    """What `read` makes of the opened file. Raises UserError for one that is truncated, corrupt or absent."""
    try:
        with safe_open(path, framework=framework, device="cpu") as file:
            return read(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise UserError(
            f"{path} ({size} bytes) is not a whole safetensors file: {error}. It is probably truncated: fetch it again."
        ) from error
