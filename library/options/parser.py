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
) -> Options:
    """Parse `argv` and the TOML file it names (`--dataset_config`) into one checked `options_type`.

    default_config: the file taken when `argv` names none and no `--train_data`.
    also_known: option types of other scripts, whose keys the same file may carry for them.
    Raises UserError: unknown keys (all of them, with the nearest names), mistyped values, failed cross-checks, each
    with file and line where the value came from a file.
    """
    file_values: dict[str, Located] = {}
    config = _option_in(argv, "dataset_config")
    if config is None and default_config is not None and _option_in(argv, "train_data") is None:
        wants_help = "-h" in argv or "--help" in argv
        if not wants_help:
            print(f"No --dataset_config given: using the embedded {default_config}.", file=sys.stderr)
        config = default_config
        argv = [*argv, "--dataset_config", config]
    if config is not None:
        known = set(fields_of(options_type)).union(*(fields_of(other) for other in also_known))
        file_values = read_options(find_config(config))
        _refuse_unknown(file_values, known)
        file_values = _typed(file_values, fields_of(options_type))
    try:
        return _command_line(options_type, argv, file_values, prog, description)
    except OptionError as error:
        source = file_values.get(error.option)
        if source is None or _option_in(argv, error.option) is not None:
            raise
        raise UserError(f"{str(error).rstrip('.')} ({source.place}).") from None


def fields_of(options_type: type) -> dict[str, Any]:
    """Name -> type of every option, with groups (fields that are dataclasses themselves) flattened."""
    hints = typing.get_type_hints(options_type)
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
            flat[field.name] = (
                str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            )
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean x?)" or the empty string."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _option_in(argv: list[str], name: str) -> str | None:
    """Value of `--name` in argv, in any spelling; "" where it is the last word."""
    for position, word in enumerate(argv):
        head, equals, tail = word.partition("=")
        if head.startswith("--") and head[2:].replace("-", "_") in (name, f"no_{name}"):
            return tail if equals else argv[position + 1] if position + 1 < len(argv) else ""
    return None


def _refuse_unknown(values: dict[str, Located], known: set[str]) -> None:
    unknown = [
        f"{name}{nearest(name, known)} in {located.place}" for name, located in values.items() if name not in known
    ]
    if unknown:
        raise UserError(f"Unknown {'key' if len(unknown) == 1 else 'keys'}: {'; '.join(unknown)}.")


def _typed(values: dict[str, Located], types: dict[str, Any]) -> dict[str, Located]:
    """The values that belong to `types`, checked strictly: "10" is no number, 1 is no switch, 1 is a legal float."""
    typed: dict[str, Located] = {}
    for name, located in values.items():
        if name not in types:
            continue
        adapter = (
            TypeAdapter(types[name], config=ConfigDict(strict=True))
            if not _has_config(types[name])
            else TypeAdapter(types[name])
        )
        value = Path(located.value) if _wants_path(types[name]) and isinstance(located.value, str) else located.value
        value = tuple(value) if isinstance(value, list) else value
        try:
            typed[name] = dataclasses.replace(located, value=adapter.validate_python(value))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(
                f"{name} is {located.value!r} in {located.place}: {reason[0].lower()}{reason[1:]}."
            ) from None
    return typed


def _has_config(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _wants_path(kind: Any) -> bool:
    return kind is Path or Path in typing.get_args(kind)


def _unchecked(options_type: type, values: dict[str, Located]) -> Any:
    """An instance made of defaults and file values whose checks have not run: the command line may still mend it."""
    hints = typing.get_type_hints(options_type)
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
                args=_bare_resume(argv),
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


def _bare_resume(argv: list[str]) -> list[str]:
    """`--resume` without a value means the newest state."""
    words: list[str] = []
    for position, word in enumerate(argv):
        words.append(word)
        if word == "--resume" and (position + 1 == len(argv) or argv[position + 1].startswith("--")):
            words.append("auto")
    return words


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
    return (
        f"{text[:1].upper()}{text[1:]}."
        if text and not text.endswith(".")
        else text or "The command line could not be read."
    )
