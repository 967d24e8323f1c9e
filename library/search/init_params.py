"""What a study begins with: parameters of another study, of one trial, or of somebody's own file (--init-params)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.files import read_json
from library.search.best_params import BestParams, Params, Scalar, is_best_params, parse_best_params

if TYPE_CHECKING:
    from library.search.recipe import SdxlOptions
    from library.search.space import Parameter, Space

# Names of search_spaces/sdxl.toml.
MULTIPLIER, DIM, TEXT_RATIO, TRAIN_TEXT = (
    "learning_rate_multiplier",
    "network_dim",
    "text_encoder_ratio",
    "train_text_encoders",
)
SMALLER_RATE = 0.7
"""Second trial on SDXL: its U-Net is wider by a geometric mean of 1471 / 768, and rates go with 1 / sqrt(width)."""


def read_init_params(
    path: Path | str, space: Space | None = None, fixed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Parameters from a best_params.json, a trial's params.json, or a bare table with names of the space or kohya's.

    With a `space` they become a point of it: kohya's names are translated (unet_lr is learning_rate, text_encoder_lr a
    ratio where that is searched), what the file does not say is the space's default, and the result can be enqueued.
    Without one they are returned as they are.

    Args:
        fixed: options that hold for all trials. An entry of the file that only repeats one of them is no error.

    Raises UserError: not there, no JSON, no table of plain values; with a space also names that are neither searched nor
    fixed, and values that are out of range, all of them in one sentence.
    """
    content = read_json(path)
    if is_best_params(content):
        best = parse_best_params(content, path)
        return dict(best.params) if space is None else _point(_of_study(best, space), path, space, fixed or {})
    params = _bare(content, path)
    return params if space is None else _point(params, path, space, fixed or {})


def _of_study(best: BestParams, space: Space) -> dict[str, Any]:
    """The suggested values where the space has their names; else the options they led to, as far as these are searched."""
    names = {one.name for one in space.parameters}
    if best.params.keys() <= names:
        return dict(best.params)
    options = {one.option for one in space.parameters if one.option}
    return {name: value for name, value in best.train_config.items() if name in options and value is not None}


def _bare(content: Any, path: Path | str) -> dict[str, Any]:
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        content = content["params"]
    if not isinstance(content, dict) or not content:
        raise UserError(
            f'{path} has no parameters. Expected {{"learning_rate": 0.0003, "network_dim": 64, ...}}, or the best_params.json '
            "of a study."
        )
    wrong = [f"{name} is {value!r}" for name, value in content.items() if not _is_plain(value)]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}. Parameters are numbers, texts, true or false.")
    return content


def _is_plain(value: Any) -> bool:
    # A rate for each text encoder is a list.
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, int | float) and _is_plain(item) for item in value)
    return isinstance(value, str | bool) or (isinstance(value, int | float) and math.isfinite(value))


def _point(params: Mapping[str, Any], path: Path | str, space: Space, fixed: Mapping[str, Any]) -> Params:
    """`params` as a point of the space. Raises UserError beginning with the file."""
    params = _with_one_rate(dict(params), path, space)
    known = {name for one in space.parameters for name in (one.name, one.option)}
    held = {**space.options, **fixed}
    repeated = [name for name in params if name not in known and name in held and held[name] == params[name]]
    params = {name: value for name, value in params.items() if name not in repeated}
    for name in params:
        if name not in known and _is_option(name, space):
            there = f"fixed to {held[name]!r}" if name in held else "not searched"
            raise UserError(
                f"{path} gives {name} {params[name]!r}, which is {there} in this study. Take it out of the file, or fix it for all "
                "trials in the configuration."
            )
    try:
        found = space.suggested(params, fixed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return {one.name: _own(one, found[one.name]) for one in space.parameters}


def _with_one_rate(params: dict[str, Any], path: Path | str, space: Space) -> dict[str, Any]:
    """unet_lr as learning_rate, which is what spaces search."""
    searched = {one.option for one in space.parameters}
    if "unet_lr" not in params or "unet_lr" in searched:
        return params
    rate = params.pop("unet_lr")
    if params.setdefault("learning_rate", rate) != rate:
        raise UserError(
            f"{path} gives learning_rate {params['learning_rate']} and unet_lr {rate}; the space has one rate. Keep one of them."
        )
    return params


def _is_option(name: str, space: Space) -> bool:
    from library.search.space_file import script_options

    return name in script_options(space.script)


def _own(one: Parameter, value: Scalar) -> Scalar:
    """The value as the parameter has it: 64.0 is the choice 64."""
    if one.choices:
        return next(
            choice for choice in one.choices if choice == value and isinstance(choice, bool) == isinstance(value, bool)
        )
    return int(value) if one.is_whole else float(value)


def sdxl_first_trials(best: BestParams, wishes: SdxlOptions | None = None) -> list[Params]:
    """Points of search_spaces/sdxl.toml that a study on SDXL begins with, for options that `export` carried over.

    The exact export; 0.7 times its learning rate; its text encoders off, unless they were. Raises UserError as `export`.
    """
    from library.search.exported_files import options_of
    from library.search.recipe import Found, Recipe, SdxlOptions
    from library.search.sdxl_network import TEXT_BAND, rank, text_ratio

    wishes = wishes or SdxlOptions()
    options = options_of(best.train_config, None, f"train_config of the study {best.study}")
    found = Found(options, (), (), best.lr_reference)
    if not options.trains_unet:
        raise UserError(
            f"The study {best.study} trained the text encoders alone; the study on SDXL is about the U-Net."
        )
    trains_text = options.trains_text_encoders and wishes.train_text_encoders
    export: Params = {
        MULTIPLIER: 1.0,
        DIM: rank(found, Recipe({}, ()), wishes).options["network_dim"],
        # Without text encoders there is no ratio, and a point of the space needs one all the same.
        TEXT_RATIO: text_ratio(found) if options.trains_text_encoders else sum(TEXT_BAND) / 2,
        TRAIN_TEXT: trains_text,
    }
    trials: list[Params] = [export, {**export, MULTIPLIER: SMALLER_RATE}]
    return [*trials, {**export, TRAIN_TEXT: False}] if trains_text else trials


def sdxl_fixed_options(exported: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an export without those that say whether text encoders are trained: on SDXL the study decides that."""
    searched = ("text_encoder_lr", "network_train_unet_only", "cache_text_encoder_outputs")
    return {name: value for name, value in exported.items() if name not in searched}
