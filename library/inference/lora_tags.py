"""`<lora:name:weight>` tags of prompts, with weights that change from step to step.

The plain tag is A1111's. The stepwise one, `<lora:name:0@0.4,0.7@0.8:hr=0.7@0,0@0.5>`, is the extension loractl's
(cheald/sd-webui-loractl), whose interpolation is followed here; reForge's port switches between the weights and ignores `hr`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from library.errors import UserError

_TAG = re.compile(r"<(\w+):([^>]+)>")
# The last of loractl's x = step / (steps - 2): weights are read a step late, and the last step repeats the end.
_LATE = 2
_NAMED = ("te", "unet", "hr", "hrte", "hrunet")


@dataclass(frozen=True)
class PromptTag:
    """A tag as written: <kind:positional:...:name=value>."""

    kind: str
    positional: tuple[str, ...]
    named: Mapping[str, str]

    def __str__(self) -> str:
        return f"<{':'.join([self.kind, *self.positional, *(f'{key}={value}' for key, value in self.named.items())])}>"


def cut_out_tags(text: str) -> tuple[str, tuple[PromptTag, ...]]:
    """The text without its tags, and the tags. An argument with exactly one `=` is a named one."""
    tags = []

    def keep(found: re.Match[str]) -> str:
        arguments = found[2].split(":")
        named = dict(argument.split("=") for argument in arguments if argument.count("=") == 1)
        tags.append(PromptTag(found[1], tuple(a for a in arguments if a.count("=") != 1), named))
        return ""

    return _TAG.sub(keep, text), tuple(tags)


@dataclass(frozen=True)
class StepWeights:
    """A weight over the steps: piecewise linear between (position, weight), constant outside."""

    positions: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def is_constant(self) -> bool:
        return len(set(self.weights)) == 1

    def at(self, step: int, steps: int) -> float:
        """At a step, counted from 0. Positions are fractions of the way, x = step / (steps - 2), if the last is at most 1."""
        x = step / max(steps - _LATE, 1) if self.positions[-1] <= 1 else step
        return float(np.interp(x, self.positions, self.weights))


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA named in a prompt: weights of text encoders and U-Net, in the first pass and in that of the hires fix."""

    name: str
    te: StepWeights
    unet: StepWeights
    hrte: StepWeights
    hrunet: StepWeights


def lora_weights(tag: PromptTag) -> LoraWeights:
    """The weights of a `lora` or `lyco` tag. The default weight is 1, `unet` defaults to `te`, and the second pass to the first.

    Raises UserError for a missing name, for weights that are no numbers, and for arguments other than te, unet, hr, hrte, hrunet.
    """
    if not tag.positional or not tag.positional[0].strip():
        raise UserError(f"{tag} of the prompt names no file. Write <{tag.kind}:name:weight>.")
    unknown = [name for name in tag.named if name not in _NAMED]
    if unknown or len(tag.positional) > 3:
        found = f"{unknown[0]}=" if unknown else tag.positional[3]
        raise UserError(f"{tag} of the prompt has {found!r}, which has no effect here. Known are {', '.join(_NAMED)}.")
    name, *more = tag.positional
    given = {**dict(zip(("te", "unet"), more, strict=False)), **tag.named}
    te = given.get("te", "1")
    unet = given.get("unet", te)
    texts = {
        "te": te,
        "unet": unet,
        "hrte": given.get("hrte", given.get("hr", te)),
        "hrunet": given.get("hrunet", given.get("hr", unet)),
    }
    return LoraWeights(name, **{key: _step_weights(text, tag) for key, text in texts.items()})


def _step_weights(text: str, tag: PromptTag) -> StepWeights:
    """`0.7`, or `0@0.4,0.7@0.8` with `,` or `;` between; an entry without a position is at 1."""
    points = []
    for entry in re.split("[,;]", text):
        weight, _, position = entry.partition("@")
        try:
            points.append((float(position or 1), float(weight)))
        except ValueError:
            points.append((math.nan, math.nan))
    if not all(math.isfinite(value) for point in points for value in point):
        raise UserError(f"{tag} of the prompt wants a weight or weight@position,weight@position, got {text!r}.")
    points.sort(key=lambda point: point[0])
    return StepWeights(tuple(x for x, _ in points), tuple(y for _, y in points))
