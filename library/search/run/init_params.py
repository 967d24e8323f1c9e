"""Parameters that a study begins with (--init-params): of another study, of one trial, or of a file that somebody wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json
from library.options.scripts import option_types
from library.search.best_params import BestParams, Params, Scalar, is_best_params, parse_best_params
from library.search.space import Parameter, Space


def read_init_params(path: Path | str, space: Space, fixed: Mapping[str, Any] | None = None) -> Params:
    """A point of the space from a best_params.json, a trial's params.json, or a bare table with names of the space or kohya's.

    kohya's names are translated: unet_lr is learning_rate, text_encoder_lr becomes a ratio where that is searched. Parameters
    that the file does not have get the space's default.

    Args:
        fixed: options that hold for all trials. The file may repeat them.

    Raises UserError: a file that does not exist, is not JSON or has no table of plain values; names that are neither searched
    nor fixed; values out of range, all of them in one sentence.
    """
    content = read_json(path)
    if is_best_params(content):
        params = _of_study(parse_best_params(content, path), space)
    else:
        params = bare_table(content, path)
    return point_of(params, path, space, fixed or {})


def _of_study(best: BestParams, space: Space) -> dict[str, Any]:
    """The suggested values where the space has parameters of their names; else the options that it searches."""
    names = {parameter.name for parameter in space.parameters}
    if best.params.keys() <= names:
        return dict(best.params)
    options = {parameter.option for parameter in space.parameters if parameter.option}
    return {name: value for name, value in best.train_config.items() if name in options and value is not None}


def bare_table(content: Any, path: Path | str) -> dict[str, Any]:
    """The parameters in parsed JSON: its `params`, or all of it. Raises UserError where there are none, or not plain values."""
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        content = content["params"]
    if not isinstance(content, dict) or not content:
        raise UserError(
            f'{path} has no parameters. Expected {{"learning_rate": 0.0003, "network_dim": 64, ...}}, or the best_params.json '
            "of a study."
        )
    wrong = [f"{name} is {value!r}" for name, value in content.items() if not _is_plain(value)]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}. Parameters are numbers, strings, true or false.")
    return content


def _is_plain(value: Any) -> bool:
    # Lists too: text_encoder_lr may have a rate for each text encoder, and network_args is a list of strings.
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, int | float | str) and _is_plain(item) for item in value)
    return isinstance(value, str | bool) or (isinstance(value, int | float) and math.isfinite(value))


def point_of(params: Mapping[str, Any], path: Path | str, space: Space, fixed: Mapping[str, Any]) -> Params:
    """`params` as a point of the space. Raises UserError that begins with the file."""
    params = _with_one_rate(dict(params), path, space)
    known = {name for parameter in space.parameters for name in (parameter.name, parameter.option)}
    held = {**space.options, **fixed}
    params = {name: value for name, value in params.items() if name in known or name not in held or held[name] != value}
    for name in params:
        if name not in known and name in option_types(space.script):
            state = f"fixed to {held[name]!r}" if name in held else "not searched"
            raise UserError(
                f"{path} gives {name} {params[name]!r}, which is {state} in this study. Remove it from the file, or fix it for all "
                "trials in the configuration."
            )
    try:
        found = space.suggested(params, fixed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return {parameter.name: _typed(parameter, found[parameter.name]) for parameter in space.parameters}


def _with_one_rate(params: dict[str, Any], path: Path | str, space: Space) -> dict[str, Any]:
    """unet_lr as learning_rate, which is what spaces search."""
    searched = {parameter.option for parameter in space.parameters}
    if "unet_lr" not in params or "unet_lr" in searched:
        return params
    rate = params.pop("unet_lr")
    if params.setdefault("learning_rate", rate) != rate:
        raise UserError(
            f"{path} gives learning_rate {params['learning_rate']} and unet_lr {rate}, but the space has one rate. Keep one."
        )
    return params


def _typed(parameter: Parameter, value: Scalar) -> Scalar:
    """The value in the parameter's type: 64.0 is the choice 64."""
    if parameter.choices:
        same = (choice for choice in parameter.choices if isinstance(choice, bool) == isinstance(value, bool))
        return next(choice for choice in same if choice == value)
    return int(value) if parameter.is_whole else float(value)
