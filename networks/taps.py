"""Taps: after which blocks of a U-Net features are taken, by the documents' names or diffusers', and what shapes they have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from networks import AdapterError

_NUMBERED = re.compile(r"(down|up)_blocks\.(\d+)")
KNOWN = "enc_last, mid, dec_first, down_blocks.N or up_blocks.N"


@dataclass(frozen=True)
class TapShape:
    channels: int
    stride: int
    """Latent pixels per pixel of the feature map: 8 means 8x8 from 64x64 latents."""


def all_taps(blocks: int) -> list[str]:
    """Every place of a U-Net with so many down blocks, in the order of its pass."""
    numbers = range(blocks)
    return [*(f"down_blocks.{number}" for number in numbers), "mid", *(f"up_blocks.{number}" for number in numbers)]


def check_tap(tap: str) -> None:
    """Raise AdapterError where it is none of any U-Net's."""
    if tap not in ("enc_last", "mid", "dec_first") and not _NUMBERED.fullmatch(tap):
        raise AdapterError(f"A tap must be {KNOWN}, got {tap!r}.")


def tap_path(tap: str, blocks: int) -> str:
    """The module of a U-Net with so many down blocks after which features are taken. Raises AdapterError where it has none such."""
    check_tap(tap)
    path = {"enc_last": f"down_blocks.{blocks - 1}", "mid": "mid_block", "dec_first": "up_blocks.0"}.get(tap, tap)
    numbered = _NUMBERED.fullmatch(path)
    if numbered is not None and int(numbered[2]) >= blocks:
        kind = numbered[1]
        raise AdapterError(f"This U-Net has no {tap}: it goes from {kind}_blocks.0 to {kind}_blocks.{blocks - 1}.")
    return path


def last_tap(taps: Sequence[str], blocks: int) -> str:
    """Which of them a pass through a U-Net with so many down blocks comes to last. Raises AdapterError as `tap_path` does."""
    order = [tap_path(tap, blocks) for tap in all_taps(blocks)]
    return max(taps, key=lambda tap: order.index(tap_path(tap, blocks)))


def tap_channels(unet_config: Mapping[str, Any], taps: Sequence[str]) -> dict[str, TapShape]:
    """Channels and stride of the feature maps at `taps`, from the configuration of a UNet2DConditionModel.

    Every down block but the last halves the resolution, every up block but the last doubles it. Raises AdapterError where there
    is no such tap, and where two of them are one place.
    """
    widths = unet_config["block_out_channels"]
    last, places = len(widths) - 1, [tap_path(tap, len(widths)) for tap in taps]
    if twice := [tap for tap, place in zip(taps, places, strict=True) if places.count(place) > 1]:
        raise AdapterError(f"The taps {' and '.join(twice)} are one place in this U-Net. Name it once.")
    return {tap: _shape(place, widths, last) for tap, place in zip(taps, places, strict=True)}


def _shape(place: str, widths: Sequence[int], last: int) -> TapShape:
    numbered = _NUMBERED.fullmatch(place)
    if numbered is None:
        return TapShape(widths[-1], 2**last)
    number = int(numbered[2])
    if numbered[1] == "down":
        return TapShape(widths[number], 2 ** min(number + 1, last))
    return TapShape(widths[last - number], 2 ** max(last - number - 1, 0))
