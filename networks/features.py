"""Intermediate feature maps of a diffusers U-Net, caught by forward hooks at taps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from networks import AdapterError
from networks.taps import tap_path

TIME = "time_embedding"
"""Captured like a tap: what the U-Net makes of the timesteps, [B, T]."""


class Features(dict[str, Tensor]):
    """Tap -> feature map [B, C, h, w] of the U-Net's last forward pass, still in its autograd graph."""

    def __missing__(self, tap: str) -> Tensor:
        raise AdapterError(
            f"No feature map was captured at {tap}: the U-Net has not run inside capture(), or this tap is not among "
            "its taps, or the whole U-Net was compiled before capture() was entered (enter it once, around the loop)."
        )


@contextmanager
def capture(unet: nn.Module, taps: Sequence[str]) -> Iterator[Features]:
    """Within the context, every forward pass of `unet` leaves its feature maps at `taps` in the yielded dictionary.

    The hooks sit on whole blocks, outside of what regional compilation and gradient checkpointing wrap, and are gone
    when the context ends, however it ends. The dictionary outlives it. A wholly compiled U-Net traces the hooks: enter
    the context once, before its first pass.
    """
    features = Features()
    blocks = {tap: tap_block(unet, tap) for tap in taps}
    with ExitStack() as hooks:
        for tap, block in blocks.items():
            hooks.callback(block.register_forward_hook(_keeper(features, tap)).remove)
        yield features


def _keeper(features: Features, tap: str) -> Any:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        # Down blocks return (hidden states, residuals).
        features[tap] = output if isinstance(output, Tensor) else output[0]

    return keep


def tap_block(unet: Any, tap: str) -> nn.Module:
    """The module whose output is taken. Raises AdapterError where the U-Net has no such tap."""
    if tap == TIME:
        return unet.time_embedding
    block: nn.Module = unet.get_submodule(tap_path(tap, len(unet.config["block_out_channels"])))
    return block
