"""--blocks_to_swap: frozen weights of some blocks of a U-Net stay in the host's memory and come to the GPU ahead of their turn.

A step goes through the blocks to the last one and, in its backward pass, back to the first. While one computes, the next comes
over on a stream of its own, into the place of the one behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.models.frozen import at_rest, freeze_layers, frozen_layers
from library.options.model import MOST_ON_DEVICE

SWAPPED_BLOCKS = frozenset({"ResnetBlock2D", "BasicTransformerBlock"})
"""Classes that a U-Net is made of for the most part, and that checkpointing recomputes one by one."""
_ALIGNED = 256
"""Bytes, as torch aligns what it allocates: kernels may round by where a tensor lies."""


def swappable(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if type(module).__name__ in SWAPPED_BLOCKS]


def chosen_blocks(unet: nn.Module, count: int) -> list[nn.Module]:
    """`count` of the blocks, evenly spread, so that the weights of one come while others compute."""
    blocks = swappable(unet)
    return [blocks[place * len(blocks) // count] for place in range(count)]


def saved_bytes(unet: nn.Module, count: int) -> int:
    """That swapping so many blocks frees on the device."""
    sizes = [sum(weight.nbytes for weight in frozen_weights(block)) for block in chosen_blocks(unet, count)]
    return sum(sizes) - MOST_ON_DEVICE * max(sizes)


def swap_blocks(unet: nn.Module, count: int) -> BlockSwap:
    """Let go of the weights of `count` blocks, whose layers have been frozen, on their device, and bring them when it is time."""
    blocks = chosen_blocks(unet, count)
    for block in blocks:
        # torch's own Linear keeps a view of the weight for the backward pass, and with it the place where it lay.
        freeze_layers(block, linear=True)
    swap = BlockSwap(blocks, next(unet.parameters()).device)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, inputs: swap.enter(module, 1))
        block.register_forward_hook(lambda module, inputs, output: _before_backward(swap, module, output))
    return swap


def _before_backward(swap: BlockSwap, block: nn.Module, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: swap.enter(block, -1))


def frozen_weights(block: nn.Module) -> list[nn.Parameter]:
    """What is swapped of a block: weights of frozen Linear and Conv2d layers, as they are at rest."""
    return [weight for layer in frozen_layers(block).values() for weight in at_rest(layer)]


class BlockSwap:
    """Blocks in the order of their first turns, of which the one that computes and the next have their weights."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._weights = {block: _HostWeights(frozen_weights(block), device) for block in blocks}
        most = max(weights.size for weights in self._weights.values())
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free = [_Place(most, device) for _ in range(MOST_ON_DEVICE)]
        for place in self._free:  # its memory may have been another's, with which kernels are not done yet
            place.left = self._event()
        self._order: list[nn.Module] = []
        self._taken: dict[nn.Module, _Place] = {}
        self._turn: nn.Module | None = None

    def enter(self, block: nn.Module, direction: int) -> None:
        """The turn is `block`'s. direction: 1 in the forward pass, -1 in the backward pass.

        Checkpointing's second forward pass lies inside the block's turn in the backward pass.
        """
        if block is self._turn:
            return
        self._turn = block
        if block not in self._order:
            self._order.append(block)
        following = self._following(self._order.index(block), direction)
        for other in self._taken.keys() - {block, following}:
            self._leave(other)
        self._bring(block)
        self._arrive(block)
        self._bring(following)

    def _following(self, place: int, direction: int) -> nn.Module:
        """At the end of the forward pass comes the backward pass, at its end the next step."""
        last = len(self._order) - 1
        if direction == 1 and place == last and not torch.is_grad_enabled():
            return self._order[0]
        there = place + direction
        return self._order[max(place - direction, 0) if not 0 <= there <= last else there]

    def _bring(self, block: nn.Module) -> None:
        if block in self._taken:
            return
        place, weights = self._free.pop(), self._weights[block]
        with self._beside(place.left):
            place.memory[: weights.size].copy_(weights.host, non_blocking=True)
            place.filled = self._event()
        self._taken[block] = place

    def _arrive(self, block: nn.Module) -> None:
        place = self._taken[block]
        if place.filled is not None:
            torch.cuda.current_stream(place.memory.device).wait_event(place.filled)
        self._weights[block].lie_in(place.memory)

    def _leave(self, block: nn.Module) -> None:
        place = self._taken.pop(block)
        self._weights[block].lie_nowhere()
        place.left = self._event()
        self._free.append(place)

    @contextmanager
    def _beside(self, after: Any) -> Iterator[None]:
        """On the stream of copies, which waits for an event of the other."""
        if self._stream is None:
            yield
            return
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield

    def _event(self) -> Any:
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()


class _Place:
    """Memory on the device for the weights of one block at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.filled: Any = None
        self.left: Any = None


class _HostWeights:
    """The weights of a block in one piece of the host's memory; a weight that is not on the device is empty."""

    def __init__(self, weights: Sequence[nn.Parameter], device: torch.device) -> None:
        self.size = 0
        self._layout: list[tuple[nn.Parameter, int, torch.Size, tuple[int, ...], torch.dtype]] = []
        for weight in weights:
            self._layout.append((weight, self.size, weight.shape, weight.stride(), weight.dtype))
            self.size += -(-weight.nbytes // _ALIGNED) * _ALIGNED
        where = "meta" if device.type == "meta" else "cpu"
        self.host = torch.empty(self.size, dtype=torch.uint8, device=where, pin_memory=device.type == "cuda")
        for weight, view in self._views(self.host):
            view.copy_(weight.data)
        self.lie_nowhere()

    def lie_in(self, memory: Tensor) -> None:
        for weight, view in self._views(memory):
            weight.data = view

    def lie_nowhere(self) -> None:
        for weight, *_ in self._layout:
            weight.data = weight.data.new_empty(0)

    def _views(self, memory: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for weight, start, shape, strides, dtype in self._layout:
            stretch = memory[start : start + shape.numel() * dtype.itemsize].view(dtype)
            yield weight, stretch.as_strided(shape, strides, stretch.storage_offset())
