"""The names and shapes of tensors in a safetensors file, without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from library.errors import UserError

Shapes = dict[str, tuple[int, ...]]
Result = TypeVar("Result")


def read_shapes(path: Path) -> Shapes:
    """Name -> shape of every tensor in a safetensors file, from its header alone."""
    return with_safetensors(
        path, lambda file: {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, "numpy"
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
