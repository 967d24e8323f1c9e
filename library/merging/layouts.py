"""The tensors of a merged model's files: which are the base's bytes, and which are made.

Two layouts: one file per component under diffusers' names, and one original single file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from library.errors import UserError
from library.merging.merge import Change, Folds, Part, cast_finite, fold_piece, in_rows
from library.merging.rounding import NEAREST, Arrival, Rounding
from library.models.checkpoint import Checkpoint, StoredTensor
from library.models.tensor_files import NewTensor, in_library_order
from library.words import plural
from networks.original_names import Form, Place, original_place


class Merging:
    """A base, what is to be folded into it, and the number format of the result."""

    def __init__(
        self, base: Checkpoint, folds: Folds, dtype: torch.dtype | None = None, rounding: Rounding = NEAREST
    ) -> None:
        """dtype: of every floating-point tensor; None keeps each as the base has it.

        Raises UserError without one where the base has scaled weights, which are multiplied out.
        """
        if base.scaled and dtype is None:
            raise UserError(
                f"{base.location.path} has {plural(len(base.scaled), 'weight')} stored as small numbers with a scale (scaled "
                f"fp8; first: {base.scaled[0]}), which a merge multiplies out. Say in which number format to write them: "
                "--save_precision fp16 (or bf16, float)."
            )
        self.base = base
        self.folds = folds
        self.changes: dict[tuple[str, str], Change] = {}
        """By (component, key), filled while the tensors are made."""
        self.rounding = rounding
        """Of the weights that something is folded into."""
        self._dtype = dtype

    def describe_dtype(self) -> str:
        return "as the base" if self._dtype is None else str(self._dtype).removeprefix("torch.")

    def describe(self) -> str:
        """The number format, and how its numbers came to be."""
        scaled = f", {len(self.base.scaled)} scaled weights multiplied out" if self.base.scaled else ""
        return self.describe_dtype() + scaled + self.rounding.describe()

    def dtype_of(self, component: str, key: str) -> torch.dtype:
        """Of the merged tensor."""
        stored = self.base.tensors[component][key].dtype
        return stored if self._dtype is None or not stored.is_floating_point else self._dtype

    def is_kept(self, component: str, key: str) -> bool:
        """Whether the merged tensor is the base's to the bit."""
        stored = self.base.tensors[component][key]
        same_format = stored.scale is None and self.dtype_of(component, key) == stored.dtype
        return same_format and key not in self.folds.get(component, {})

    def in_rows(self, component: str, key: str, *, lies_in_rows: bool = True) -> Iterator[tuple[slice, Sequence[Part]]]:
        """Rows of a tensor that can be read and merged alone, with what is folded into them.

        lies_in_rows: whether what they are to be compared with can be read so, too.
        """
        stored, parts = self.base.tensors[component][key], self.folds.get(component, {}).get(key, ())
        return in_rows(stored.shape, parts) if stored.lies_in_rows and lies_in_rows else iter([(slice(None), parts)])

    def make(self, component: str, key: str) -> Iterator[Tensor]:
        """The merged tensor as the diffusers model has it, some rows at a time."""
        stored, dtype = self.base.tensors[component][key], self.dtype_of(component, key)
        rounded, arrival = self.rounding.of(f"{component} {key}"), Arrival()
        for rows, parts in self.in_rows(component, key):
            weight = stored.read_rows(rows)
            if parts:
                yield fold_piece(key, weight, parts, dtype, rounded, arrival)
            else:
                yield cast_finite(key, weight.to(dtype), weight)
        if key in self.folds.get(component, {}):
            self.changes[component, key] = Change.of(component, key, arrival)


def component_tensors(merging: Merging, component: str) -> list[NewTensor]:
    """One component's file in a diffusers folder, whose bytes do not depend on how the base's files are laid out.

    Who reads it maps it into memory, and kernels round by the address at which a tensor lies.
    """
    tensors = []
    for key, stored in merging.base.tensors[component].items():
        if merging.is_kept(component, key) and not stored.transposed:
            tensors.append(NewTensor(key, stored.dtype, stored.shape, copied=(stored.range,)))
        else:
            tensors.append(
                NewTensor(key, merging.dtype_of(component, key), stored.shape, make=_maker(merging, component, key))
            )
    return in_library_order(tensors)


def single_file_tensors(merging: Merging) -> list[NewTensor]:
    """A file in the original layout: component by component, each in the order of the base."""
    family = merging.base.family
    stacks: dict[str, list[tuple[str, Place]]] = {}
    tensors: dict[str, NewTensor] = {}
    for component, named in merging.base.tensors.items():
        for key, stored in named.items():
            place = original_place(family, component, key)
            if place.form is Form.STACKED:
                stacks.setdefault(place.key, []).append((key, place))
                tensors[place.key] = _stack(merging, component, stacks[place.key])
            else:
                tensors[place.key] = _alone(merging, component, key, place, stored)
    if torn := [name for name, members in stacks.items() if len(members) != 3]:
        raise UserError(f"{merging.base.location.path} lacks a part of {torn[0]}: it is incomplete.")
    marks = [NewTensor(mark, torch.float32, (0,), make=list) for mark in merging.base.marks]
    return [*tensors.values(), *marks]


def _alone(merging: Merging, component: str, key: str, place: Place, stored: StoredTensor) -> NewTensor:
    dtype = merging.dtype_of(component, key)
    there = place.form is Form.TRANSPOSED
    shape = stored.shape
    if place.form is Form.CONVOLUTION:
        shape = (*shape, 1, 1)
    elif there:
        shape = shape[::-1]
    if merging.is_kept(component, key) and stored.transposed == there:
        return NewTensor(place.key, dtype, shape, copied=(stored.range,))

    def make() -> Iterable[Tensor]:
        rows = merging.make(component, key)
        return [torch.cat(list(rows)).t()] if there else rows

    return NewTensor(place.key, dtype, shape, make=make)


def _stack(merging: Merging, component: str, members: list[tuple[str, Place]]) -> NewTensor:
    """Three projections of the second text encoder as one tensor; called again as each of them is found."""
    keys = [key for key, place in sorted(members, key=lambda member: member[1].part)]
    stored = [merging.base.tensors[component][key] for key in keys]
    dtype = merging.dtype_of(component, keys[0])
    shape = (sum(tensor.shape[0] for tensor in stored), *stored[0].shape[1:])
    if all(merging.is_kept(component, key) for key in keys):
        return NewTensor(members[0][1].key, dtype, shape, copied=tuple(tensor.range for tensor in stored))
    return NewTensor(
        members[0][1].key,
        dtype,
        shape,
        make=lambda: chain.from_iterable(merging.make(component, key) for key in keys),
    )


def _maker(merging: Merging, component: str, key: str) -> Callable[[], Iterable[Tensor]]:
    return lambda: merging.make(component, key)
