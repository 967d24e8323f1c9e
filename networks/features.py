"""Intermediate feature maps of a diffusers U-Net, caught by forward hooks at named taps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from networks import AdapterError

Tap = Literal["enc_last", "mid", "dec_first"]


@dataclass(frozen=True)
class TapShape:
    channels: int
    stride: int
    """Latent pixels per pixel of the feature map: 8 means 8x8 from 64x64 latents."""


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

    taps: a Tap, or a block's name (`blocks_of`).
    The hooks sit on whole blocks, outside of what regional compilation and gradient checkpointing wrap, and are gone
    when the context ends, however it ends. The dictionary outlives it. A wholly compiled U-Net traces the hooks: enter
    the context once, before its first pass.
    """
    features = Features()
    blocks = {tap: _block(unet, tap) for tap in taps}
    with ExitStack() as hooks:
        for tap, block in blocks.items():
            hooks.callback(block.register_forward_hook(_keeper(features, tap)).remove)
        yield features


def tap_channels(unet_config: Mapping[str, Any], taps: Sequence[str]) -> dict[str, TapShape]:
    """Channels and stride of the feature maps at `taps`, from the configuration of a UNet2DConditionModel.

    Every down block but the last halves the resolution, every up block but the last doubles it.
    """
    widths = unet_config["block_out_channels"]
    deepest = TapShape(widths[-1], 2 ** (len(widths) - 1))
    shapes = {"enc_last": deepest, "mid": deepest, "dec_first": TapShape(widths[-1], max(deepest.stride // 2, 1))}
    return {tap: shapes[_known(tap)] for tap in taps}


def _keeper(features: Features, tap: str) -> Any:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        # Down blocks return (hidden states, residuals).
        features[tap] = output if isinstance(output, Tensor) else output[0]

    return keep


def blocks_of(unet: Any) -> dict[str, nn.Module]:
    """All blocks of a U-Net by name, in the order of its pass: down_0, down_1, ..., mid, up_0, ..."""
    down = {f"down_{number}": block for number, block in enumerate(unet.down_blocks)}
    return {**down, "mid": unet.mid_block, **{f"up_{number}": block for number, block in enumerate(unet.up_blocks)}}


def block_at(unet: Any, tap: Tap) -> str:
    """The name of the block whose output a tap is."""
    return {"enc_last": f"down_{len(unet.down_blocks) - 1}", "mid": "mid", "dec_first": "up_0"}[tap]


def _block(unet: Any, tap: str) -> nn.Module:
    blocks = blocks_of(unet)
    return blocks[tap] if tap in blocks else blocks[block_at(unet, _known(tap))]


def _known(tap: str) -> Any:
    if tap not in get_args(Tap):
        raise AdapterError(f"A tap must be one of {', '.join(get_args(Tap))}, got {tap!r}.")
    return tap
