"""--help: the options people use most and the groups; --help NAME a group or an option; --help_all everything.

What is shown is read from the dataclasses: their types, defaults, the sentence under each field, and the first sentence
about each class, which says what the group is for.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import itertools
import re
import shutil
import sys
import textwrap
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from library.errors import UserError
from library.options.dialect import Dialect, refusal
from library.words import plural

WIDEST = 100
"""Longer lines are hard to read, whatever the terminal has."""
INDENT = 6


@dataclass(frozen=True)
class Shown:
    """An option as it is shown."""

    name: str
    kind: Any
    default: Any
    about: str

    @property
    def written(self) -> str:
        """--rank N, or a flag in the form that changes something."""
        parts = set(typing.get_args(self.kind))
        if parts == {bool, types.NoneType}:
            return f"--{self.name}, --no_{self.name}"
        if self.kind is bool:
            return f"--no_{self.name}" if self.default is True else f"--{self.name}"
        return f"--{self.name} {value_words(self.kind)}"

    @property
    def text(self) -> str:
        """What it means, with its default."""
        if (
            self.default in (None, "", (), dataclasses.MISSING)
            or isinstance(self.default, bool)
            or "Default:" in self.about
        ):
            return self.about
        value = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        return f"{self.about} Default: {value}."


@dataclass(frozen=True)
class Group:
    name: str
    purpose: str
    options: tuple[Shown, ...]


def answer_help(argv: list[str], options_type: type, prog: str, description: str | None, dialect: Dialect) -> None:
    """Print the help that `argv` asks for and raise SystemExit, or return where it asks for none.

    An options type whose `most_used` names options is long: its help is these and the groups, all others are shown whole.
    Raises UserError where --help NAME names neither a group nor an option.
    """
    words = [word.partition("=")[0].replace("-", "_") for word in argv]
    place = next((place for place, word in enumerate(words) if word in ("_h", "__help", "__help_all")), None)
    if place is None:
        return
    _, equals, about = argv[place].partition("=")
    following = argv[place + 1] if place + 1 < len(argv) else ""
    about = (about if equals else following if not following.startswith("-") else "").replace("-", "_")
    groups = groups_of(options_type)
    often: tuple[str, ...] = getattr(options_type, "most_used", ())
    if words[place] == "__help_all":
        lines = [*_heading(prog, description), *_all(groups)]
    elif about:
        lines = _about(groups, about, dialect)
    elif often:
        lines = [*_heading(prog, description), *_short(groups, often)]
    else:
        lines = [*_heading(prog, description), *_all(groups)]
    print("\n".join(lines))
    raise SystemExit(0)


def groups_of(options_type: type) -> list[Group]:
    """The groups of a script's options; options that are in none come first."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    alone, groups = [], []
    for field in dataclasses.fields(options_type):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            options = tuple(option for group in groups_of(typing.cast(type, kind)) for option in group.options)
            groups.append(Group(field.name, _purpose(typing.cast(type, kind)), options))
        else:
            alone.append(Shown(field.name, kind, field.default, _about_field(options_type, field.name)))
    rest = (
        Group("general", "What is about the whole run.", tuple(alone)) if groups else Group("options", "", tuple(alone))
    )
    return [*([rest] if alone else []), *groups]


def value_words(kind: Any) -> str:
    """What stands after an option: N for a whole number, X, TEXT, PATH, its choices, ... for a list."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        written = next((mark.metavar for mark in parts[1:] if hasattr(mark, "metavar")), None)
        return written or value_words(parts[0])
    if origin is Literal:
        return "{" + ", ".join(str(choice) for choice in parts) + "}"
    if origin is tuple:
        inner = [value_words(part) for part in parts if part is not ...]
        return f"{inner[0]} ..." if ... in parts else " ".join(inner)
    if parts:
        return " or ".join(dict.fromkeys(value_words(part) for part in parts if part is not types.NoneType))
    return {int: "N", float: "X", Path: "PATH", str: "TEXT", bool: "True or False"}.get(kind, "VALUE")


def _heading(prog: str, description: str | None) -> list[str]:
    lines = [line for text in (description or "").strip().splitlines() for line in _fitted(text)]
    return [f"usage: {prog} [--OPTION VALUE ...]", "", *lines, ""]


def _fitted(line: str) -> list[str]:
    """A line of a script's description as the terminal shows it whole: examples (indented) go on after a backslash, and their
    comment stands above them."""
    if len(line) <= _width() or not line.startswith("    "):
        return _wrapped(line, 0, 0) if line.strip() else [line]
    example, sign, comment = line.partition("  #")
    lines = [f"    # {comment.strip()}"] if sign else []
    going = ""
    for part in re.split(r" (?=--)", example.rstrip()):
        if going and len(going) + len(part) + 3 > _width():
            lines.append(f"{going} \\")
            going = f"        {part}"
        else:
            going = f"{going} {part}" if going else part
    return [*lines, going]


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 60), WIDEST)


def _all(groups: list[Group]) -> list[str]:
    lines: list[str] = []
    for group in groups:
        lines += [f"{group.name}: {group.purpose}" if group.purpose else f"{group.name}:"]
        lines += [line for option in group.options for line in _lines(option)] + [""]
    return lines[:-1]


def _short(groups: list[Group], often: tuple[str, ...]) -> list[str]:
    every = {option.name: option for group in groups for option in group.options}
    lines = ["What people use most:"]
    for name in often:
        option = every[name]
        lines += _lines(dataclasses.replace(option, about=re.split(r"(?<=\.) (?=[A-Z])", option.about)[0]))
    lines += ["", "Groups of options:"]
    wide = max(len(group.name) for group in groups)
    for group in groups:
        lines += _wrapped(f"{group.name:{wide}}  {group.purpose} ({plural(len(group.options), 'option')})", 2, 4 + wide)
    return [*lines, "", "--help NAME shows a group or one option, --help_all all of them."]


def _about(groups: list[Group], name: str, dialect: Dialect) -> list[str]:
    every = {option.name: (group, option) for group in groups for option in group.options}
    for group in groups:
        if group.name == name:
            return _all([group])
    found = name.removeprefix("__")
    if found in dialect.aliases:
        found = dialect.aliases[found].option
    found = found if found in every else found.removeprefix("no_")
    if found in dialect.refused:
        raise UserError(f"{refusal([f'--{found}: {dialect.refused[found].reason}'])}")
    found = next((option for option, keys in dialect.words_of.items() if found in keys), found)
    if found not in every:
        names = [group.name for group in groups]
        close = difflib.get_close_matches(found, [*names, *every], n=1, cutoff=0.6)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"--help {name}: there is no group and no option of that name{hint}. Groups: {', '.join(names)}."
        )
    group, option = every[found]
    return [*_lines(option), "", f"  It is one of {group.name}: --help {group.name}."]


def _lines(option: Shown) -> list[str]:
    return [*_wrapped(option.written, 2, INDENT), *_wrapped(option.text, INDENT, INDENT)]


def _wrapped(text: str, first: int, rest: int) -> list[str]:
    return textwrap.wrap(
        text,
        _width(),
        initial_indent=" " * first,
        subsequent_indent=" " * rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _purpose(group: type) -> str:
    """The first sentence about a group's class, or about the one it derives from."""
    for kind in group.__mro__:
        about = (kind.__doc__ or "").strip()
        if about and not about.startswith(f"{kind.__name__}(") and kind is not object:
            return about.splitlines()[0]
    return ""


def _about_field(options_type: type, name: str) -> str:
    """The sentences under a field, in the class or in one that it derives from."""
    for kind in options_type.__mro__:
        about = (
            _sentences(sys.modules[kind.__module__].__file__ or "").get((kind.__name__, name))
            if kind is not object
            else None
        )
        if about:
            return about
    return ""


@cache
def _sentences(file: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the text under the field, of every class of a source file."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in itertools.pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                about = ast.literal_eval(text.value) if isinstance(text.value, ast.Constant) else ""
                found[node.name, field.target.id] = " ".join(str(about).split())
    return found
