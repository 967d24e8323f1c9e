"""Reads a search space from TOML. Errors name the file, the key and the nearest key that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as PydanticField

from library.errors import UserError
from library.options.command_line import nearest
from library.options.scripts import option_types
from library.options.search import Script
from library.options.toml_file import PROJECT_ROOT, read_toml
from library.search.space import Parameter, Space, written

SPACES_FOLDER = "search_spaces"
DEFAULT_SPACES: dict[Script, str] = {"train_network": "default", "train_repa": "repa"}


class _Table(BaseModel):
    """[parameters.NAME] of the file."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    default: bool | int | float | str
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None
    choices: list[bool | int | float | str] | None = None
    option: str | None = None
    times: list[str] = []
    also: list[str] = []
    extra: dict[str, dict[str, Any]] = PydanticField(default={}, alias="with")


_KEYS = tuple(parameter.alias or name for name, parameter in _Table.model_fields.items())


def find_space(name: str) -> Path:
    """The file that `name` means: as given, else in the project's search_spaces/, with or without `.toml`."""
    folder = PROJECT_ROOT / SPACES_FOLDER
    for candidate in (Path(name), folder / name, folder / f"{name}.toml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
    raise UserError(f"There is no search space {name}, neither a file nor in {SPACES_FOLDER}/, which has {shipped}.")


def read_space(path: Path, script: Script | None = None) -> Space:
    """Read and check a search space.

    script: the script that it must be a space of; None accepts either.
    Raises UserError: unknown keys, options that the script does not have, a default outside its range, an empty range.
    """
    document = read_toml(path)
    top = ("script", "options", "parameters")
    for key in document:
        if key not in top:
            raise UserError(
                f"{path}: {key} is not a key of a search space{nearest(key, top)}. Its keys are {', '.join(top)}."
            )
    own = document.get("script", "train_network")
    if own not in get_args(Script):
        raise UserError(f"{path}: script is {own!r}; it must be one of {', '.join(get_args(Script))}.")
    if script is not None and own != script:
        raise UserError(f"{path} is a search space of {own}, but this study tunes {script}.")
    tables, options = document.get("parameters", {}), document.get("options", {})
    for name, table in (("parameters", tables), ("options", options)):
        if not isinstance(table, dict):
            raise UserError(f"{path}: [{name}] must be a table, got {table!r}.")
    if not tables:
        raise UserError(f"{path} has no [parameters.NAME], so there is nothing to search.")
    space = Space(own, tuple(_parameter(path, name, table) for name, table in tables.items()), options)
    _check_options(path, space)
    return space


def _parameter(path: Path, name: str, content: Any) -> Parameter:
    where = f"{path}: [parameters.{name}]"
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a table with a default and a range, got {content!r}.")
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{where} {key} is unknown{nearest(key, _KEYS)}. The keys are {', '.join(_KEYS)}.")
    try:
        table = _Table.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        said = "is missing" if first["type"] == "missing" else f"is {content.get(key)!r}: {first['msg'].lower()}"
        raise UserError(f"{where} {key} {said}.") from None
    _check_range(where, table)
    low, high = table.low, table.high
    if low is not None and high is not None and not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    default = table.default
    if isinstance(low, float) and isinstance(default, int) and not isinstance(default, bool):
        default = float(default)
    parameter = Parameter(
        name,
        default,
        low,
        high,
        table.log,
        table.step,
        tuple(table.choices or ()),
        name if table.option is None else table.option,
        tuple(table.times),
        tuple(table.also),
        table.extra,
    )
    if reason := parameter.objection(parameter.default):
        raise UserError(f"{where} default {reason}.")
    for choice in parameter.extra:
        if choice not in [written(value) for value in parameter.choices]:
            raise UserError(f"{where} with.{choice} is not a choice{nearest(choice, map(str, parameter.choices))}.")
    return parameter


def _check_range(where: str, table: _Table) -> None:
    if table.choices is not None:
        if table.low is not None or table.high is not None or table.log or table.step is not None:
            raise UserError(f"{where} has both choices and a range. Keep one of them.")
        if len(table.choices) < 2 or len({written(choice) for choice in table.choices}) < len(table.choices):
            raise UserError(f"{where} choices must be at least two values, all different, got {table.choices}.")
        return
    if table.low is None or table.high is None:
        raise UserError(f"{where} needs low and high, or choices.")
    if isinstance(table.low, bool) or isinstance(table.high, bool) or not table.low < table.high:
        raise UserError(f"{where} low must be below high, got {table.low} and {table.high}.")
    if table.log and table.low <= 0:
        raise UserError(f"{where} log needs a low above 0, got {table.low}.")
    if table.log and table.step is not None:
        raise UserError(f"{where} has log and step, which exclude each other.")
    if table.step is not None:
        is_whole = isinstance(table.low, int) and isinstance(table.high, int)
        steps = (table.high - table.low) / table.step if table.step > 0 else 0.5
        if abs(steps - round(steps)) > 1e-9 or (is_whole and not isinstance(table.step, int)):
            raise UserError(f"{where} step must lead from low to high in whole steps, got {table.step}.")


def _check_options(path: Path, space: Space) -> None:
    """Raises UserError where a named option is not one of the script's, or a factor does not exist."""
    known = option_types(space.script)
    owners: dict[str, str] = {}
    for name in space.options:
        if name not in known:
            raise UserError(f"{path}: [options] {name} is not an option of {space.script}.py{nearest(name, known)}.")
    for parameter in space.parameters:
        where = f"{path}: [parameters.{parameter.name}]"
        extra = [name for options in parameter.extra.values() for name in options]
        for name in [*filter(None, [parameter.option]), *parameter.also, *extra]:
            if name not in known:
                raise UserError(f"{where} {name} is not an option of {space.script}.py{nearest(name, known)}.")
        if parameter.option and owners.setdefault(parameter.option, parameter.name) != parameter.name:
            raise UserError(f"{where} sets {parameter.option}, which {owners[parameter.option]} sets too.")
        for name in parameter.times:
            if name not in known and name not in space.defaults:
                raise UserError(f"{where} times {name} is neither an option nor a parameter{nearest(name, known)}.")
            for factor in space.parameters:
                values = (factor.default, *factor.choices)
                if name in (factor.name, factor.option) and any(isinstance(value, str) for value in values):
                    raise UserError(f"{where} times {name} multiplies by strings, such as {factor.default!r}.")
        if parameter.times and any(isinstance(value, str) for value in (parameter.default, *parameter.choices)):
            raise UserError(f"{where} times multiplies numbers, and {parameter.default!r} is not a number.")
    _check_circles(path, space)


def _check_circles(path: Path, space: Space) -> None:
    """Raises UserError where an option is multiplied by itself, by way of others."""
    products = [parameter for parameter in space.parameters if parameter.option]
    needs = {product.option: set(product.times) - {product.option} for product in products}
    for option in needs:
        seen, ahead = set[str](), set(needs[option])
        while ahead:
            name = ahead.pop()
            if name == option:
                raise UserError(f"{path}: {option} is multiplied by itself, by way of {', '.join(sorted(seen))}.")
            if name not in seen:
                seen.add(name)
                ahead |= needs.get(name, set())
