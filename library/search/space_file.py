"""Reads a search space from TOML, and says what is wrong with it: the file, the key, the nearest key there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as PydanticField

from library.errors import UserError
from library.options.parser import fields_of, nearest
from library.options.toml_file import PROJECT_ROOT, read_toml
from library.search.messages import Script
from library.search.space import Parameter, Space, _written

SPACES_FOLDER = "search_spaces"
DEFAULT_SPACES: dict[Script, str] = {"train_network": "default", "train_repa": "repa"}


class _Table(BaseModel):
    """[parameters.NAME], as it stands in the file."""

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


_KEYS = tuple(one.alias or name for name, one in _Table.model_fields.items())


def find_space(name: str) -> Path:
    """The file that a user means by `name`: as given, else in the project's search_spaces/, with or without `.toml`."""
    folder = PROJECT_ROOT / SPACES_FOLDER
    for candidate in (Path(name), folder / name, folder / f"{name}.toml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
    raise UserError(f"No search space {name}, neither as a file nor in {SPACES_FOLDER}/, which has {shipped}.")


def read_space(path: Path, script: Script | None = None) -> Space:
    """Read and check a search space.

    script: what it is going to be used for; None where the file's own word is enough.
    Raises UserError: unknown keys, options the script has not, a default outside its range, a range that is none.
    """
    document = read_toml(path)
    top = ("script", "options", "parameters")
    for key in document:
        if key not in top:
            raise UserError(f"{path}: {key} is no key of a search space{nearest(key, top)}. It has {', '.join(top)}.")
    own = document.get("script", "train_network")
    if own not in get_args(Script):
        raise UserError(f"{path}: script is {own!r}; it must be one of {', '.join(get_args(Script))}.")
    if script is not None and own != script:
        raise UserError(f"{path} is a search space of {own}, and this study is one of {script}.")
    tables, options = document.get("parameters", {}), document.get("options", {})
    for name, table in (("parameters", tables), ("options", options)):
        if not isinstance(table, dict):
            raise UserError(f"{path}: [{name}] must be a table, got {table!r}.")
    if not tables:
        raise UserError(f"{path} has no [parameters.NAME]: nothing would be searched.")
    space = Space(own, tuple(_parameter(path, name, table) for name, table in tables.items()), options)
    _check_options(path, space)
    return space


def _parameter(path: Path, name: str, content: Any) -> Parameter:
    where = f"{path}: [parameters.{name}]"
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a table with a default and a range, got {content!r}.")
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{where} {key} is unknown{nearest(key, _KEYS)}. There are {', '.join(_KEYS)}.")
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
    one = Parameter(
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
    if reason := one.objection(one.default):
        raise UserError(f"{where} default {reason}.")
    for choice in one.extra:
        if choice not in [_written(value) for value in one.choices]:
            raise UserError(f"{where} with.{choice} belongs to no choice{nearest(choice, map(str, one.choices))}.")
    return one


def _check_range(where: str, table: _Table) -> None:
    if table.choices is not None:
        if table.low is not None or table.high is not None or table.log or table.step is not None:
            raise UserError(f"{where} has choices and a range. Keep one of them.")
        if len(table.choices) < 2 or len({_written(choice) for choice in table.choices}) < len(table.choices):
            raise UserError(f"{where} choices must be at least two, each of them once, got {table.choices}.")
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
    """Every option that is named must be one of the script, and every factor must be there."""
    known = script_options(space.script)
    owners: dict[str, str] = {}
    for name in space.options:
        if name not in known:
            raise UserError(f"{path}: [options] {name} is no option of {space.script}.py{nearest(name, known)}.")
    for one in space.parameters:
        where = f"{path}: [parameters.{one.name}]"
        extra = [name for options in one.extra.values() for name in options]
        for name in [*filter(None, [one.option]), *one.also, *extra]:
            if name not in known:
                raise UserError(f"{where} {name} is no option of {space.script}.py{nearest(name, known)}.")
        if one.option and owners.setdefault(one.option, one.name) != one.name:
            raise UserError(f"{where} sets {one.option}, which {owners[one.option]} sets too.")
        for name in one.times:
            if name not in known and name not in space.defaults:
                raise UserError(f"{where} times {name} is neither an option nor a parameter{nearest(name, known)}.")
            for factor in space.parameters:
                values = (factor.default, *factor.choices)
                if name in (factor.name, factor.option) and any(isinstance(value, str) for value in values):
                    raise UserError(f"{where} times {name} multiplies with texts, such as {factor.default!r}.")
        if one.times and any(isinstance(value, str) for value in (one.default, *one.choices)):
            raise UserError(f"{where} times multiplies a number, and {one.default!r} is none.")
    _check_circles(path, space)


def _check_circles(path: Path, space: Space) -> None:
    """A product must not refer to itself by way of others."""
    needs = {one.option: {name for name in one.times if name != one.option} for one in space.parameters if one.option}
    for option in needs:
        seen, ahead = set[str](), set(needs[option])
        while ahead:
            name = ahead.pop()
            if name == option:
                raise UserError(f"{path}: {option} is multiplied with itself, by way of {', '.join(sorted(seen))}.")
            if name not in seen:
                seen.add(name)
                ahead |= needs.get(name, set())


def script_options(script: Script) -> dict[str, Any]:
    """Name -> type of every option of the script."""
    if script == "train_network":
        from library.options.network import TrainNetworkOptions

        return fields_of(TrainNetworkOptions)
    from library.options.repa import TrainRepaOptions

    return fields_of(TrainRepaOptions)


def option_default(script: Script, name: str) -> Any:
    """What the script takes for an option that is not given."""
    from library.options.parser import flatten

    if script == "train_network":
        from library.options.network import TrainNetworkOptions

        return flatten(TrainNetworkOptions())[name]
    from library.options.repa import TrainRepaOptions

    return flatten(TrainRepaOptions())[name]
