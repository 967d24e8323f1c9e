"""Names of samplers and schedules as A1111, kohya and users write them. No torch: options are checked with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from library.errors import UserError

# Sampler -> the schedule that A1111's "Automatic" chooses.
DEFAULT_SCHEDULES = {
    "Euler": "Normal",
    "Euler a": "Normal",
    "DDIM": "DDIM",
    "PLMS": "DDIM",
    "LMS": "Normal",
    "Heun": "Normal",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "DPM-Solver 2M": "Normal",
    "DPM++ 2S": "Normal",
    "DPM++ 2M": "Karras",
    "DPM++ 2S a": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 3M SDE": "Exponential",
    "UniPC": "Normal",
}
SAMPLER_NAMES = tuple(DEFAULT_SCHEDULES)
SCHEDULE_NAMES = ("Normal", "Karras", "Exponential", "Align Your Steps 11", "Align Your Steps 32", "DDIM")
DEFAULT_SAMPLER = "DPM++ 2M"

# What pictures of a rectified flow are not drawn with, and why. DDIM, the sampler, is Euler's there.
SAMPLERS_NOT_ALONG_FLOW = {
    "PLMS": "weights its steps as if they were equally wide",
    **dict.fromkeys(
        ("DPM2", "DPM2 a", "DPM-Solver 2M"), "steps in the logarithm of the level, which begins at no number there"
    ),
}
_BY_LEVEL = "has the levels of SD's own noise schedules, of which a rectified flow has none"
SCHEDULES_NOT_ALONG_FLOW = {
    **dict.fromkeys(("Karras", "Exponential", "DDIM"), _BY_LEVEL),
    **dict.fromkeys(
        ("Align Your Steps 11", "Align Your Steps 32"), f"{_BY_LEVEL}: it was optimised for SD1.5 and SDXL as published"
    ),
}

# kohya's --sample_sampler -> the sampler and schedule that diffusers runs for it.
_KOHYA = {
    "ddim": ("DDIM", "DDIM"),
    "pndm": ("PLMS", "DDIM"),
    "lms": ("LMS", "Normal"),
    "euler": ("Euler", "Normal"),
    "euler_a": ("Euler a", "Normal"),
    "heun": ("Heun", "Normal"),
    "dpm_2": ("DPM2", "Normal"),
    "dpm_2_a": ("DPM2 a", "Normal"),
    "dpmsolver": ("DPM-Solver 2M", "Normal"),
    "dpmsolver++": ("DPM++ 2M", "Normal"),
    "dpmsingle": ("DPM++ 2S", "Normal"),
}
_KOHYA |= {f"k_{name}": _KOHYA[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}
# Parts of ComfyUI's and diffusers' words -> A1111's.
_PARTS = {
    "ancestral": "a",
    "uni pc": "unipc",
    "unipc bh2": "unipc",
    "dpm 2": "dpm2",
    "pndm": "plms",
    "sde gpu": "sde",
    "simple": "normal",
}
_SHORT = {
    "uniform": "Normal",
    "align your steps": "Align Your Steps 11",
    "ays": "Align Your Steps 11",
    "ays 11": "Align Your Steps 11",
    "ays 32": "Align Your Steps 32",
}


def sampler_named(text: str) -> tuple[str, str | None]:
    """(sampler, schedule) of "DPM++ 2M", "dpm++ 2m karras", kohya's "euler_a" or ComfyUI's "dpmpp_2m_karras". Schedule None: the
    sampler's default.

    Raises UserError for an unknown name, with the nearest one.
    """
    word, samplers = _plain(text), _by_word(SAMPLER_NAMES)
    if word in samplers:
        return samplers[word], None
    if word in _KOHYA:
        return _KOHYA[word]
    for spelling in dict.fromkeys((word, _spelt_out(word))):
        for ending, schedule in {"": None, **_schedules()}.items():
            sampler = spelling.removesuffix(f" {ending}") if ending else spelling
            if sampler in samplers and (not ending or sampler != spelling):
                return samplers[sampler], schedule
    near = _nearest(word, {**{name: name for name in _KOHYA}, **samplers})
    raise UserError(
        f"{text} is no sampler{near}. Known are {', '.join(SAMPLER_NAMES)}, and kohya's {', '.join(_KOHYA)}."
    )


def _spelt_out(word: str) -> str:
    """A1111's spelling of an identifier: "dpmpp_2s_ancestral_karras" and "k_dpmpp_2s_a_karras" as "dpm++ 2s a karras"."""
    word = word.replace("_", " ").replace("-", " ").removeprefix("k ").replace("dpmpp", "dpm++")
    for theirs, ours in _PARTS.items():
        word = re.sub(rf"(?<!\S){theirs}(?!\S)", ours, word)
    return _plain(word)


def sampler_along_flow(sampler: str, schedule: str | None) -> tuple[str, str]:
    """Sampler and schedule on a rectified flow; schedule: as the user gave it. Raises UserError for what flow does not have."""
    if (reason := SAMPLERS_NOT_ALONG_FLOW.get(sampler)) is not None:
        known = ", ".join(name for name in SAMPLER_NAMES if name not in SAMPLERS_NOT_ALONG_FLOW)
        raise UserError(f"The sampler {sampler} {reason}. This picture is drawn along a rectified flow: take {known}.")
    require_schedule_along_flow(schedule or "Normal")
    return sampler, "Normal"


def require_schedule_along_flow(schedule: str) -> None:
    """Raise UserError for a schedule that a rectified flow does not have."""
    if (reason := SCHEDULES_NOT_ALONG_FLOW.get(schedule)) is not None:
        raise UserError(
            f"The schedule {schedule} {reason}. This picture is drawn along a rectified flow: take Normal, with flow_shift."
        )


def is_kohyas(text: str) -> bool:
    """Whether the name is kohya's, whose schedule is only a default."""
    return _plain(text) in _KOHYA


def schedule_named(text: str) -> str:
    """The schedule that `text` names, in any case. Raises UserError for an unknown one, with the nearest."""
    word, known = _plain(text), _schedules()
    if word not in known:
        raise UserError(f"{text} is no schedule{_nearest(word, known)}. Known are {', '.join(SCHEDULE_NAMES)}.")
    return known[word]


def _schedules() -> dict[str, str]:
    return {**_by_word(SCHEDULE_NAMES), **_SHORT}


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()


def _by_word(names: Iterable[str]) -> dict[str, str]:
    return {_plain(name): name for name in names}


def _nearest(word: str, known: Mapping[str, str]) -> str:
    """ " (did you mean x?)", whatever the case, or the empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {known[close[0]]}?)" if close else ""
