"""What a trainer keeps from one trial to the next: frozen models, open caches, and the base's own scores.

A trial works on a copy of the modules that shares their weights: adapters, hooks and replaced layers go into the copy, which
is thrown away. A training must not change frozen weights, and `KeptModels.intact` checks that it has not.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from library.models.load import TextPart
from library.models.locate import BaseLocation
from library.options.run import RunOptions
from library.training.models import FrozenModels, base_weights_facts
from networks.families import UNET, Family

Value = TypeVar("Value")
Module = TypeVar("Module", bound=nn.Module)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Kept(Generic[Value]):
    """One value, kept as long as it is requested by the same key."""

    close: Callable[[Value], None] = lambda value: None
    key: str | None = None
    value: Value | None = None

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value for `key` (of JSON's types): the kept one, or a new one, made after the old one is closed."""
        name = json.dumps(key, sort_keys=True, default=str)
        if self.value is None or self.key != name:
            self.drop()
            self.value, self.key = make(), name
        return self.value

    def drop(self) -> None:
        if self.value is not None:
            self.close(self.value)
        self.key = self.value = None


@dataclass
class Frozen:
    """Models as they were loaded, and the fingerprint of their weights at that time."""

    models: dict[str, nn.Module]
    parts: list[TextPart] = field(default_factory=list)
    fingerprint: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.fingerprint = self.weigh()

    def weigh(self) -> tuple[int, ...]:
        return tuple(number for model in self.models.values() for number in fingerprint(model))


class KeptModels(FrozenModels):
    """The frozen models of a run, given as copies that share the kept weights."""

    def __init__(self) -> None:
        self._unet: Kept[Frozen] = Kept()
        self._text: Kept[Frozen] = Kept()
        self.caches: Kept[Any] = Kept(close=lambda caches: caches.close())
        self.base_scores: dict[str, Any] = {}
        """Scores of the untouched base, by a hash of everything that they depend on."""
        self.judging: Kept[Any] = Kept()
        """Models that only the objective needs."""

    def unet(self, options: RunOptions, base: BaseLocation, family: Family, device: torch.device) -> nn.Module:
        # Asked for to save memory; a second copy of the weights would cost it.
        if options.model.format_at_rest(UNET) is not None or options.speed.blocks_to_swap is not None:
            return super().unet(options, base, family, device)
        load, channels_last = super().unet, options.speed.channels_last

        def loaded() -> Frozen:
            unet = load(options, base, family, device)
            if channels_last:  # as a run is going to want the weights
                unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return Frozen({UNET: unet})

        key = [*self._facts(options, base, [UNET], device), channels_last]
        return sharing_copy(self._unet.get(key, loaded).models[UNET])

    def text(self, options: RunOptions, base: BaseLocation, family: Family, device: torch.device) -> list[TextPart]:
        load = super().text
        if any(options.model.format_at_rest(component) is not None for component in family.text_encoders):
            return load(options, base, family, device)

        def loaded() -> Frozen:
            parts = load(options, base, family, device)
            return Frozen({part.component: part.model for part in parts}, parts)

        kept = self._text.get(self._facts(options, base, family.text_encoders, device), loaded)
        return [part._replace(model=sharing_copy(part.model)) for part in kept.parts]

    @staticmethod
    def _facts(options: RunOptions, base: BaseLocation, components: Any, device: torch.device) -> list[Any]:
        facts = base_weights_facts(options, base, components)
        return [str(base.path), facts, options.model.mixed_precision, str(device)]

    def intact(self) -> bool:
        """Whether all kept weights equal those that were loaded, to the bit; models that do not are dropped."""
        whole = True
        for kept in (self._unet, self._text):
            if kept.value is not None and kept.value.weigh() != kept.value.fingerprint:
                kept.drop()
                whole = False
        return whole

    def tidy(self) -> None:
        """Free the memory of the last trial, whose modules refer to each other in circles."""
        gc.collect()
        if "torch._dynamo" in sys.modules:  # it counts what it compiled for modules that are gone, up to a limit
            torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        for kept in (self._unet, self._text, self.caches, self.judging):
            kept.drop()


def sharing_copy(model: Module) -> Module:
    """A copy of the modules that shares the frozen weights."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shared = tensor.detach()
        memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    return copy.deepcopy(model, memo)


@torch.no_grad()
def fingerprint(model: nn.Module) -> tuple[int, ...]:
    """For each weight the sum of its bits as integers, which changes with any single bit. Computed on the weights' device."""
    sums = [
        tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.element_size() in _INTEGERS
    ]
    return tuple(torch.stack(sums).tolist()) if sums else ()


@contextmanager
def one_at_a_time(cache_dir: Path) -> Iterator[None]:
    """Within the context, no other trainer on this machine prepares these caches: one builds them, the others wait."""
    lock = None
    with suppress(ImportError, OSError):
        import fcntl

        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = open(cache_dir / ".search.lock", "a+b")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def file_facts(path: Path | str | None) -> Any:
    """Path, size and time of a file, to notice a change; None where there is no file."""
    try:
        status = Path(path).stat() if path is not None else None
    except OSError:
        return None
    return None if status is None else [str(path), status.st_size, status.st_mtime_ns]
