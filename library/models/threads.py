"""Many tensors at once: a thread for each core, and one core for each tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from library.freed_memory import keep_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST = 8  # disks are slower than so many


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each, in their order, worked out in threads; meanwhile torch starts none of its own.

    Threads of one kernel wait for each other at its end. Small tensors are over before that, and where another program has one
    of the cores, all of the time goes there: reading an adapter of 1,052 modules took 7 to 15 s so, and 0.5 s in one thread.
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_MOST, os.cpu_count() or 1)) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(before)
