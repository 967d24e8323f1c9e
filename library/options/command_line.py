"""What stands on a command line that no option takes: unknown options, values after a flag, second values, stray signs."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from library.options.given import plain_kinds

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""What word processors and web pages make of -- ."""
_CONTINUED = {"^", "\\", "`"}
"""What says at the end of a line that it goes on, each in one shell."""
_OF_ACCELERATE = frozenset(
    """
    num_cpu_threads_per_process num_processes num_machines machine_rank gpu_ids multi_gpu cpu use_cpu
    main_process_ip main_process_port same_network module dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic
    """.split()  # noqa: SIM905
)


def known_words(words: list[str], kinds: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The words that options of `kinds` (name -> type) take, and a sentence for each fault among the others."""
    kept: list[str] = []
    unknown: list[str] = []
    faults: list[str] = []
    strays: list[str] = []
    for option, values in _parts(words, kinds):
        name = _name_of(option)
        least = 0 if "=" in option or plain_kinds(kinds.get(name, bool)) == {bool} else 1
        while len(values) > least and values[-1] in _CONTINUED:
            strays.append(values.pop())
        if not option:
            strays += values
        elif name in kinds or bool in plain_kinds(kinds.get(name.removeprefix("no_"))):
            taken, fault = _taken(option, name, values, kinds)
            kept += taken
            faults += [fault] if fault else []
        elif name in _OF_ACCELERATE:
            faults.append(f"--{name} is an option of accelerate launch. It stands before the script's name there.")
        else:
            unknown.append(f"--{name}{nearest(name, kinds)}")
    if unknown:
        faults.insert(0, f"Unknown {'option' if len(unknown) == 1 else 'options'}: {'; '.join(unknown)}.")
    if strays:
        faults.append(_about_strays(strays))
    return kept, faults


def _parts(words: list[str], kinds: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Each option with the words behind it; those that stand behind none come with an empty option."""
    parts: list[tuple[str, list[str]]] = []
    for word in words:
        dashed = word.lstrip("-")[:1] in set(_DASHES) and _name_of("--" + word.lstrip("-" + _DASHES)) in kinds
        if word.startswith("--") and not dashed:
            parts.append((word, []))
        elif dashed or not parts:
            parts.append(("", [word]))
        else:
            parts[-1][1].append(word)
    return parts


def _name_of(option: str) -> str:
    return option.partition("=")[0][2:].replace("-", "_")


def _taken(option: str, name: str, values: list[str], kinds: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """What of an option and the words behind it is to be read, and what is wrong with the others."""
    kind = kinds.get(name, bool)
    joined = [option.partition("=")[2]] if "=" in option else []
    together = " ".join([*joined, *values])
    if not together.strip() or _takes_many(kind):
        return [option, *values], None
    if plain_kinds(kind) == {bool}:
        flag = name.removeprefix("no_")
        on = switch(together)
        if on is None:
            return [], f"--{name} takes no value, got {together}. --{flag} turns it on, --no_{flag} turns it off."
        return [f"--{flag}" if on == (name in kinds) else f"--no_{flag}"], None
    if len(joined) + len(values) == 1:
        return [option, *values], None
    return [], (
        f"--{name} takes one value, got {len(joined) + len(values)}: {together}. If it is one with blanks, put it in quotes: "
        f'--{name} "{together}".'
    )


def switch(word: str) -> bool | None:
    """What a word behind a flag says of it."""
    return {"true": True, "1": True, "false": False, "0": False}.get(word.strip().lower())


def _about_strays(words: list[str]) -> str:
    text = f"Unrecognized options: {', '.join(words)}."
    if set(words) & _CONTINUED:
        return f"{text} A line goes on after ^ in Windows' cmd, ` in PowerShell, \\ in other shells, each as its very last sign."
    if dashed := next((word for word in words if set(word) & set(_DASHES)), None):
        plain = "--" + dashed.lstrip("-" + _DASHES)
        return f"{text} Its dash is one of printed text: type two minus signs, {plain}."
    if single := next((word for word in words if re.match(r"-[A-Za-z]", word)), None):
        return f"{text} Options begin with two minus signs: -{single}."
    return text


def _takes_many(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple or any(_takes_many(part) for part in typing.get_args(kind))


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean x?)" or the empty string."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
