"""Arguments for classes of other libraries, as kohya's command line writes them: key=value, values as Python literals."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from library.options.checks import require


def parse_arguments(option: str, words: Sequence[str]) -> dict[str, Any]:
    """`words` such as ("weight_decay=0.01", "betas=0.9,0.999", "name=a=b") as keyword arguments.

    A value is a Python literal (0.9,0.999 is a tuple), inf or nan, or else a string, which needs no quotes. Raises
    OptionError for `option` where a word is no key=value, a key comes twice, or a switch is not spelt True or False.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        require(bool(equals) and key.strip().isidentifier(), option, f"takes key=value, got {word!r}.")
        key = key.strip()
        require(key not in arguments, option, f"gives {key} twice.")
        arguments[key] = _value(option, key, text.strip())
    return arguments


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
