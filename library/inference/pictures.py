"""Pictures as PNG files that say how they were made, in the words of A1111, which its "PNG Info" and others read.

Format: infotext of stable-diffusion-webui (modules/infotext_utils.py), in the text chunk "parameters".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.files import whole_file
from library.inference.text_to_image import SAMPLER, Drawing


@dataclass(frozen=True)
class FoldedLora:
    """What a picture's parameters say of an adapter."""

    name: str
    weight: float
    hash: str


def describe_lora(name: str, weight: float, file_path: Path) -> FoldedLora:
    """With A1111's short hash of a LoRA file: SHA-256 of what follows the header, which metadata does not change."""
    with open(file_path, "rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), 1)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return FoldedLora(name, weight, digest.hexdigest()[:12])


def parameters_text(drawing: Drawing, seed: int, model: str, loras: Sequence[FoldedLora]) -> str:
    """Prompt, negative prompt and a line of "Name: value" pairs. Adapters stand in the prompt, as A1111 takes them."""
    tags = "".join(f" <lora:{lora.name}:{lora.weight:g}>" for lora in loras)
    values: dict[str, object] = {
        "Steps": drawing.steps,
        "Sampler": SAMPLER,
        "CFG scale": f"{drawing.cfg_scale:g}",
        "Seed": seed,
        "Size": f"{drawing.width}x{drawing.height}",
        "Model": model,
    }
    if loras:
        values["Lora hashes"] = ", ".join(f"{lora.name}: {lora.hash}" for lora in loras)
    lines = [f"{drawing.prompt}{tags}".strip()]
    if drawing.negative_prompt:
        lines.append(f"Negative prompt: {drawing.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items()))
    return "\n".join(lines)


def save_picture(picture: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG, whole or not at all."""
    info = PngInfo()
    info.add_text("parameters", parameters)  # becomes UTF-8 (iTXt) where Latin-1 does not do
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures, of one size, row by row in as square an arrangement as there is; black where none is left."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return sheet


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
