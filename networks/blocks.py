"""Blocks of the U-Net as kohya counts them, for ranks and learning rates that differ from block to block.

SD1.5 has 25: 12 down, 1 mid, 12 up, each the place in the original code's lists of input and output blocks. SDXL has 23:
one for the embeddings (no adapters there), 9 input, 3 middle and 9 output blocks, one for the output (none there either).

Source: kohya sd-scripts, networks/lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from networks import AdapterError
from networks.families import Family
from networks.original_names import unet_to_original


def block_of(family: Family, path: str) -> int:
    """The block that a module of the U-Net is of. Raises AdapterError for a path that is of none."""
    try:
        section, index, *_ = unet_to_original(family, path).split(".")
        down, mid, _ = family.sections
        first = {"input_blocks": 0, "middle_block": down, "output_blocks": down + mid}[section]
    except (KeyError, ValueError):
        raise AdapterError(f"{path} is in no block of the U-Net of {family.title}.") from None
    inside = 0 if section == "middle_block" and mid == 1 else int(index)
    return family.outer_blocks + first + inside


def block_weights(
    family: Family,
    down: Sequence[float] | None = None,
    mid: Sequence[float] | None = None,
    up: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """One learning-rate weight for each block from those of the sections, in the order of the data's way.

    As in kohya's scripts a section that is too short, or is not given, is filled up with 1, and one too long is cut.
    """
    outer = (1.0,) * family.outer_blocks
    sections = zip((down, mid, up), family.sections, strict=True)
    weights = [(*(given or ())[:count], *(1.0,) * (count - len(given or ()))) for given, count in sections]
    return (*outer, *(weight for section in weights for weight in section), *outer)
