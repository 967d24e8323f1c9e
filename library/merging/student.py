"""A U-Net that a trainer saved alone, put in the place of a base's: Lune's `{"student": ...}`, or a plain state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.merging.source import replaced_by
from library.models.checkpoint import Checkpoint, StoredTensor
from library.models.pickles import PICKLE_SUFFIXES
from library.models.tensor_files import TensorFile, open_pickled
from networks.names import UNET, current_key

_NAMES = ("student", "unet", "model", "state_dict", "model_state_dict")
"""Under which trainers keep a U-Net's tensors in a pickle; the first one that is there counts."""
_PREFIXES = ("_orig_mod.", "module.", "unet.")
"""What torch.compile, DDP and pipelines put before every name."""


def with_student(base: Checkpoint, path: Path) -> Checkpoint:
    """The base with the U-Net of `path`, a .safetensors file or a pickle of tensors alone, with diffusers' names.

    Pickles are read with weights_only: no code in them runs. Raises UserError for what holds no U-Net, and where it is another
    family's.
    """
    file = _pickled(path) if path.suffix.lower() in PICKLE_SUFFIXES else TensorFile(path)
    found: dict[str, StoredTensor] = {}
    for name, stored in file.tensors.items():
        if (key := current_key(UNET, _bare(name))) is not None:
            found[key] = StoredTensor(stored, stored.shape)
    return replaced_by(base, {UNET: found}, path)


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _pickled(path: Path) -> TensorFile:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    except Exception as error:  # unpickling raises anything
        raise UserError(
            f"{path} holds more than tensors and numbers, or is torn, so it is not read: {str(error).splitlines()[0]}"
        ) from None
    tensors = next((content[name] for name in _NAMES if isinstance(content, Mapping) and name in content), content)
    if not isinstance(tensors, Mapping) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no tensors of a U-Net: neither by themselves nor under {', '.join(_NAMES)}.")
    return open_pickled(path, {name: value for name, value in tensors.items() if isinstance(value, Tensor)})
