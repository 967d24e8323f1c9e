"""What a trainer keeps from one trial to the next: frozen models, opened caches, what the base itself scored.

A trial works on a copy of the modules that shares their weights: adapters, hooks and other classes go into the copy, which
is thrown away. Nothing of a training writes into frozen weights, and `Warm.intact` sees that nothing has.
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
from library.options.network import TrainNetworkOptions
from library.training.network_models import FrozenModels, float8_components
from library.training.network_run import base_weights_facts
from networks.original_names import UNET, Family

Value = TypeVar("Value")
Module = TypeVar("Module", bound=nn.Module)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Kept(Generic[Value]):
    """One value, as long as it is asked for by the same key."""

    close: Callable[[Value], None] = lambda value: None
    key: str | None = None
    value: Value | None = None

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value for `key`, JSON-like: the kept one, or a new one in its place, made when the old one has gone."""
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
    """Models as they were loaded, and what their weights came to then."""

    models: dict[str, nn.Module]
    parts: list[TextPart] = field(default_factory=list)
    fingerprint: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.fingerprint = self.weigh()

    def weigh(self) -> tuple[int, ...]:
        return tuple(number for model in self.models.values() for number in fingerprint(model))


class Warm(FrozenModels):
    """All that is kept. As the FrozenModels of a run it gives copies of its models."""

    def __init__(self) -> None:
        self._unet: Kept[Frozen] = Kept()
        self._text: Kept[Frozen] = Kept()
        self.caches: Kept[Any] = Kept(close=lambda caches: caches.close())
        self.base_scores: dict[str, Any] = {}
        """What the untouched base was found to be, by all that decides it."""
        self.judging: Kept[Any] = Kept()
        """Models that only the objective needs."""

    def unet(self, options: TrainNetworkOptions, base: BaseLocation, family: Family, device: torch.device) -> nn.Module:
        if float8_components(options, [UNET]):  # asked for to save memory; a second copy of the weights would cost it
            return super().unet(options, base, family, device)
        load = super().unet
        key = [*self._facts(options, base, [UNET], device), options.speed.channels_last]
        return self.kept_unet(key, lambda: load(options, base, family, device), options.speed.channels_last)

    def kept_unet(self, key: Any, load: Callable[[], Module], channels_last: bool) -> Module:
        """A copy of the U-Net for `key`. channels_last: keep the weights in that order, as a run is going to want them."""

        def loaded() -> Frozen:
            unet = load()
            if channels_last:
                unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return Frozen({UNET: unet})

        return sharing_copy(self._unet.get(key, loaded).models[UNET])  # type: ignore[return-value]

    def text(
        self, options: TrainNetworkOptions, base: BaseLocation, family: Family, device: torch.device
    ) -> list[TextPart]:
        load = super().text
        if options.model.fp8_base:
            return load(options, base, family, device)

        def loaded() -> Frozen:
            parts = load(options, base, family, device)
            return Frozen({part.component: part.model for part in parts}, parts)

        kept = self._text.get(self._facts(options, base, family.text_encoders, device), loaded)
        return [part._replace(model=sharing_copy(part.model)) for part in kept.parts]

    @staticmethod
    def _facts(options: TrainNetworkOptions, base: BaseLocation, components: Any, device: torch.device) -> list[Any]:
        memory = options.cache.cache_dir / "weight_hashes.json"
        facts = base_weights_facts(options, base, components, memory)
        return ["train_network", str(base.path), facts, options.model.mixed_precision, str(device)]

    def intact(self) -> bool:
        """Whether the weights are, to the bit, what was loaded; what is not is dropped."""
        whole = True
        for kept in (self._unet, self._text):
            if kept.value is not None and kept.value.weigh() != kept.value.fingerprint:
                kept.drop()
                whole = False
        return whole

    def tidy(self) -> None:
        """Let go of what a trial left lying: its modules refer to each other in circles."""
        gc.collect()
        if "torch._dynamo" in sys.modules:  # it counts what it compiled for modules that are gone, up to a limit
            torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        for kept in (self._unet, self._text, self.caches, self.judging):
            kept.drop()


def sharing_copy(model: Module) -> Module:
    """Modules of their own around the very same frozen weights."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shared = tensor.detach()
        memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    return copy.deepcopy(model, memo)


@torch.no_grad()
def fingerprint(model: nn.Module) -> tuple[int, ...]:
    """A number for each weight, of its bits: no single changed bit goes unseen. Read once, where the weights are."""
    sums = [
        tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.element_size() in _INTEGERS
    ]
    return tuple(torch.stack(sums).tolist()) if sums else ()


@contextmanager
def one_at_a_time(cache_dir: Path) -> Iterator[None]:
    """Within the context no other trainer of this machine prepares caches there: one builds them, the rest find them."""
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
    """Of a file, what tells whether it has been changed; None where there is none."""
    try:
        status = Path(path).stat() if path is not None else None
    except OSError:
        return None
    return None if status is None else [str(path), status.st_size, status.st_mtime_ns]
