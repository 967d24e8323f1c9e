"""Arguments for classes of other libraries, as kohya's command line writes them: key=value, values as Python literals."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from library.options.checks import require


def parse_arguments(option: str, words: Sequence[str]) -> dict[str, Any]:
    """`words` such as ("weight_decay=0.01", "betas=0.9,0.999", "name=a=b") as keyword arguments.

    A value is a Python literal (0.9,0.999 is a tuple), inf or nan, or else a string, which needs no quotes. Raises
    OptionError for `option` where a word is no key=value or several, a key comes twice, a value ends with a comma, or a switch
    is not spelt True or False.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        key, text = pair_of(option, word)
        require(key not in arguments, option, f"gives {key} twice.")
        require(
            not text.endswith(","),
            option,
            f"has a comma at the end of {word!r}, which makes a list of it. Leave it out.",
        )
        arguments[key] = _value(option, key, text)
    return arguments


def pair_of(option: str, word: str) -> tuple[str, str]:
    """Key and value of a word key=value. Raises OptionError for `option` where it is none, or several in one."""
    key, equals, text = word.partition("=")
    require(bool(equals) and key.strip().isidentifier(), option, f"takes key=value, got {word!r}.")
    pairs = re.split(r"[\s,;]+(?=[A-Za-z_]\w*\s*=[^=])", word.strip())
    quoted = ", ".join(f'"{pair}"' for pair in pairs)
    require(
        len(pairs) == 1,
        option,
        f"has {len(pairs)} pairs in one word, {word!r}. Give each a word of its own: --{option} {' '.join(pairs)}, or in a file "
        f"{option} = [{quoted}].",
    )
    return key.strip(), text.strip()


def _value(option: str, key: str, text: str) -> Any:
    require(text != "", option, f"gives {key} no value.")
    spelt = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(text.lower())
    require(spelt is None or text == spelt, option, f"gives {key} the value {text}; Python spells it {spelt}.")
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
