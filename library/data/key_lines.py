"""On which line of a TOML or JSON text each key stands, for errors that point at it.

tomllib and json do not tell. Since they have already accepted the text, this needs no checks of its own.
"""

from __future__ import annotations

import re

KeyPath = tuple[str | int, ...]
"""Way to a value in a file: ("datasets", 0, "subsets", 1, "num_repeats")."""

_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*|[][{}=:,.\n]|[^][\s{}=:,.#"']+''',
    re.DOTALL,
)


def key_lines(text: str, *, json_text: bool = False) -> dict[KeyPath, int]:
    """The first line of every key, table and list entry of a text that is known to be valid TOML, or JSON."""
    lines: dict[KeyPath, int] = {}
    tokens: list[tuple[str, int]] = []
    line, end = 1, 0
    for match in _TOKEN.finditer(text):
        line, end = line + text.count("\n", end, match.start()), match.start()
        if not match[0].startswith("#"):
            tokens.append((match[0], line))
    tokens.append(("", line))
    at = 0

    def next_is(marks: str) -> bool:
        """Whether the next token, past line ends unless they are asked for, is one of `marks`."""
        nonlocal at
        while tokens[at][0] == "\n" and "\n" not in marks:
            at += 1
        return bool(tokens[at][0]) and tokens[at][0] in marks

    def key() -> tuple[str, ...]:
        nonlocal at
        parts = []
        while not next_is("=:]"):
            if tokens[at][0] != ".":
                parts.append(tokens[at][0].strip("\"'"))
            at += 1
        at += 1
        return tuple(parts)

    def pair(table: KeyPath) -> None:
        start = tokens[at][1]
        path = (*table, *key())
        lines.setdefault(path, start)
        value(path)

    def value(path: KeyPath) -> None:
        nonlocal at
        if next_is("["):
            at, number = at + 1, 0
            while not next_is("]"):
                lines.setdefault((*path, number), tokens[at][1])
                value((*path, number))
                number += 1
                at += next_is(",")
            at += 1
        elif next_is("{"):
            at += 1
            while not next_is("}"):
                pair(path)
                at += next_is(",")
            at += 1
        else:
            while tokens[at][0] and not next_is(",\n]}"):
                at += 1

    if json_text:
        value(())
        return lines
    table: KeyPath = ()
    entries: dict[KeyPath, int] = {}  # arrays of tables, and how many of theirs came so far
    while tokens[at][0]:
        if next_is("\n"):
            at += 1
            continue
        if not next_is("["):
            pair(table)
            continue
        start, is_array = tokens[at][1], tokens[at + 1][0] == "["
        at += 1 + is_array
        *outer, last = key()
        at += is_array
        table = ()
        for part in outer:
            table = (*table, part)
            table = (*table, entries[table] - 1) if table in entries else table
        table = (*table, last)
        if is_array:
            entries[table] = entries.get(table, 0) + 1
            table = (*table, entries[table] - 1)
        lines.setdefault(table, start)
    return lines
