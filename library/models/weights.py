"""Tensors from files, with a sentence for every file that is not what it should be. Nothing is ever unpickled freely."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from library.errors import UserError
from library.models.pickles import conversion_command
from library.models.tensor_files import TensorFile
from library.progress import doing
from library.words import plural
from networks.finite import all_finite

Model = TypeVar("Model", bound=nn.Module)


def read_tensors(paths: Path | Iterable[Path], prefix: str | tuple[str, ...] = "") -> dict[str, Tensor]:
    """Every tensor whose name begins with `prefix`, on the CPU, from safetensors files or tensor-only pickles.

    Raises UserError for a truncated or corrupt file, and for a pickle that holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        tensors |= _read_safetensors(path, prefix) if path.suffix == ".safetensors" else _read_pickle(path, prefix)
    return tensors


def _read_safetensors(path: Path, prefix: str | tuple[str, ...]) -> dict[str, Tensor]:
    # Read, not mapped: what is touched of a map stays beside the model made of it, until all of it is made.
    ranges = TensorFile(path).tensors
    return {name: stored.read() for name, stored in ranges.items() if name.startswith(prefix)}


def _read_pickle(path: Path, prefix: str | tuple[str, ...]) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is a pickle with more than tensors in it, which could run code, so it is not read. If you trust "
            f"where it came from, convert it once: {conversion_command(path)}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}. Fetch it again.") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor) and name.startswith(prefix)}


def assemble(
    build: Callable[[], Model],
    tensors: dict[str, Tensor],
    where: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    remedy: str = "Fetch it again.",
) -> Model:
    """Build a model without initialising it, fill it with `tensors`, freeze it.

    Strict: from_pretrained would draw missing weights at random and only log it. `tensors` become the model's. Raises UserError
    with the count and the first of the missing, unexpected and misshapen names, or of those with values that are not finite,
    for which `remedy` tells what to do. `where` names the source in that sentence. dtype: None leaves the file's.
    """
    with (
        doing(f"building {where[0].lower()}{where[1:]}"),
        init_empty_weights(),
    ):  # parameters without memory, buffers real
        model = build()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = [
        _count("missing", sorted(expected.keys() - found.keys())),
        _count("unknown", sorted(found.keys() - expected.keys())),
        _count(
            "of another shape",
            [
                f"{n}: {found[n]} for {expected[n]}"
                for n in sorted(expected.keys() & found.keys())
                if found[n] != expected[n]
            ],
        ),
    ]
    if any(problems):
        raise UserError(
            f"{where} does not fit a {type(model).__name__} of {len(expected)} tensors: "
            f"{'; '.join(filter(None, problems))}. The file and its configuration do not belong together."
        )
    if damaged := [name for name, value in tensors.items() if not all_finite(value)]:
        raise UserError(
            f"{where} has values that are not finite in {plural(len(damaged), 'tensor')} (first: {damaged[0]}), in the file "
            f"itself: it is damaged. {remedy}"
        )
    for name in list(tensors):  # one by one, so that there is never all of both
        tensors[name] = _alone(tensors[name], device, dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _alone(value: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    """The tensor as a model keeps it, in memory of its own: parts of others lie on odd addresses, and kernels for those round
    otherwise."""
    is_alone = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
    return value.to(device, dtype or value.dtype, copy=not is_alone, memory_format=torch.contiguous_format)


def _count(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} (first: {names[0]})" if names else ""
