"""What a step asks of a device, counted on the meta device, where nothing is computed: launches, FLOP, bytes, memory.

What would make a GPU wait for the host, or a host for the GPU, is an error there: a value read, a tensor of another device.
"""

from __future__ import annotations

import math
import os
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
META = torch.device("meta")
_ROOT = Path(__file__).resolve().parents[2]

# Sizes of these results follow from values: the host has to know them.
_READS = frozenset(
    (_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero, _aten._unique2)
    + (_aten.unique_dim, _aten.unique_consecutive, _aten.bincount)
)
_INDEXING = frozenset((_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index))
# The counter of FLOP does not know what adds in place.
_FLOP = {**flop_registry, _aten.addmm_: flop_registry[_aten.addmm], _aten.baddbmm_: flop_registry[_aten.baddbmm]}
# No kernel, beside views: memory is only taken, or taken for something else.
_FREE = frozenset(
    (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten._unsafe_view)
    + (_aten.lift_fresh, _aten.detach_, _aten.set_)
)
# Tensors that one kernel over lists takes, by how many lists there are (torch, MultiTensorApply.cuh: depth_to_max_tensors).
_LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


class HostRead(AssertionError):
    """A step reads the device, or is given a tensor of another one."""


class StepCount(TorchDispatchMode):
    """Within its context every operation on the meta device is counted, and one that would wait raises HostRead.

    A launch is an operation that autograd calls and that is no view: the number of kernels, roughly, of eager mode on a GPU
    (a library's operation may be several, lists of tensors are as many as torch makes of them). What `torch.compile`
    would join is not seen.
    """

    launches: Counter[str]
    """By operation."""
    flop: int
    """Of products, convolutions and attention (torch.utils.flop_counter)."""
    moved: int
    """Bytes that all other operations read and write: they are as fast as memory is."""
    before: int
    """Bytes of all storages that there were when the count began."""
    live: int
    """Bytes of all storages there are now."""
    peak: int
    """The most that `live` has been since the context was entered."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """existing: what takes memory already. Of several tensors in one storage it counts once."""
        super().__init__()
        self._alive: set[int] = set()
        self.live = self.peak = 0
        for tensor in existing:
            self._see(tensor)
        self.launches, self.flop, self.moved = Counter(), 0, 0
        self.before = self.peak = self.live

    @property
    def operations(self) -> int:
        return self.launches.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        self._refuse_waiting(func, args, kwargs, inputs)
        result = func(*args, **kwargs)
        results = [tensor for tensor in _tensors((result,)) if tensor.is_meta]
        for tensor in results:
            self._see(tensor)
        touched = [tensor for tensor in inputs if tensor.is_meta] + results
        if touched and not func.is_view and func.overloadpacket not in _FREE:
            self._count(func, args, kwargs, result, touched)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, touched: list[Tensor]) -> None:
        lists = [len(value) for value in args if isinstance(value, (list, tuple)) and value and _is_tensor(value[0])]
        of_lists = "_foreach_" in str(func) or "_fused_" in str(func) or "_amp_foreach" in str(func)
        number = math.ceil(lists[0] / _LIST_TENSORS[min(len(lists), 5)]) if of_lists and lists else 1
        self.launches[str(func.overloadpacket).removeprefix("aten.")] += number
        if (flop := _FLOP.get(func.overloadpacket)) is not None:
            self.flop += flop(*args, **kwargs, out_val=result)
        else:
            # A tensor that is stretched is read once.
            self.moved += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in touched)

    def _refuse_waiting(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
        on_device = [tensor for tensor in inputs if tensor.is_meta]
        packet = func.overloadpacket
        by_bool = packet in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = packet is _aten.repeat_interleave and kwargs.get("output_size") is None
        if on_device and (packet in _READS or by_bool or repeats):
            raise HostRead(f"{func} reads values of the device{_place()}")
        to = kwargs.get("device")
        if on_device and to is not None and torch.device(to).type != "meta":
            raise HostRead(f"{func} copies from the device to {to}{_place()}")
        # Without dimensions it is a number of the host, which kernels are given as such.
        elsewhere = any(tensor.ndim > 0 for tensor in inputs if not tensor.is_meta)
        if elsewhere and (on_device or (to is not None and torch.device(to).type == "meta")):
            raise HostRead(f"{func} is given a tensor of another device{_place()}")

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._alive:
            return
        size = storage.nbytes()
        self._alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _place() -> str:
    """Where in this project, and in which library's function that is no part of torch. The backward pass has no place."""
    frames = [f for f in traceback.extract_stack()[:-3] if f"{os.sep}torch{os.sep}" not in f.filename]
    own = [f for f in frames if Path(f.filename).is_relative_to(_ROOT) and "site-packages" not in f.filename]
    nearest = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in (*frames[-1:], *own[-1:])]
    return ", at " + ", called by ".join(dict.fromkeys(nearest))


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Within it the meta device has the kernels that CUDA has and it lacks: of attention and of optimizers.

    Attention keeps its inputs and output and no attention matrix: flash attention for half precision without a mask, else
    the memory-efficient one. The meta device by itself would multiply matrices.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: Any,
    ) -> Tensor:
        if query.dtype != torch.float32 and attn_mask is None:
            result: Tensor = _aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
            return result
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        needs = query.requires_grad or key.requires_grad or value.requires_grad
        result = _aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale
        )[0]
        return result

    with ExitStack() as patches:
        patches.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        for kind in ("fused", "foreach"):
            supported = mock.patch(
                f"torch.optim.optimizer._get_{kind}_kernels_supported_devices", lambda: ["meta", "cpu"]
            )
            patches.enter_context(supported)
        yield
