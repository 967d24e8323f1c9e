"""The processes of a run, through accelerate: who am I, where do I compute, and the few things said between us."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import reduce

from library.errors import UserError
from library.words import plural

Item = TypeVar("Item")


def usable_device(name: str) -> torch.device:
    """The device of that name. Raises UserError where this machine does not have it; nothing is computed on it."""
    try:
        device = torch.device(name)
        of_kind = None if device.type == "cpu" else torch.get_device_module(device)
    except RuntimeError as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if of_kind is None:
        return device
    kind = device.type.upper()
    if not of_kind.is_available():
        raise UserError(
            f"--device {name} was asked for, but this machine has no usable {kind} device. Use --device cpu."
        )
    if device.index is not None and device.index >= (count := of_kind.device_count()):
        there = plural(count, f"{kind} device")
        raise UserError(f"--device {name} was asked for, but this machine has {there}, counted from 0.")
    return device


def has_accelerator() -> bool:
    """Whether a run whose device nobody names would compute elsewhere than on the CPU."""
    return torch.accelerator.is_available()


class Processes:
    """rank of world_size, this one's device; collectives that do nothing where there is one process."""

    def __init__(self, device: str | None = None) -> None:
        cpu = device is not None and device.startswith("cpu")
        try:
            # While one process fetches a model or writes the last shard, the others may wait for hours.
            self.state = PartialState(
                cpu=cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true", timeout=timedelta(days=2)
            )
            self.device = self.state.device if device is None else usable_device(device)
        except RuntimeError as error:
            raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
        self.rank: int = self.state.process_index
        self.world_size: int = self.state.num_processes
        self.warnings: list[str] = []
        """What was said as a warning or a note, for the run's page."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, *words: object) -> None:
        """Print, once."""
        if words and str(words[0]).startswith(("warning: ", "note: ")):
            self.warnings.append(" ".join(map(str, words)))
        if self.is_main:
            print(*words, flush=True)

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the main process goes through before the others: what it makes they find."""
        return self.state.main_process_first()

    def wait(self) -> None:
        self.state.wait_for_everyone()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over processes."""
        return reduce(tensor, "mean") if self.world_size > 1 else tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return reduce(tensor, "sum") if self.world_size > 1 else tensor

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all processes: what one has been asked for, all see at the same step."""
        if self.world_size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return shared.tolist()

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in rank order."""
        if self.world_size == 1:
            return list(items)
        parts: list[list[Item]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their mean over processes."""
        self.average([p.grad for p in parameters if p.grad is not None])

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their mean over processes, all in one collective."""
        if self.world_size == 1 or not tensors:
            return
        flat = self.mean(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def gather_rows(self, rows: torch.Tensor, sharing: int | None = None, *, most: int | None = None) -> torch.Tensor:
        """[B, ...] of every process as [W*B, ...], in rank order, with gradients into this process's rows.

        Every process computes the same loss of the gathered rows, each with the gradient of its own part only. Gradients
        are averaged over processes afterwards, so that part is scaled by the number of processes that share the loss
        (default: all) to make the average the true gradient. most: rows of the largest batch, where batches differ in
        length; what lacks is zeros.
        """
        if self.world_size == 1:
            return rows
        if most is not None and most > len(rows):
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, rows.detach().contiguous())
        # rows - rows.detach() is exactly 0: the value stays, the gradient is scaled.
        scale = self.world_size if sharing is None else sharing
        parts[self.rank] = rows.detach() + (rows - rows.detach()) * scale
        return torch.cat(parts)
