"""The `parameters` text of a picture, which A1111 and other UIs read from a PNG ("PNG Info").

    a photo of a cat
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: v1-5

Format: infotext of stable-diffusion-webui 1.10 (its wiki, "Features", PNG info). A value with a comma, a colon, a quote or a
line break is quoted as in JSON. Prompts are not quoted: where a line of one begins with "Negative prompt:",
the rest is read as the negative prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.files import file_hash, remembered_hash, whole_file


@dataclass(frozen=True)
class Infotext:
    """How a picture was made. None: unknown. Settings without a field here are in `other`, in their order."""

    prompt: str = ""
    negative_prompt: str = ""
    steps: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    """"Schedule type" """
    cfg_scale: float | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    """width and height of the first pass, in pixels"""
    model_hash: str | None = None
    """the first 10 hex digits of the file's SHA-256 (`model_hash`)"""
    model: str | None = None
    vae: str | None = None
    """only where it is not the model's own"""
    denoising_strength: float | None = None
    clip_skip: int | None = None
    """A1111 writes it from 2 on"""
    rng: str | None = None
    """where the initial noise is drawn: CPU or NV. A1111 does not write its default, the GPU"""
    hires_upscale: float | None = None
    hires_steps: int | None = None
    hires_upscaler: str | None = None
    refiner: str | None = None
    """as A1111 names it: name [first 10 hex digits]"""
    refiner_switch_at: float | None = None
    lora_hashes: Mapping[str, str] = field(default_factory=dict)
    """name: the first 12 hex digits (`lora_hash`)"""
    version: str | None = None
    other: Mapping[str, str] = field(default_factory=dict)


def parameters(info: Infotext) -> str:
    """The text of the settings. Raises ValueError for a name in `other` that could not be read back."""
    lines = [info.prompt] if info.prompt else []
    if info.negative_prompt:
        lines.append(f"Negative prompt: {info.negative_prompt}")
    pairs: dict[str, str] = {}
    for name, (attribute, write) in FIELDS.items():
        value = getattr(info, attribute)
        if value is not None and value != {}:
            pairs[name] = write(value)
    for name, text in info.other.items():
        if not name or name != name.strip() or any(mark in name for mark in ",:\n"):
            raise ValueError(f"{name!r} cannot be a name in a picture's parameters")
        pairs[name] = text
    # A name that equals its value is a flag: it is written alone.
    words = [name if name == text else f"{name}: {_quoted(text)}" for name, text in pairs.items()]
    return "\n".join([*lines, ", ".join(words)] if words else lines)


def save_png(picture: Image.Image, path: Path, info: Infotext) -> None:
    """Write a PNG atomically, with the text in its chunk "parameters": tEXt, or iTXt where Latin-1 is not enough."""
    # A command line that is not UTF-8 contains lone surrogates, which cannot be written.
    text = parameters(info).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def model_hash(path: Path, memory: Path | None = None) -> str | None:
    """A1111's hash of a checkpoint: the first 10 hex digits of the file's SHA-256. None for a folder.

    memory: a JSON file in which hashes are kept (`library.files.remembered_hash`); gigabytes take seconds.
    """
    if not path.is_file():
        return None
    return (file_hash(path) if memory is None else remembered_hash(path, memory))[:10]


def lora_hash(path: Path) -> str:
    """A1111's hash of a LoRA: the first 12 hex digits of the SHA-256 of the tensors, so that metadata does not change it.

    Of a file that is not safetensors, the hash of the whole file.
    """
    if path.suffix.lower() != ".safetensors":
        return file_hash(path)[:12]
    with open(path, "rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), 1)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def model_title(name: str, digest: str | None) -> str:
    """A1111's name of a refiner: name [hash]."""
    return f"{name} [{digest}]" if digest else name


def _quoted(text: str) -> str:
    plain = text and text == text.strip() and not any(mark in text for mark in ',:\n"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def _write_number(value: float) -> str:
    """7 for 7.0; otherwise as many digits as reading the same number back needs."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _write_hashes(hashes: Mapping[str, str]) -> str:
    # As in A1111, names lose these characters.
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digest}" for name, digest in hashes.items())


# A1111's names and order, with the field of each and how its value is written.
FIELDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "Steps": ("steps", str),
    "Sampler": ("sampler", str),
    "Schedule type": ("schedule", str),
    "CFG scale": ("cfg_scale", _write_number),
    "Seed": ("seed", str),
    "Size": ("size", lambda size: f"{size[0]}x{size[1]}"),
    "Model hash": ("model_hash", str),
    "Model": ("model", str),
    "VAE": ("vae", str),
    "Denoising strength": ("denoising_strength", _write_number),
    "Clip skip": ("clip_skip", str),
    "RNG": ("rng", str),
    "Hires upscale": ("hires_upscale", _write_number),
    "Hires steps": ("hires_steps", str),
    "Hires upscaler": ("hires_upscaler", str),
    "Refiner": ("refiner", str),
    "Refiner switch at": ("refiner_switch_at", _write_number),
    "Lora hashes": ("lora_hashes", _write_hashes),
    "Version": ("version", str),
}
