"""Counts in messages, with the noun in the right number, and lines of a length that terminals show."""

from __future__ import annotations

from textwrap import fill


def plural(count: int, one: str, many: str | None = None) -> str:
    """The count and its noun: "1 picture", "3 pictures", "1,562 steps".

    many: the plural, where it is not `one` with an s. Both may go on with a verb: `plural(n, "trial is", "trials are")`.
    """
    return f"{count:,} {one if count == 1 else f'{one}s' if many is None else many}"


def wrapped(text: str) -> str:
    """Words and numbers that go on in an indented line where 120 columns end. Not for paths, which people copy."""
    return fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
