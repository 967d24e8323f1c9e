"""How strongly an adapter acts: over all, on U-Net and text encoders apart, and block by block."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from library.errors import UserError
from networks.families import FAMILIES, SD15, Family
from networks.names import UNET, Target
from networks.original_names import unet_to_original

BASE, MID = "BASE", "MID"

_IN = [f"IN{i:02d}" for i in range(12)]
_OUT = [f"OUT{i:02d}" for i in range(12)]
BLOCKS = (BASE, *_IN, MID, *_OUT)


def _lists(family: Family) -> dict[int, tuple[str, ...]]:
    """The lists that the LoRA Block Weight extension and kohya's --lbws take, by length: blocks with attention alone (17 of
    SD1.5, 12 of SDXL), or all (26, 20). BASE is the text encoders."""
    down, _, up = family.sections
    levels = list(enumerate(family.up_attention))
    attention = (
        BASE,
        *(_IN[3 * (len(levels) - 1 - level) + i] for level, there in reversed(levels) if there for i in (1, 2)),
        MID,
        *(_OUT[3 * level + i] for level, there in levels if there for i in range(3)),
    )
    every = (BASE, *_IN[:down], MID, *_OUT[:up])
    return {len(attention): attention, len(every): every}


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
        section, index, *_ = unet_to_original(SD15, target.module).split(".")
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
    known = BLOCKS if family is None else max(_lists(family).values(), key=len)
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
    families = FAMILIES.values() if family is None else [family]
    blocks = next((lists[len(values)] for lists in map(_lists, families) if len(values) in lists), None)
    if blocks is None:
        adapter = "" if family is None else f" for an {family.title} LoRA"
        fit = [f"{' or '.join(map(str, _lists(known)))} fit {known.title}" for known in FAMILIES.values()]
        raise UserError(
            f"block_ratios: a list of {len(values)} numbers was given{adapter}. {', '.join(fit)} (BASE first)."
        )
    # What a short list leaves out has no attention: only a LoRA with convolutions reaches it, at full strength.
    return {block: _factor(value) for block, value in zip(blocks, values, strict=True)}


def _factor(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"block_ratios: {value!r} is not a number.") from None
    if not math.isfinite(number):
        raise UserError(f"block_ratios: {value!r} is not a finite number.")
    return number
