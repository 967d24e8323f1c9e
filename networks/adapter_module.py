"""What one module's adapter is as data, whatever its kind: tensors out of a file and into one, and what they make of a weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import ClassVar

import torch
from torch import Tensor

from networks import AdapterError
from networks.kinds import KINDS, READ_ONLY, Kind


class AdapterModule(ABC):
    """One module's adapter. Kinds are subclasses of it, frozen dataclasses whose first field is a tensor or a tuple of them."""

    parts: ClassVar[Mapping[str, str]]
    """What follows a module's name in a file of kohya's form, but for alpha -> the part's name within `read`."""
    needed: ClassVar[tuple[str, ...]] = ()
    """Parts that every module has: where one is missing, no tensor is read."""
    prefixes: ClassVar[tuple[str, ...]] = ("lora_",)
    """What the names of modules begin with in its files."""
    in_float32: ClassVar[tuple[str, ...]] = ()
    """Of `tensors`, those that half precision would leave little of."""

    alpha: float

    @classmethod
    @abstractmethod
    def read(cls, name: str, parts: dict[str, Tensor], alpha: float | None) -> AdapterModule:
        """The adapter that `parts` (part -> tensor) are, which are taken out as they are used.

        name: of the module, for messages. alpha: None where the file has none. Raises AdapterError for parts that are missing
        or of impossible shapes.
        """

    @property
    @abstractmethod
    def kind(self) -> Kind: ...

    @property
    def label(self) -> str:
        """Its kind in more detail, for tables."""
        return self.kind.title

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    def kernel(self) -> int:
        """Size of the convolution's kernel as far as the tensors tell; 1 for a Linear."""
        return 1

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight it is for, as far as the tensors tell."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is for a weight of this shape; where the tensors do not tell a kernel from inputs, their product counts."""
        same_size = math.prod(self.shape[1:]) == math.prod(shape[1:])
        return len(shape) >= 2 and self.shape[0] == shape[0] and same_size

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """What the adapter at ratio 1 adds to `weight`, float32, of its shape and on its device."""

    def of_rows(self, rows: slice) -> AdapterModule | None:
        """The same for these outputs of the weight alone; None where what is added to one depends on more than these."""
        return None

    @property
    def scale(self) -> float | None:
        """alpha / rank; None where these are something else."""
        return self.alpha / self.rank if self.kind.adds else None

    def norm(self) -> float | None:
        """Frobenius norm of what it adds; None where that depends on the weight."""
        return float(self.delta(torch.zeros(self.shape)).norm()) if self.kind.adds else None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What follows the module's name in a file of kohya's form -> tensor, but for alpha."""

    @property
    def alpha_in_file(self) -> float:
        """To be written beside `tensors`."""
        return float(self.alpha)


def data_forms() -> list[type[AdapterModule]]:
    """The data of every kind, in the tables' order."""
    return list(dict.fromkeys(resolve_name(kind.data) for kind in (KINDS | READ_ONLY).values()))


def require_fit(name: str, holds: bool, **tensors: Tensor) -> None:
    """Raise AdapterError with the shapes of `tensors`, parts of the module `name`, unless `holds`."""
    if not holds:
        shapes = " and ".join(f"{part} {list(value.shape)}" for part, value in tensors.items())
        raise AdapterError(f"{name} has {shapes}, which do not fit together.")
