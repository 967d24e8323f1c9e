"""Lines for a terminal: what does not fit goes on in the next line, below where it began."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable

WIDEST = 120
HEADING = 11
"""Columns of a heading such as "searches" and of the space after it."""


def columns() -> int:
    """Of the terminal, or of a file: at most WIDEST."""
    return min(WIDEST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDEST


def folded(text: str, width: int | None = None, indent: int = HEADING) -> str:
    """`text` in lines of at most `width` (default: `columns()`), broken between words; those that follow are indented."""
    wide = columns() if width is None else width
    lines = (
        textwrap.wrap(line, wide, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )
    return "\n".join("\n".join(parts) for parts in lines)


def headed(heading: str, lines: Iterable[str]) -> list[str]:
    return [f"{heading if not place else '':10} {line}" for place, line in enumerate(lines)]
