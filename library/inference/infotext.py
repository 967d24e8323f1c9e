"""The `parameters` text of a picture, which A1111 and other UIs write into a PNG and read back ("PNG Info").

    a photo of a cat
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: v1-5

Format: infotext of stable-diffusion-webui 1.10 (its wiki, "Features", PNG info). A value with a comma, a colon, a quote or a
line break is quoted as in JSON. Prompts are not quoted: where a line
of one begins with "Negative prompt:", the rest is read as the negative prompt, by A1111 and here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError
from library.files import file_hash, remembered_hash, whole_file

_NEGATIVE = "Negative prompt:"
# A1111 takes a last line with fewer pairs for a part of the prompt.
_FEWEST_PAIRS = 3
_PLAIN_NAME = re.compile(r"\w[\w \-/]*")
_BELOW = re.compile(r"(\w[\w \-/]*):")
_SIZE = re.compile(r"([0-9]{1,6})\s*[xX×]\s*([0-9]{1,6})")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_SPACE = re.compile(r"\s*")
# Before A1111 1.9, the names of samplers contained the schedule: "DPM++ 2M Karras".
_SCHEDULES_IN_NAMES = ("Karras", "Exponential")


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


@dataclass(frozen=True)
class _Kind:
    """A type of value. write: as text. read: from text; None where the text is no value of the type."""

    write: Callable[[Any], str]
    read: Callable[[str], Any]


def parameters(info: Infotext) -> str:
    """The text of the settings. Raises ValueError for a name in `other` that could not be read back."""
    lines = [info.prompt] if info.prompt else []
    if info.negative_prompt:
        lines.append(f"{_NEGATIVE} {info.negative_prompt}")
    pairs: dict[str, str] = {}
    for name, (attribute, kind) in _FIELDS.items():
        value = getattr(info, attribute)
        if value is not None and value != {}:
            pairs[name] = kind.write(value)
    for name, text in info.other.items():
        if not name or name != name.strip() or any(mark in name for mark in ",:\n"):
            raise ValueError(f"{name!r} cannot be a name in a picture's parameters")
        pairs[name] = text
    # A name that equals its value is a flag: it is written alone.
    words = [name if name == text else f"{name}: {_quoted(text)}" for name, text in pairs.items()]
    return "\n".join([*lines, ", ".join(words)] if words else lines)


def parse_parameters(text: str) -> Infotext:
    """The settings in a text. Without a line of settings, the whole text is the prompt; unknown names, and values of another type
    than their field's, are kept in `other`.

    Samplers of older UIs ("DPM++ 2M Karras") are split into sampler and schedule. Lines keep their spaces, which A1111 strips.
    """
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    place = _settings_line(lines)
    pairs: dict[str, str] = {}
    if place is not None:
        pairs = dict(_pairs(lines[place])) | _pairs_below(lines[place + 1 :])
        lines = lines[:place]
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(_NEGATIVE)), len(lines))
    negative = lines[start:]
    if negative:
        negative[0] = negative[0].lstrip().removeprefix(_NEGATIVE).removeprefix(" ")
    return _from_pairs("\n".join(lines[:start]), "\n".join(negative), pairs)


def save_png(picture: Image.Image, path: Path, info: Infotext) -> None:
    """Write a PNG atomically, with the text in its chunk "parameters": tEXt, or iTXt where Latin-1 is not enough."""
    # A command line that is not UTF-8 contains lone surrogates, which cannot be written.
    text = parameters(info).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def read_png(path: Path) -> Infotext:
    """The settings in a PNG. Raises UserError where it is no PNG, or has no parameters text."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            texts: dict[str, str] = picture.text  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a PNG picture; parameters are read from PNG only.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    text = texts.get("parameters")
    if text is None:
        found = f" It has other texts: {', '.join(sorted(texts))}." if texts else ""
        raise UserError(f"{path} has no text named parameters, as A1111 writes it.{found}")
    if text.lstrip().startswith("{"):
        with suppress(ValueError):
            json.loads(text)
            raise UserError(f"The parameters of {path} are JSON (SwarmUI writes them so), not text as A1111 writes it.")
    return parse_parameters(text)


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


def _settings_line(lines: list[str]) -> int | None:
    """The last line of settings: it has three pairs or more, one of them known, or begins with "Steps"; below are only pairs."""
    for place in reversed(range(len(lines))):
        names = [name for name, value in _pairs(lines[place]) if name != value and _PLAIN_NAME.fullmatch(name)]
        known = [name for name in names if name in _FIELDS]
        if known and (len(names) >= _FEWEST_PAIRS or names[0] == "Steps"):
            below = lines[place + 1 : place + 2]
            return place if not below or _BELOW.match(below[0]) else None
    return None


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """Names and values of a line of settings. The value of a name without one is the name."""
    position = 0
    while position < len(line):
        end = next((i for i in range(position, len(line)) if line[i] in ",:"), len(line))
        name = value = line[position:end].strip()
        if line[end : end + 1] == ":":
            start, end = end + 1, _end_of_value(line, end + 1)
            value = _unquoted(line[start:end].strip())
        if name:
            yield name, value
        position = end + 1


def _pairs_below(lines: list[str]) -> dict[str, str]:
    """The pairs that extensions (Dynamic Prompts) write below the settings: one a line; a value may continue on the next lines."""
    pairs: dict[str, str] = {}
    name = ""
    for line in lines:
        if found := _BELOW.match(line):
            name, pairs[name] = found[1], line[found.end() :].strip()
        else:
            pairs[name] += f"\n{line}"
    return pairs


def _end_of_value(line: str, start: int) -> int:
    """The position of the comma after a value. JSON is skipped: strings, and the objects that CivitAI's tools write."""
    first = _after_space(line, start)
    if line[first : first + 1] in ('"', "{", "["):
        with suppress(ValueError, RecursionError):
            _, end = json.JSONDecoder(strict=False).raw_decode(line, first)
            following = _after_space(line, end)
            if line[following : following + 1] in ("", ","):
                start = end
    comma = line.find(",", start)
    return len(line) if comma < 0 else comma


def _after_space(line: str, start: int) -> int:
    found = _SPACE.match(line, start)
    return start if found is None else found.end()


def _quoted(text: str) -> str:
    plain = text and text == text.strip() and not any(mark in text for mark in ',:\n"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return text


def _from_pairs(prompt: str, negative_prompt: str, pairs: Mapping[str, str]) -> Infotext:
    found: dict[str, Any] = {}
    other: dict[str, str] = {}
    for name, text in pairs.items():
        attribute, kind = _FIELDS.get(name, ("", None))
        value = kind.read(text) if kind else None
        if value is None:
            other[name] = text
        else:
            found[attribute] = value
    sampler, _, last = found.get("sampler", "").rpartition(" ")
    if "schedule" not in found and "Schedule type" not in other and sampler and last in _SCHEDULES_IN_NAMES:
        found |= {"sampler": sampler, "schedule": last}
    return Infotext(prompt, negative_prompt, **found, other=other)


def _read_integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) else None


def _read_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _write_number(value: float) -> str:
    """7 for 7.0; otherwise as many digits as reading the same number back needs."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _read_size(text: str) -> tuple[int, int] | None:
    found = _SIZE.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


def _write_hashes(hashes: Mapping[str, str]) -> str:
    # As in A1111, names lose these characters.
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digest}" for name, digest in hashes.items())


def _read_hashes(text: str) -> dict[str, str] | None:
    pairs = [part.split(":") for part in text.split(",")]
    if any(len(pair) != 2 or not all(word.strip() for word in pair) for pair in pairs):
        return None
    return {name.strip(): digest.strip() for name, digest in pairs}


_TEXT = _Kind(str, lambda text: text or None)
_WHOLE = _Kind(str, _read_integer)
_NUMBER = _Kind(_write_number, _read_number)
_WIDTH_AND_HEIGHT = _Kind(lambda size: f"{size[0]}x{size[1]}", _read_size)
_HASHES = _Kind(_write_hashes, _read_hashes)

# A1111's names and order.
_FIELDS: dict[str, tuple[str, _Kind]] = {
    "Steps": ("steps", _WHOLE),
    "Sampler": ("sampler", _TEXT),
    "Schedule type": ("schedule", _TEXT),
    "CFG scale": ("cfg_scale", _NUMBER),
    "Seed": ("seed", _WHOLE),
    "Size": ("size", _WIDTH_AND_HEIGHT),
    "Model hash": ("model_hash", _TEXT),
    "Model": ("model", _TEXT),
    "VAE": ("vae", _TEXT),
    "Denoising strength": ("denoising_strength", _NUMBER),
    "Clip skip": ("clip_skip", _WHOLE),
    "RNG": ("rng", _TEXT),
    "Hires upscale": ("hires_upscale", _NUMBER),
    "Hires steps": ("hires_steps", _WHOLE),
    "Hires upscaler": ("hires_upscaler", _TEXT),
    "Refiner": ("refiner", _TEXT),
    "Refiner switch at": ("refiner_switch_at", _NUMBER),
    "Lora hashes": ("lora_hashes", _HASHES),
    "Version": ("version", _TEXT),
}
