"""A Stable Diffusion checkpoint as tensors on the disk: one view of diffusers folders and original single files.

No model is built and nothing is read but headers, so that merging and extracting go tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.errors import UserError
from library.models.base_family import family_of
from library.models.base_schedule import folder_scheduler_config
from library.models.header import NESTING
from library.models.locate import BaseLocation, weight_files
from library.models.quantised import is_beside, scale_names, times_scale
from library.models.tensor_files import Range, TensorFile, open_pickled
from library.models.weights import read_tensors
from networks.families import Family
from networks.names import VAE, current_key
from networks.original_names import Form, diffusers_keys, is_dropped, original_place
from networks.prediction_names import (
    BY_SCHEDULER,
    EPSILON_NAME,
    PREDICTION_NAMES,
    PredictionName,
    schedule_of,
    shift_in_file,
    type_in_file,
)


class StoredTensor(NamedTuple):
    """A tensor of a diffusers model and the bytes that hold it."""

    range: Range
    shape: tuple[int, ...]
    """In the diffusers model; the bytes hold its transpose where `transposed`."""
    transposed: bool = False
    scale: Range | None = None
    """Of a scaled weight: what its bytes are to be multiplied by."""

    def read(self) -> Tensor:
        value = self.range.read()
        if self.scale is not None:
            value = times_scale(value, self.scale.read())
        return value.reshape(self.shape[::-1]).t().contiguous() if self.transposed else value.reshape(self.shape)

    @property
    def lies_in_rows(self) -> bool:
        """Whether some of its rows can be read alone."""
        return bool(self.shape) and all(self.shape) and self.scale is None and not self.transposed

    def read_rows(self, rows: slice) -> Tensor:
        """As `read`, these alone."""
        if not self.lies_in_rows:
            return self.read()[rows]
        start, stop, _ = rows.indices(self.shape[0])
        return self.range.rows(start, stop).read().reshape(stop - start, *self.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        return self.range.dtype if self.scale is None else torch.float32


ZTSNR = "ztsnr"
"""The empty tensor that marks a single file whose model was trained down to pure noise (as ComfyUI reads)."""
MARKS = (*(name.mark for name in PREDICTION_NAMES if name.mark is not None), ZTSNR)


LEFTOVERS = (".base_layer.", "lora_", "align_heads", "base_model.model.")
"""What training leaves in names, and no reader of a model knows."""


@dataclass(frozen=True)
class Checkpoint:
    location: BaseLocation
    family: Family
    tensors: dict[str, dict[str, StoredTensor]]
    """Component -> key in the diffusers model -> where it is stored, in the order of the file."""
    stored_names: dict[str, int]
    """Component -> how many tensors its files hold."""
    others: tuple[str, ...] = ()
    """Tensors of a single file that are no part of these models: EMA copies, the schedule's buffers."""
    marks: tuple[str, ...] = ()
    """Those of MARKS that are true of the model."""
    prediction: PredictionName = EPSILON_NAME
    """What its network says, by its files or by what the user says of them."""
    flow_shift: float | None = None
    """The shift that the files of a flow model name."""

    @property
    def scaled(self) -> list[str]:
        """The weights that have scales."""
        return [key for named in self.tensors.values() for key, stored in named.items() if stored.scale is not None]

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {part: {key: stored.shape for key, stored in named.items()} for part, named in self.tensors.items()}

    def read(self, component: str, key: str) -> Tensor:
        """One tensor, as the diffusers model has it."""
        return self.tensors[component][key].read()

    def files(self) -> list[Path]:
        """Every file that holds tensors of it."""
        return sorted({stored.range.file.path for named in self.tensors.values() for stored in named.values()})

    def replaced(self, component: str, tensors: Mapping[str, StoredTensor], stored: int) -> Checkpoint:
        """The same with one component's tensors from elsewhere."""
        return Checkpoint(
            self.location,
            self.family,
            {**self.tensors, component: dict(tensors)},
            {**self.stored_names, component: stored},
            self.others,
            self.marks,
            self.prediction,
            self.flow_shift,
        )


def open_checkpoint(location: BaseLocation, *, without: Collection[str] = ()) -> Checkpoint:
    """Look into a base. without: components that are not asked for, and need not be there.

    Raises UserError for what is no checkpoint of SD1.x or SDXL, or not whole.
    """
    family = family_of(location)
    if location.is_file:
        return _open_single_file(location, family, without)
    tensors, counts = {}, {}
    for component in (name for name in family.original if name not in without):
        files = [_open(path) for path in weight_files(location.path, component)]
        found = {name: stored for file in files for name, stored in file.tensors.items()}
        _refuse([name for name in found if _is_leftover(name)], len(found), files[0].path, family)
        scales = scale_names(found.keys())
        tensors[component] = {
            key: _stored(component, key, stored)._replace(scale=found.get(scales.get(name, "")))
            for name, stored in found.items()
            if not is_beside(name) and (key := current_key(component, name)) is not None
        }
        counts[component] = len(found)
    marks, prediction, shift = _said_by_folder(location.path)
    return Checkpoint(location, family, tensors, counts, (), marks, prediction, shift)


def _said_by_folder(folder: Path) -> tuple[tuple[str, ...], PredictionName, float | None]:
    """Marks, prediction and a flow's shift."""
    config = folder_scheduler_config(folder)
    found = schedule_of(config)
    if isinstance(found, str):
        raise UserError(f"The scheduler of {folder} {found}")
    true = {found[1].mark, ZTSNR if config.get("rescale_betas_zero_snr") else None}
    shift = config.get("flow_shift") or config.get("shift")
    return tuple(mark for mark in MARKS if mark in true), found[1], shift


def _open(path: Path) -> TensorFile:
    return TensorFile(path) if path.suffix == ".safetensors" else open_pickled(path, read_tensors(path))


def _stored(component: str, key: str, stored: Range) -> StoredTensor:
    # The VAE's attention was convolutions in diffusers 0.17 and before.
    if component == VAE and ".attentions." in key and len(stored.shape) == 4:
        return StoredTensor(stored, stored.shape[:2])
    return StoredTensor(stored, stored.shape)


def _open_single_file(location: BaseLocation, family: Family, without: Collection[str]) -> Checkpoint:
    file = TensorFile(location.path)
    inside = {name.removeprefix(NESTING): stored for name, stored in file.tensors.items()}
    tensors: dict[str, dict[str, StoredTensor]] = {component: {} for component in family.original}
    counts = dict.fromkeys(family.original, 0)
    others: list[str] = []
    strangers: list[str] = []
    scales = scale_names(inside.keys())
    for name, stored in inside.items():
        if is_beside(name):
            continue
        keys = [] if _is_leftover(name) else diffusers_keys(family, name)
        for component, key in keys:
            found = _stored_in_original(family, component, key, stored)
            tensors[component][key] = found._replace(scale=inside.get(scales.get(name, "")))
        if keys:
            counts[keys[0][0]] += 1
            continue
        if name in MARKS:
            continue
        harmless = is_dropped(family, name) or not name.startswith(tuple(family.original.values()))
        (others if harmless else strangers).append(name)
    _refuse(strangers, len(file.tensors), location.path, family)
    for component, named in tensors.items():
        if not named and component not in without:
            raise UserError(
                f"{location.path} has no {component}: none of its {len(file.tensors)} tensors begins with "
                f"{family.original[component]}. A complete {family.title} checkpoint or a diffusers folder is needed."
            )
    prediction = BY_SCHEDULER.get(type_in_file(inside, file.metadata), EPSILON_NAME)
    marks = tuple(mark for mark in MARKS if mark in inside or mark == prediction.mark)
    return Checkpoint(location, family, tensors, counts, tuple(others), marks, prediction, shift_in_file(file.metadata))


def _is_leftover(name: str) -> bool:
    return any(mark in name for mark in LEFTOVERS)


def _refuse(strangers: list[str], count: int, path: Path, family: Family) -> None:
    if strangers:
        raise UserError(
            f"{len(strangers)} of {count} tensors in {path} have no place in {family.title} (first: "
            f"{', '.join(strangers[:3])}). Merge or remove what training left there."
        )


def _stored_in_original(family: Family, component: str, key: str, stored: Range) -> StoredTensor:
    place = original_place(family, component, key)
    if place.form is Form.CONVOLUTION:
        return StoredTensor(stored, stored.shape[:2])  # some files hold it as a matrix already
    if place.form is Form.TRANSPOSED:
        return StoredTensor(stored, stored.shape[::-1], transposed=True)
    if place.form is Form.STACKED:
        rows = stored.shape[0] // 3
        part = stored.rows(place.part * rows, (place.part + 1) * rows)
        return StoredTensor(part, part.shape)
    return StoredTensor(stored, stored.shape)
