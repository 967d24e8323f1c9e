"""One parser for all scripts: dataclass defaults < recipe < TOML file < command line.

A script's options are one dataclass whose fields are the option groups of this package. On the command line and in
the TOML file they are flat, under the names of the fields. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import ConfigDict, TypeAdapter, ValidationError

from library.errors import UserError
from library.options.checks import OptionError, require
from library.options.command_line import known_words, nearest
from library.options.dialect import PLAIN, Dialect, values_in
from library.options.given import NOT_GIVEN, VERBATIM, markers, plain_kinds, value_given, words_given
from library.options.help import answer_help
from library.options.recipes import WithRecipes
from library.options.rivals import beaten, option_of, without
from library.options.toml_file import Located, find_config, in_single_quotes, parse_toml, read_options, values_of

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class ConfigOptions:
    """The file of options, and --dry_run."""

    dataset_config: str | None = None
    """TOML file with any of these options, looked up as given, then in dataset_configs/. The command line overrides it."""
    dry_run: bool = False
    """Print the resolved plan and stop."""
    report: bool = False
    """With dry_run: look at pictures and captions as doctor.py does, and write output_dir/doctor.html and .json."""

    def __post_init__(self) -> None:
        require(not self.report or self.dry_run, "report", "looks before a training: it needs --dry_run.")


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
    Raises SystemExit after printing the help that `argv` asks for; UserError with all that is wrong, a line each: unknown
    keys and options (with the nearest names), mistyped values, failed checks, with file and line where the value came from
    a file.
    """
    answer_help(argv, options_type, prog, description, dialect)
    kinds = fields_of(options_type)
    words, wrong = dialect.words(argv)
    config = next((word.strip() for word in reversed(values_in(words, dialect.config_option))), "") or None
    if config is None and default_config is not None and not values_in(words, "train_data"):
        _say(f"No --{dialect.config_option} given: using the embedded {default_config}.")
        config = default_config
        words = [*words, f"--{dialect.config_option}", config]
    known = set(kinds).union(*(fields_of(other) for other in also_known))
    words, unknown = known_words(words, kinds)
    wrong = [*unknown, *wrong]
    from_file: dict[str, Located] = {}
    to_be_written = dialect.output_option is not None and _switched_on(dialect.output_option, words, {})
    if config is not None and not to_be_written:
        try:
            from_file = _file_values(config, dialect, known, words, wrong)
        except UserError as error:
            raise UserError("\n".join([*wrong, str(error)])) from None
        from_file = _typed(from_file, kinds, wrong)
    words, empty = words_given(words, kinds)
    for name, word in empty.items():
        _say(f"note: --{name} {word or 'is empty and'} counts as not given.")
        from_file.pop(name, None)
    given = _command_line(words, kinds, wrong)
    values = values_of(from_file)
    replaced = beaten({name: value for name, value in given.items() if name != dialect.config_option}, values)
    for loser, winner in replaced.items():
        place = from_file[option_of(loser, values)].place
        _say(f"note: --{winner.partition(':')[0]} replaces {loser.replace(':', ' ')} of {place}.")
    values = without(values, replaced) | given
    options, failed = _checked(options_type, values, kinds, wrong)
    checks = [_with_place(error, from_file, given) for error in failed]
    if len(checks) == 1 and not wrong:
        raise checks[0]
    if wrong := [*wrong, *map(str, checks)]:
        raise UserError("\n".join(wrong))
    return options


def _say(sentence: str) -> None:
    """Once, of all processes of a training."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr)


def _checked(
    options_type: type[Options], values: dict[str, Any], kinds: Mapping[str, Any], wrong: list[str]
) -> tuple[Options, list[OptionError]]:
    """The options with these values, and every check that fails: after each, what failed takes its default and the checks run
    again. What may follow from a fault that is named already is left out.
    """
    errors: list[OptionError] = []
    named = _words_of(" ".join(wrong)) & kinds.keys()
    while True:
        try:
            return _built(options_type, values), errors
        except OptionError as error:
            about = _words_of(str(error)) & kinds.keys()
            if not about & named:
                errors.append(error)
            gone = {error.option} & values.keys() or about & values.keys()
            if not gone:
                return None, errors or ([] if wrong else [error])  # type: ignore[return-value]
            named |= gone
            values = {name: value for name, value in values.items() if name not in gone}


def _words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _with_place(
    error: OptionError, from_file: Mapping[str, Located], given: Mapping[str, Any]
) -> OptionError | UserError:
    source = from_file.get(error.option)
    if source is None or error.option in given:
        return error
    return UserError(f"{str(error).rstrip('.')} ({source.place}).")


def _file_values(
    config: str, dialect: Dialect, known: set[str], words: list[str], wrong: list[str]
) -> dict[str, Located]:
    """Known keys of the file with their values as read; what is wrong with its keys is added to `wrong`, in one sentence."""
    read = read_options(
        find_config(config), later_section_wins=dialect.later_section_wins, datasets_beside=dialect.datasets_beside
    )
    values, faults = dialect.values(read)
    strangers = _unknown(values, known, dialect.ignore_option)
    if strangers and dialect.ignore_option is not None and _switched_on(dialect.ignore_option, words, values):
        _say(f"warning: {strangers} They are ignored, as --{dialect.ignore_option} asks.")
    elif strangers:
        faults.insert(0, strangers)
    if faults:
        wrong.append(" ".join(faults))
    return {name: located for name, located in values.items() if name in known}


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


def _switched_on(name: str, argv: list[str], values: dict[str, Located]) -> bool:
    """Whether the command line, else the file, turns the flag `name` on."""
    words = [word.replace("-", "_") for word in argv]
    off, on = f"__no_{name}" in words, f"__{name}" in words
    return on or (not off and name in values and values[name].value is True)


def _unknown(values: dict[str, Located], known: set[str], ignore_option: str | None) -> str | None:
    """The sentence about keys that are not `known`, if there are any."""
    unknown = []
    for name, located in values.items():
        if name not in known:
            is_tables = isinstance(located.value, list) and all(isinstance(item, dict) for item in located.value)
            hint = " (a file with [[datasets]] is for --dataset_config)" if is_tables and name == "datasets" else None
            if isinstance(located.value, dict):
                hint = (
                    " (a table within a table, which holds no options; LoRA_Easy_Training_Scripts writes what it trains with into "
                    "runtime_store/config.toml and dataset.toml)"
                )
            unknown.append(f"{name}{nearest(name, known) if hint is None else hint} in {located.place}")
    if not unknown:
        return None
    guessed = all(text.count("did you mean") or "dataset_config" in text for text in unknown)
    away = "" if guessed or ignore_option is None else f" Delete or correct them, or add --{ignore_option}."
    return f"Unknown {'key' if len(unknown) == 1 else 'keys'}: {'; '.join(unknown)}.{away}"


def _typed(values: dict[str, Located], kinds: dict[str, Any], wrong: list[str]) -> dict[str, Located]:
    """The values that belong to `kinds`, checked strictly: "10" is no number, 1 is no switch, 1 is a legal float. A single value is
    a list of one where a list is wanted. What does not fit is left out and added to `wrong`.
    """
    typed: dict[str, Located] = {}
    for name, located in values.items():
        if name not in kinds:
            continue
        kind, value = kinds[name], value_given(located.value, kinds[name])
        if value is NOT_GIVEN:
            continue
        if _is_list(kind) and not isinstance(value, list):
            value = [value]
        if reason := _misread(value, kind):
            wrong.append(f"{name} in {located.place}: {reason}")
            continue
        if Path in plain_kinds(kind):
            value = _as_paths(value)
        value = tuple(value) if isinstance(value, list) else value
        try:
            checked = TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
            typed[name] = dataclasses.replace(located, value=checked)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            bare = located.value.strip() if isinstance(located.value, str) else ""
            without_quotes = bare.lower() if bare.lower() in ("true", "false") else bare
            fits = _reads_as(without_quotes, kind)
            hint = f" Write it without quotes: {name} = {without_quotes}." if fits else ""
            wrong.append(f"{name} is {located.value!r} in {located.place}: {reason[0].lower()}{reason[1:]}.{hint}")
    return typed


def _reads_as(text: str, kind: Any) -> bool:
    """Whether a text is a value of this type without its quotes: a number, true or false."""
    try:
        value = parse_toml(f"value = {text}", Path("value"))["value"]
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except (UserError, ValidationError, KeyError):
        return False
    return bool(text)


def _misread(value: Any, kind: Any) -> str | None:
    """What to say of a path that TOML has read otherwise than it was meant: "data\\new" has a line end in it."""
    signs = {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\b": r"\b", "\f": r"\f"}
    if VERBATIM in markers(kind) or not plain_kinds(kind) & {str, Path}:
        return None
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and "=" not in text and set(text) & set(signs):
            return in_single_quotes("".join(signs.get(sign, sign) for sign in text))
    return None


def _is_list(kind: Any) -> bool:
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    return typing.get_origin(bare) is tuple


def _as_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_paths(item) for item in value]
    return Path(value) if isinstance(value, str) else value


def _built(options_type: type, values: Mapping[str, Any]) -> Any:
    """An instance with these values, those of a recipe that they name, and defaults for the others. Raises OptionError."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    if issubclass(options_type, WithRecipes):
        values = {**values, **options_type.of_recipe(values)}
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(options_type):
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _built(hints[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
        else:
            is_needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            require(not is_needed, field.name, "is missing.")
    return options_type(**arguments)


def _command_line(words: list[str], kinds: dict[str, Any], wrong: list[str]) -> dict[str, Any]:
    """Values of the options that `words` give. What cannot be read is left out and added to `wrong`."""
    given = {name: kind for name, kind in kinds.items() if values_in(words, name)}
    while True:
        # One flat class of what is given: what is checked together is checked when everything is known.
        fields = [
            (name, kind, dataclasses.field(default=False)) if kind is bool else (name, kind)
            for name, kind in given.items()
        ]
        flat = dataclasses.make_dataclass("Options", fields, kw_only=True)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                read: Any = tyro.cli(flat, args=_full_words(words, kinds), use_underscores=True, add_help=False)
            return {name: getattr(read, name) for name in given}
        except SystemExit:
            message = _message(said.getvalue())
        wrong.append(_sentence(message))
        named = [name for name in re.findall(r"--(\w+)", message) if name in given]
        if not named:
            raise UserError("\n".join(wrong))
        del given[named[0]]
        words = _without_option(words, named[0])


def _without_option(words: list[str], name: str) -> list[str]:
    kept, drops = [], False
    for word in words:
        if word.startswith("--"):
            drops = word.partition("=")[0][2:].replace("-", "_") in (name, f"no_{name}")
        kept += [] if drops else [word]
    return kept


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


def _message(box: str) -> str:
    """What tyro says in its box, which has a title and lines of Unicode or of dashes, by what the terminal can show."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    body = [line for line in lines if line and not set(line) & set("╭╰")]
    if len(body) == len([line for line in lines if line]):
        body = body[2:]  # without corners, the title is a line of its own, with a rule under it
    end = next((number for number, line in enumerate(body) if set(line) <= set("─-")), len(body))
    return " ".join(" ".join(body[:end]).split())


def _sentence(text: str) -> str:
    if match := re.match(r"Error parsing --(\S+): no type matching (.+?) could be instantiated from \['(.*?)'\]", text):
        kind = match[2].replace("{None}|", "")
        return f"{match[1].replace('-', '_')} is {match[3]!r}: expected {kind}."
    if match := re.match(
        r"Error parsing --(\S+): Could not find valid parse for arguments: \['([^',]*,[^']*)'\]", text
    ):
        parts = " ".join(re.split(r"[\s,]+", match[2].strip(", ")))
        return f"{match[1].replace('-', '_')} is {match[2]!r}: values stand apart, without commas. Write --{match[1]} {parts}."
    if not text:
        return "The command line could not be read."
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
