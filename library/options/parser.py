"""One parser for all scripts: dataclass defaults < TOML file < command line.

A script's options are one dataclass whose fields are the option groups of this package. On the command line and in
the TOML file they are flat, under the names of the fields. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import ConfigDict, TypeAdapter, ValidationError

from library.errors import UserError
from library.options.checks import OptionError
from library.options.dialect import PLAIN, Dialect, refusal, values_in
from library.options.toml_file import Located, find_config, read_options

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class ConfigOptions:
    dataset_config: str | None = None
    """TOML file with any of these options, looked up as given, then in dataset_configs/. The command line overrides it."""
    dry_run: bool = False
    """Print the resolved plan and stop."""


def parse(
    options_type: type[Options],
    argv: list[str],
    *,
    prog: str,
    description: str | None,
    default_config: str | None = None,
    also_known: Iterable[type] = (),
    dialect: Dialect = PLAIN,
) -> Options:
    """Parse `argv` and the TOML file it names (`--dataset_config`) into one checked `options_type`.

    default_config: the file taken when `argv` names none and no `--train_data`.
    also_known: option types of other scripts, whose keys the same file may carry for them.
    dialect: another name for the file's option, names to replace or refuse, looser spelling.
    Raises UserError: unknown keys (all of them, with the nearest names), mistyped values, failed cross-checks, each
    with file and line where the value came from a file.
    """
    file_values: dict[str, Located] = {}
    types = fields_of(options_type)
    argv = dialect.words(argv)
    config = _option_in(argv, dialect.config_option)
    if config is None and default_config is not None and _option_in(argv, "train_data") is None:
        wants_help = "-h" in argv or "--help" in argv
        if not wants_help:
            print(f"No --{dialect.config_option} given: using the embedded {default_config}.", file=sys.stderr)
        config = default_config
        argv = [*argv, f"--{dialect.config_option}", config]
    to_be_written = dialect.output_option is not None and _switched_on(dialect.output_option, argv, {})
    if config is not None and not to_be_written:
        known = set(types).union(*(fields_of(other) for other in also_known))
        file_values = _file_values(config, dialect, known, argv)
        file_values = _typed(file_values, types, loose=dialect.loose_values)
    try:
        return _command_line(options_type, argv, file_values, prog, description)
    except OptionError as error:
        source = file_values.get(error.option)
        if source is None or _option_in(argv, error.option) is not None:
            raise
        raise UserError(f"{str(error).rstrip('.')} ({source.place}).") from None


def _file_values(config: str, dialect: Dialect, known: set[str], argv: list[str]) -> dict[str, Located]:
    """Known keys of the file with their values as read; everything that is wrong with its keys in one UserError."""
    read = read_options(
        find_config(config), later_section_wins=dialect.later_section_wins, datasets_beside=dialect.datasets_beside
    )
    values, refused = dialect.values(read)
    wrong = [refusal(refused)] if refused else []
    strangers = _unknown(values, known)
    if strangers and dialect.ignore_option is not None and _switched_on(dialect.ignore_option, argv, values):
        print(f"warning: {strangers} They are ignored, as --{dialect.ignore_option} asks.", file=sys.stderr)
        values = {name: located for name, located in values.items() if name in known}
    elif strangers:
        wrong.insert(0, strangers)
    if wrong:
        raise UserError(" ".join(wrong))
    return values


def fields_of(options_type: type) -> dict[str, Any]:
    """Name -> type of every option, with groups (fields that are dataclasses themselves) flattened."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(options_type):
        inner = (
            fields_of(hints[field.name])
            if dataclasses.is_dataclass(hints[field.name])
            else {field.name: hints[field.name]}
        )
        twice = flat.keys() & inner.keys()
        if twice:
            raise TypeError(f"{options_type.__name__} has the option {', '.join(twice)} in two groups")
        flat |= inner
    return flat


def flatten(options: Any) -> dict[str, Any]:
    """Name -> value of every option, as plain JSON types."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value)
        else:
            flat[field.name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean x?)" or the empty string."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _option_in(argv: list[str], name: str) -> str | None:
    """Value of the last `--name` in argv, in any spelling; "" where it is the last word."""
    return next(reversed(values_in(argv, name)), None)


def _switched_on(name: str, argv: list[str], values: dict[str, Located]) -> bool:
    """Whether the command line, else the file, turns the flag `name` on."""
    words = [word.replace("-", "_") for word in argv]
    off, on = f"__no_{name}" in words, f"__{name}" in words
    return on or (not off and name in values and values[name].value is True)


def _unknown(values: dict[str, Located], known: set[str]) -> str | None:
    """The sentence about keys that are not `known`, if there are any."""
    unknown = []
    for name, located in values.items():
        if name not in known:
            is_tables = isinstance(located.value, list) and all(isinstance(item, dict) for item in located.value)
            hint = " (a file with [[datasets]] is for --dataset_config)" if is_tables and name == "datasets" else None
            unknown.append(f"{name}{nearest(name, known) if hint is None else hint} in {located.place}")
    return f"Unknown {'key' if len(unknown) == 1 else 'keys'}: {'; '.join(unknown)}." if unknown else None


def _typed(values: dict[str, Located], types: dict[str, Any], *, loose: bool) -> dict[str, Located]:
    """The values that belong to `types`, checked strictly: "10" is no number, 1 is no switch, 1 is a legal float.

    loose: "" is None where that may be, and a single value is a list of one where a list is wanted.
    """
    typed: dict[str, Located] = {}
    for name, located in values.items():
        if name not in types:
            continue
        adapter = (
            TypeAdapter(types[name], config=ConfigDict(strict=True))
            if not _has_config(types[name])
            else TypeAdapter(types[name])
        )
        value = _tightened(located.value, types[name]) if loose else located.value
        if _wants_path(types[name]):
            value = _as_paths(value)
        value = tuple(value) if isinstance(value, list) else value
        try:
            typed[name] = dataclasses.replace(located, value=adapter.validate_python(value))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(
                f"{name} is {located.value!r} in {located.place}: {reason[0].lower()}{reason[1:]}."
            ) from None
    return typed


def _tightened(value: Any, kind: Any) -> Any:
    """What a loose file value stands for: "" for None or no items, one value for a list of one."""
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    if value == "" and type(None) in typing.get_args(bare):
        return None
    if typing.get_origin(bare) is tuple and not isinstance(value, list):
        return [] if value == "" else [value]
    return value


def _as_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_paths(item) for item in value]
    return Path(value) if isinstance(value, str) else value


def _has_config(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _wants_path(kind: Any) -> bool:
    return kind is Path or Path in typing.get_args(kind)


def _unchecked(options_type: type, values: dict[str, Located]) -> Any:
    """An instance made of defaults and file values whose checks have not run: the command line may still mend it."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    instance: Any = object.__new__(options_type)
    for field in dataclasses.fields(options_type):
        if dataclasses.is_dataclass(hints[field.name]):
            value = _unchecked(hints[field.name], values)
        elif field.name in values:
            value = values[field.name].value
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        object.__setattr__(instance, field.name, value)
    return instance


def _command_line(
    options_type: type[Options], argv: list[str], values: dict[str, Located], prog: str, description: str | None
) -> Options:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                options_type,
                args=_full_words(argv, fields_of(options_type)),
                default=_unchecked(options_type, values),
                prog=prog,
                description=description,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_sentence(said.getvalue(), argv, fields_of(options_type))) from None


def _full_words(argv: list[str], types: dict[str, Any]) -> list[str]:
    """The value that tyro wants after an option that may stand alone.

    `--resume` means the newest state. A flag that may be on, off or automatic (bool | None) is --name or --no_name.
    """
    words: list[str] = []
    for position, word in enumerate(argv):
        name = word[2:].replace("-", "_") if word.startswith("--") else ""
        alone = position + 1 == len(argv) or argv[position + 1].startswith("--")
        flag = name.removeprefix("no_")
        if name not in types and _is_automatic(types.get(flag)):
            words += [f"--{flag}", "False"]
        elif alone and _is_automatic(types.get(name)):
            words += [word, "True"]
        elif alone and name == "resume":
            words += [word, "auto"]
        else:
            words.append(word)
    return words


def _is_automatic(kind: Any) -> bool:
    return set(typing.get_args(kind)) == {bool, type(None)}


def _sentence(message: str, argv: list[str], known: dict[str, Any]) -> str:
    """tyro's boxed message as one sentence."""
    unknown = []
    for word in argv:
        name = word.partition("=")[0][2:].replace("-", "_")
        if word.startswith("--") and name not in known and name.removeprefix("no_") not in known and name != "help":
            unknown.append(f"--{name}{nearest(name, known)}")
    if unknown:
        return f"Unknown {'option' if len(unknown) == 1 else 'options'}: {'; '.join(unknown)}."
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in message.splitlines()]
    body: list[str] = []
    for line in lines:
        if set(line) & set("╭╰"):
            continue
        if line and set(line) <= set("─"):
            break
        body.append(line)
    text = " ".join(" ".join(body).split())
    if match := re.match(r"Error parsing --(\S+): no type matching (.+?) could be instantiated from \['(.*?)'\]", text):
        kind = match[2].replace("{None}|", "")
        return f"{match[1].replace('-', '_')} is {match[3]!r}: expected {kind}."
    return (
        f"{text[:1].upper()}{text[1:]}."
        if text and not text.endswith(".")
        else text or "The command line could not be read."
    )
