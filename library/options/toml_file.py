"""Options from a TOML file: flat or in sections of any name, each value with the line it stands on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONFIG_FOLDER = "dataset_configs"


@dataclass(frozen=True)
class Located:
    """A value and where it was written."""

    value: Any
    file: Path
    line: int | None

    @property
    def place(self) -> str:
        return f"{self.file.name}, line {self.line}" if self.line else self.file.name


def find_config(name: str) -> Path:
    """The file that a user means by `name`: as given, else in dataset_configs/ here, else in the project's own.

    `.toml` may be left out. Raises UserError naming the places that were looked at.
    """
    names = [name] if name.endswith(".toml") else [name, f"{name}.toml"]
    folders = [Path(), Path(CONFIG_FOLDER), PROJECT_ROOT / CONFIG_FOLDER]
    for folder in folders:
        for candidate in names:
            if (folder / candidate).is_file():
                return folder / candidate
    shipped = sorted(str(p.relative_to(folders[-1])) for p in folders[-1].rglob("*.toml"))
    raise UserError(
        f"No configuration file {name}, neither as given nor in {CONFIG_FOLDER}/. The project comes with {', '.join(shipped)}."
    )


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}.") from None


def read_options(path: Path, *, later_section_wins: bool = False, datasets_beside: bool = False) -> dict[str, Located]:
    """Key -> value and place of every key in the file, whatever section it stands in.

    `extends = "other.toml"` at the top takes another file's values first (path relative to this file).
    A key given in two sections of one file is an error, or with `later_section_wins` the last one counts. datasets_beside:
    [[datasets]] and [general] beside them are left to the reader of data sets.
    """
    return _read_options(path, later_section_wins, datasets_beside, seen=())


def _read_options(
    path: Path, later_section_wins: bool, datasets_beside: bool, seen: tuple[Path, ...]
) -> dict[str, Located]:
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself, by way of {', '.join(p.name for p in seen)}.")
    document = read_toml(path)
    lines = _lines_of_keys(path.read_text(encoding="utf-8"))
    options: dict[str, Located] = {}
    if datasets_beside and document.pop("datasets", None) is not None:
        document.pop("general", None)
    parent = document.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str) or not (path.parent / parent).is_file():
            raise UserError(f"extends in {path} names {parent!r}, which is no file beside it.")
        options.update(
            _read_options(path.parent / parent, later_section_wins, datasets_beside, (*seen, path.resolve()))
        )
    own: dict[str, Located] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            entries = [(key, inner, value[inner]) for inner in value]
        else:
            entries = [("", key, value)]
        for section, name, inner_value in entries:
            located = Located(inner_value, path, lines.get((section, name)))
            if name in own and not later_section_wins:
                raise UserError(f"{name} is given twice: {own[name].place} and {located.place}. Keep one of them.")
            own[name] = located
    return options | own


def _lines_of_keys(text: str) -> dict[tuple[str, str], int]:
    """(section, key) -> line number, for keys that begin a line; good enough to point at."""
    lines: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"\s*\[+\s*([^\[\]]+?)\s*\]+", line):
            section = match[1].strip("\"'")
        elif match := re.match(r"\s*[\"']?([A-Za-z0-9_.-]+)[\"']?\s*=", line):
            lines.setdefault((section, match[1]), number)
    return lines


def as_toml(value: Any) -> str:
    """One value as TOML writes it. Strings are written as JSON, which TOML reads too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def toml_table(heading: str, values: Mapping[str, Any]) -> list[str]:
    """Lines of a table: its heading ("" at the top of a file), a line for each value, an empty line."""
    return [heading, *(f"{key} = {as_toml(value)}" for key, value in values.items()), ""]
