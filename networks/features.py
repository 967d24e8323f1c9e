"""Intermediate feature maps of a diffusers U-Net, caught by forward hooks at taps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from networks import AdapterError
from networks.taps import last_tap, tap_path

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


@contextmanager
def capture_alone(unet: Any, taps: Sequence[str]) -> Iterator[Features]:
    """As `capture`, for one pass that ends after the last of the taps, and the context with it: the rest is not computed.

    The pass is the last thing in the context; what is made of the features comes after it.
    """
    tap = last_tap([tap for tap in taps if tap != TIME], len(unet.config["block_out_channels"]))

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Stopped

    with suppress(_Stopped), capture(unet, taps) as features, ExitStack() as hooks:
        hooks.callback(tap_block(unet, tap).register_forward_hook(stop).remove)
        yield features


class _Stopped(Exception):
    """The forward pass has passed the last tap."""


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
