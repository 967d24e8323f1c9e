"""generate.py called with few steps and small pictures."""

from __future__ import annotations

import generate


def run(*words: object, prompt: str | None = "a red square") -> int:
    """Its exit code. words: further options, which overrule those here."""
    what = [] if prompt is None else ["--prompt", prompt]
    return generate.main([*what, "--steps", "1", "--width", "64", "--height", "64", *map(str, words)])
