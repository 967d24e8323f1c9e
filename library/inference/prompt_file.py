"""Files of prompts in kohya's syntax: .txt (a prompt a line, # comments, ` --x value`), .toml and .json.

Format: kohya sd-scripts' --sample_prompts (library/train_util.py, line_to_prompt_dict).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.inference.upscaling import SIZE_STEP
from library.options.toml_file import parse_toml
from library.text_files import read_text


@dataclass(frozen=True)
class PromptLine:
    """A prompt and its settings. None: the caller's default."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int | None = None
    scale: float | None = None
    sample_sampler: str | None = None
    flow_shift: float | None = None


_SWITCHES = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "n": ("negative_prompt", str),
    "ss": ("sample_sampler", str),
    "fs": ("flow_shift", float),
}
# kohya's switches and keys for ControlNet and for models that are not supported here, and what others call them.
_UNSUPPORTED = {
    **dict.fromkeys(("cn", "controlnet_image"), "ControlNet"),
    **dict.fromkeys(("g", "distilled_guidance"), "FLUX"),
    **dict.fromkeys(("ctr", "cfg_trunc_ratio", "rcfg", "renorm_cfg"), "Lumina"),
    **dict.fromkeys(("img", "image"), "inpainting models"),
    **dict.fromkeys(("f", "frames", "fps"), "video models"),
}
_KEYS = tuple(field.name for field in fields(PromptLine))
# What people call a setting, in A1111, ComfyUI, Midjourney and elsewhere: its key.
_WORDS = {
    **{key: key for key in _KEYS},
    **dict.fromkeys(("negative", "neg", "no", "uncond"), "negative_prompt"),
    **dict.fromkeys(("steps", "step", "num_inference_steps"), "sample_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "guidance_scale"), "scale"),
    **dict.fromkeys(("sampler", "sampler_name", "sample_sampler", "scheduler"), "sample_sampler"),
    **dict.fromkeys(("shift", "discrete_flow_shift"), "flow_shift"),
}
# Whatever begins like a switch is one, as in kohya's scripts, which leave out the unknown ones without a word.
_SWITCH = re.compile(r"\s--(?=[^\W\d_])")
_NAME = re.compile(r"[\w-]+")


def read_prompt_file(path: Path, notes: list[str] | None = None) -> list[PromptLine]:
    """The prompts of a file. notes: a sentence is added for each size that is rounded.

    Raises UserError, with file and line or entry, for mistakes in the syntax.
    """
    notes = [] if notes is None else notes
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    text = read_text(path)
    if path.suffix.lower() == ".txt":
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        located = [(line, f"{path}, line {number}") for number, line in lines if line and not line.startswith("#")]
        found = [parse_prompt_line(line, where, notes) for line, where in located]
    else:
        found = [_from_table(entry, f"{path}, prompt {i}", notes) for i, entry in enumerate(_tables(path, text), 1)]
    if not found:
        raise UserError(f"{path} has no prompts.")
    return found


def parse_prompt_line(line: str, where: str, notes: list[str]) -> PromptLine:
    """`a cat --n blurry --w 768 --d 42`"""
    prompt, *switches = _SWITCH.split(f" {line}")
    values: dict[str, Any] = {}
    for switch in switches:
        name = _NAME.match(switch)[0]  # type: ignore[index]
        value = switch[len(name) :].strip()
        if name.lower() not in _SWITCHES:
            raise _unknown_switch(name, where)
        key, kind = _SWITCHES[name.lower()]
        try:
            values[key] = kind(value)
        except ValueError:
            raise UserError(f"--{name} wants a number, got {value!r} ({where}).") from None
    return _checked(PromptLine(prompt.strip(), **values), where, notes)


def note_on_switches(text: str, instead: str) -> str | None:
    """A note on what looks like switches in a text that is all prompt; None where there are none. instead: what to do."""
    names = dict.fromkeys(f"--{_NAME.match(switch)[0]}" for switch in _SWITCH.split(f" {text}")[1:])  # type: ignore[index]
    verb = "is" if len(names) == 1 else "are"
    return f"{' and '.join(names)} of the prompt {verb} drawn as words, as A1111 does: {instead}" if names else None


def _unknown_switch(name: str, where: str) -> UserError:
    if (model := _UNSUPPORTED.get(_plain(name))) is not None:
        return UserError(f"--{name} is for {model} and has no effect here ({where}). Leave it out.")
    meant = _meant(name)
    near = next((f" (did you mean --{switch}?)" for switch, (key, _) in _SWITCHES.items() if key == meant), "")
    known, keys = (", ".join(words) for words in ([f"--{switch}" for switch in _SWITCHES], _meanings()))
    return UserError(f"--{name} is no switch of a prompt{near} ({where}). Known are {known} ({keys}).")


def _unknown_key(key: str, where: str) -> UserError:
    if (model := _UNSUPPORTED.get(_plain(key))) is not None:
        return UserError(f"{key} is for {model} and has no effect here ({where}). Leave it out.")
    meant = _meant(key)
    near = f" (did you mean {meant}?)" if meant else ""
    return UserError(f"{key} is no key of a prompt{near} ({where}). Known are {', '.join(_KEYS)}.")


def _meanings() -> list[str]:
    return [key.removeprefix("sample_").replace("_", " ") for key, _ in _SWITCHES.values()]


def _meant(word: str) -> str | None:
    """The key that an unknown word probably stands for."""
    close = difflib.get_close_matches(_plain(word), _WORDS, n=1, cutoff=0.6)
    return _WORDS[close[0]] if close else None


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _tables(path: Path, text: str) -> list[Mapping[str, Any]]:
    try:
        value: Any = parse_toml(text, path) if path.suffix.lower() == ".toml" else json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if path.suffix.lower() == ".toml":
        shared = value.get("prompt", {})
        subsets = shared.pop("subset", [{}]) if isinstance(shared, dict) else None
        if subsets is None or set(value) - {"prompt"}:
            raise UserError(f"{path} needs a table [prompt] with defaults and [[prompt.subset]] for each picture.")
        value = [{**shared, **subset} for subset in subsets]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{path} must hold a list of objects, one for each picture.")
    return value


def _from_table(entry: Mapping[str, Any], where: str, notes: list[str]) -> PromptLine:
    entry = {("scale" if key == "guidance_scale" else key): value for key, value in entry.items()}
    for key in entry:
        if key not in _KEYS:
            raise _unknown_key(key, where)
    if "prompt" not in entry:
        raise UserError(f"prompt is missing ({where}).")
    kinds = dict(_SWITCHES.values()) | {"prompt": str}
    for key, value in entry.items():
        good = (int, float) if kinds[key] is float else kinds[key]
        if not isinstance(value, good) or isinstance(value, bool):
            raise UserError(f"{key} must be {'text' if kinds[key] is str else 'a number'}, got {value!r} ({where}).")
    return _checked(PromptLine(**entry), where, notes)


def _checked(line: PromptLine, where: str, notes: list[str]) -> PromptLine:
    """The line, with sizes rounded down to what can be drawn, as in kohya's scripts."""
    if note := note_on_switches(line.prompt, f"in a .toml or .json file, each setting has a key of its own ({where})."):
        notes.append(note)
    for name in ("width", "height"):
        size = getattr(line, name)
        if size is not None and size < SIZE_STEP:
            raise UserError(f"{name} must be at least {SIZE_STEP}, got {size} ({where}).")
        if size is not None and size % SIZE_STEP:
            rounded = size - size % SIZE_STEP
            notes.append(f"{name} {size} is rounded down to {rounded}, a multiple of {SIZE_STEP} ({where}).")
            line = replace(line, **{name: rounded})
    if line.sample_steps is not None and not 1 <= line.sample_steps <= 1000:
        raise UserError(f"steps must lie between 1 and 1000, got {line.sample_steps} ({where}).")
    if line.scale is not None and not 1 <= line.scale < math.inf:
        raise UserError(f"scale must be a finite number, at least 1, which is no guidance, got {line.scale} ({where}).")
    if line.flow_shift is not None and not 0 < line.flow_shift < math.inf:
        raise UserError(f"flow_shift must be a finite number above 0, got {line.flow_shift} ({where}).")
    if line.seed is not None and not 0 <= line.seed < 2**63:
        raise UserError(f"seed must lie between 0 and 2^63, got {line.seed} ({where}).")
    return line
