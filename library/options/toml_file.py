"""Options from a TOML file: flat or in sections of any name, each value with the line it stands on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.rivals import beaten, without
from library.text_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONFIG_FOLDER = "dataset_configs"

# A drive or a share in double quotes whose backslashes are not doubled, and any text in double quotes with a backslash.
_DRIVE = re.compile(r'''"((?:[A-Za-z]:|\\\\[\w.$-]+)\\(?![\\"])[^"]*)"''')
_BACKSLASH = re.compile(r'''"([^"]*\\[^"]*)"''')


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
    if name.endswith(".json") and Path(name).is_file():
        raise UserError(
            f"{name} is a JSON file, as kohya's GUI saves it; options are read from TOML. The GUI's Print training command, or the "
            "config_lora-*.toml that it writes into the output folder when it trains, say the same in kohya's own options."
        )
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
    """The content of a TOML file. Raises UserError where it cannot be read, is no text or not TOML."""
    return parse_toml(read_text(path), path)


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The content of the TOML file `path`, whose text this is.

    Raises UserError where it is not TOML, or where a Windows path stands in double quotes: "C:\\train\\new" is legal TOML,
    whose \\t is a tab and whose \\n ends the line.
    """
    lines = text.splitlines()
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"at line (\d+)", str(error))
        meant = _as_meant(lines[int(place[1]) - 1]) if place and int(place[1]) <= len(lines) else None
        reason = f"{error}." if place is None or meant is None else f"line {place[1]}: {meant}"
        raise UserError(f"{path} is not valid TOML: {reason}") from None
    for number, line in enumerate(lines, start=1):
        if (found := _DRIVE.search(line)) and "#" not in line[: found.start()]:
            raise UserError(f"{path}, line {number}: {in_single_quotes(found[1])}")
    return content


def _as_meant(line: str) -> str | None:
    """How a line that is not TOML is written, where that can be told."""
    if wrong := _BACKSLASH.search(line):
        return in_single_quotes(wrong[1])
    pair = re.match(r"\s*([\w.-]+)\s*([=:])\s*([^#]*?),?\s*(?:#.*)?$", line)
    if pair is None or pair[3][:1] in ('"', "'", "[", "{"):
        return None
    key, value = pair[1], pair[3]
    if value.lower() in ("true", "false"):
        return f"TOML spells it {value.lower()}. Write {key} = {value.lower()}."
    if value.lower() in ("", "none", "null"):
        return f'TOML has no empty value. Leave the line out, or write {key} = "".'
    if pair[2] == ":" or re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value):
        return f"a key and its value have = between them, and nothing behind them. Write {key} = {value}."
    return f"text stands in quotes. Write {key} = {_quoted(value)}."


def _quoted(text: str) -> str:
    return f"'{text}'" if "\\" in text else f'"{text}"'


def in_single_quotes(written: str) -> str:
    """How TOML wants a text with backslashes, such as a Windows path, that stands in double quotes."""
    single, slashes = written.rstrip("\\"), written.replace("\\\\", "/").replace("\\", "/")
    return (
        f'"{written}" has backslashes in double quotes, which TOML reads as signs of their own (\\t is a tab). '
        f"Write '{single}' in single quotes, or \"{slashes}\"."
    )


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
    lines = _lines_of_keys(read_text(path))
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
    kept = without(values_of(options), beaten(values_of(own), values_of(options)))
    return {name: replace(options[name], value=value) for name, value in kept.items()} | own


def values_of(options: Mapping[str, Located]) -> dict[str, Any]:
    return {name: located.value for name, located in options.items()}


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
