"""Batches read ahead of the training step.

Samples say how a batch of theirs is allocated and filled, and batches which tensors they have; see `library.data.cached_samples`.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from library.data.store import TensorStore

Request = TypeVar("Request")
Asked = TypeVar("Asked", contravariant=True)


@dataclass
class AnyBatch:
    """What every kind of batch can do: its tensors, wherever they lie, move to the device together."""

    indices: np.ndarray
    """Of the samples, [B]; on the host."""
    share: float | None = field(default=None, kw_only=True)
    """Of the step's loss that this batch's is; None: micro-batches share alike."""

    def __len__(self) -> int:
        return len(self.indices)

    def tensors(self) -> list[torch.Tensor]:
        """Of its fields, and of those that are dictionaries; in one order for batches of one form."""
        values = [getattr(self, one.name) for one in fields(self)]
        found = [one for value in values for one in (value.values() if isinstance(value, dict) else [value])]
        return [one for one in found if isinstance(one, torch.Tensor)]

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """The batch with `change` of each of these tensors in its place."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(one) for name, one in value.items()}
            return change(value) if isinstance(value, torch.Tensor) else value

        return replace(self, **{one.name: changed(getattr(self, one.name)) for one in fields(self)})

    def to(self, device: torch.device) -> Any:
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))


class Samples(Protocol[Asked]):
    """Where a Prefetcher gets its batches; a request says which samples, and whatever else they are drawn with."""

    def empty_batch(self, request: Asked, pin: bool) -> Any:
        """A batch whose tensors are allocated and not yet filled."""
        ...

    def relabel(self, batch: Any, request: Asked) -> Any | None:
        """A batch for another request in the memory of `batch`, to be filled; None where its shapes are others."""
        ...

    def fill(self, batch: Any, part: slice) -> None:
        """Fill some rows of a batch. Called from several threads at once, for other rows."""
        ...


@dataclass
class AlignedBatch(AnyBatch):
    """A batch that may carry what teachers say, by teacher: float16 [B, N, D], or int8 with scales [B, N]."""

    tokens: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    token_scales: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)

    def allocate_tokens(self, teacher: str, store: TensorStore, pin: bool) -> None:
        """Make room for the entries of a store."""
        count, shape, dtype = len(self), store.meta.shape, getattr(torch, store.meta.dtype)
        self.tokens[teacher] = torch.empty((count, *shape), dtype=dtype, pin_memory=pin)
        if store.meta.has_scale:
            self.token_scales[teacher] = torch.empty((count, shape[0]), dtype=torch.float16, pin_memory=pin)

    def read_tokens(self, teacher: str, store: TensorStore, sample_ids: list[str], part: slice) -> None:
        """Copy the entries of the samples into rows `part`."""
        store.read_into(sample_ids, self.tokens[teacher].numpy()[part])
        if teacher in self.token_scales:
            store.read_scales_into(sample_ids, self.token_scales[teacher].numpy()[part])

    def target_tokens(self, teacher: str) -> torch.Tensor:
        """A teacher's tokens [B, N, D] float32."""
        tokens, scales = self.tokens[teacher].float(), self.token_scales.get(teacher)
        return tokens if scales is None else tokens * scales.float().unsqueeze(-1)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One stream per device for copies: memory is cached per stream, so new ones would hoard it."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Prefetcher(Generic[Request]):
    """Batches assembled ahead by threads, each batch in slices by all of them, and copied to the device early.

    numpy copies without holding the interpreter's lock, so threads fill one (pinned) batch together, without the
    copies and the forks that worker processes would need. `waited` sums the seconds the step had to wait for data.
    A batch is valid until the next one is asked for: its memory is used again, since fresh pages cost more than the copy.
    """

    def __init__(
        self, samples: Samples[Request], order: Iterator[Request], device: torch.device, *, workers: int, depth: int = 3
    ) -> None:
        self.samples, self.order, self.device, self.depth = samples, order, device, depth
        self.workers = max(1, workers)
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="read")
        self._ahead: deque[tuple[Any, list[Future[None]]]] = deque()
        self._on_device: Any = None
        self._given: Any = None
        self._spare: list[Any] = []
        self._stream = _copy_stream(device)
        self._top_up()

    def _top_up(self) -> None:
        while len(self._ahead) < self.depth and (request := next(self.order, None)) is not None:
            batch = self._memory_for(request)
            bounds = np.linspace(0, len(batch), self.workers + 1).astype(int)
            parts = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a]
            self._ahead.append((batch, [self._pool.submit(self.samples.fill, batch, part) for part in parts]))

    def _memory_for(self, request: Request) -> Any:
        for place in reversed(range(len(self._spare))):
            if (batch := self.samples.relabel(self._spare[place], request)) is not None:
                del self._spare[place]
                return batch
        del self._spare[: -self.depth]  # shapes that do not come again are let go
        # torch's pinned allocator reuses its own blocks once their copies are done.
        return self.samples.empty_batch(request, pin=self._stream is not None)

    def _take(self) -> Any:
        if not self._ahead:
            return None
        batch, futures = self._ahead.popleft()
        for future in futures:
            future.result()
        self._top_up()
        if self._stream is None:
            self._given = batch
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            return batch.to(self.device)

    def __iter__(self) -> Prefetcher[Request]:
        return self

    def __next__(self) -> Any:
        """The next batch, on the device. Raises StopIteration after the last of a finite order."""
        start = time.perf_counter()
        if self._given is not None:
            self._spare, self._given = [*self._spare, self._given], None
        batch = self._take() if self._on_device is None else self._on_device
        self._on_device = None
        if batch is None:
            raise StopIteration
        if self._stream is not None:
            # The step's stream waits for the copy on the device; the host does not.
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in batch.tensors():
                tensor.record_stream(current)
            if all(future.done() for future in (self._ahead[0][1] if self._ahead else [])):
                self._on_device = self._take()
        self.waited += time.perf_counter() - start
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
