"""How strongly an adapter acts: over all, on U-Net and text encoders apart, and block by block."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from library.errors import UserError
from networks.families import SD15, SDXL, Family
from networks.names import UNET, Target
from networks.original_names import unet_to_original

BASE, MID = "BASE", "MID"

_IN = [f"IN{i:02d}" for i in range(12)]
_OUT = [f"OUT{i:02d}" for i in range(12)]
BLOCKS = (BASE, *_IN, MID, *_OUT)

# The lists that the LoRA Block Weight extension and kohya's --lbws take, by length: blocks with attention alone (17, 12),
# or all (26, 20); SD1.5 (17, 26) or SDXL (12, 20). BASE is the text encoders.
_LISTS = {
    17: (BASE, *(_IN[i] for i in (1, 2, 4, 5, 7, 8)), MID, *_OUT[3:]),
    26: BLOCKS,
    12: (BASE, *(_IN[i] for i in (4, 5, 7, 8)), MID, *_OUT[:6]),
    20: (BASE, *_IN[:9], MID, *_OUT[:9]),
}
_LENGTHS = {SD15.key: (17, 26), SDXL.key: (12, 20)}


@dataclass(frozen=True)
class Strength:
    """The ratio of one adapter; 1 is as trained."""

    ratio: float = 1.0
    unet: float = 1.0
    """Further factor for the U-Net."""
    text_encoder: float = 1.0
    """Further factor for the text encoders."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Further factors by block (see `BLOCKS`); blocks that are not named have 1."""

    def of(self, target: Target) -> float:
        part = self.unet if target.component == UNET else self.text_encoder
        return self.ratio * part * self.blocks.get(block_of(target), 1.0)

    def describe(self) -> str:
        """ "0.7, text encoders x 0.5, IN04 x 0" """
        parts = [f"{self.ratio:g}"]
        parts += [
            f"{what} x {value:g}"
            for what, value in (("U-Net", self.unet), ("text encoders", self.text_encoder))
            if value != 1
        ]
        return ", ".join(parts + [f"{block} x {value:g}" for block, value in self.blocks.items() if value != 1])


def block_of(target: Target) -> str:
    """IN00 to IN11, MID, OUT00 to OUT11 as in the original code's flat lists; BASE for what lies outside of them."""
    if target.component != UNET:
        return BASE
    try:
        section, index, *_ = unet_to_original(SD15, target.path).split(".")
    except (KeyError, ValueError):
        return BASE
    # SDXL's lists are numbered alike, only shorter.
    names = {"input_blocks": f"IN{int(index):02d}", "middle_block": MID, "output_blocks": f"OUT{int(index):02d}"}
    return names.get(section, BASE)


def parse_blocks(text: str, family: Family | None = None) -> dict[str, float]:
    """Factors from `IN*=0.5,MID=0` or from a list of 12, 17, 20 or 26 numbers. Raises UserError for anything else.

    family: of the adapter, which has its own blocks, and lists of two of these lengths; None takes any.
    """
    if "=" not in text and ("," in text or "[" in text):
        return _from_list(text, family)
    factors: dict[str, float] = {}
    known = _LISTS[20] if family is SDXL else BLOCKS
    last = known[-1].removeprefix("OUT")
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, equals, number = (piece.strip() for piece in part.partition("="))
        blocks = [block for block in known if fnmatch.fnmatch(block, pattern.upper())]
        if not equals or not blocks:
            raise UserError(
                f"block_ratios: {part!r} is not of the form BLOCK=FACTOR with a block of BASE, IN00 to IN{last}, MID, OUT00 to "
                f"OUT{last} (* stands for any)."
            )
        factors |= dict.fromkeys(blocks, _factor(number))
    return factors


def _from_list(text: str, family: Family | None) -> dict[str, float]:
    try:
        values = json.loads(text if "[" in text else f"[{text}]")
    except json.JSONDecodeError as error:
        raise UserError(f"block_ratios: {text} is not a list of numbers: {error}.") from None
    lengths = _LISTS if family is None else _LENGTHS[family.key]
    if len(values) not in lengths:
        adapter = "" if family is None else f" for an {family.title} LoRA"
        raise UserError(
            f"block_ratios: a list of {len(values)} numbers was given{adapter}. 17 or 26 are for SD1.5, 12 or 20 for SDXL "
            "(BASE first)."
        )
    # What a short list leaves out has no attention: only a LoRA with convolutions reaches it, at full strength.
    return {block: _factor(value) for block, value in zip(_LISTS[len(values)], values, strict=True)}


def _factor(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"block_ratios: {value!r} is not a number.") from None
    if not math.isfinite(number):
        raise UserError(f"block_ratios: {value!r} is not a finite number.")
    return number
