"""Reads the parameters text of a PNG as A1111 does: its regular expression and rules (modules/infotext_utils.py, 1.10)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from library.inference.infotext import FIELDS, Infotext

_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_TYPES = {
    **dict.fromkeys(("steps", "seed", "clip_skip", "hires_steps"), int),
    **dict.fromkeys(("cfg_scale", "denoising_strength", "hires_upscale", "refiner_switch_at"), float),
    "size": lambda text: tuple(map(int, text.split("x"))),
    "lora_hashes": lambda text: dict(pair.split(": ") for pair in text.split(", ")),
}


def read_png(path: Path) -> Infotext:
    with Image.open(path, formats=["PNG"]) as picture:
        return read_parameters(picture.text["parameters"])  # type: ignore[attr-defined]


def read_parameters(text: str) -> Infotext:
    """A last line with fewer than three pairs belongs to the prompt."""
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    prompts: dict[str, list[str]] = {"prompt": [], "negative_prompt": []}
    name = "prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            name, line = "negative_prompt", line[16:].strip()
        prompts[name].append(line)
    found: dict[str, Any] = {name: "\n".join(lines) for name, lines in prompts.items()}
    other = {}
    for name, value in pairs:
        plain = json.loads(value) if value.startswith('"') and value.endswith('"') else value
        if name in FIELDS:
            field = FIELDS[name][0]
            found[field] = _TYPES.get(field, str)(plain)
        else:
            other[name] = plain
    return Infotext(**found, other=other)
