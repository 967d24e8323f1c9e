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
    from library.search.space import Parameter, Space
    from library.search.to_sdxl.trainings import SdxlOptions

# Names of search_spaces/sdxl.toml.
MULTIPLIER, DIM, TEXT_RATIO, TRAIN_TEXT = (
    "learning_rate_multiplier",
    "network_dim",
    "text_encoder_ratio",
    "train_text_encoders",
)
BASE = "pretrained_model_name_or_path"
SCHEDULE = ("lr_warmup_steps", "lr_decay_steps")
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
    # A rate for each text encoder is a list, and network_args are one of texts.
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, int | float | str) and _is_plain(item) for item in value)
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
    from library.search.to_sdxl.exported_files import options_of
    from library.search.to_sdxl.network_rules import TEXT_BAND, rank, text_ratio
    from library.search.to_sdxl.trainings import Found, Recipe, SdxlOptions

    wishes = wishes or SdxlOptions()
    options = options_of(best.train_config, None, best.config_origin)
    found = Found(options, (), (), best.lr_reference)
    if not options.trains_unet:
        raise UserError(f"{best.origin} trained the text encoders alone; the study on SDXL is about the U-Net.")
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


def sdxl_points(best: BestParams, space: Space) -> list[Params]:
    """`sdxl_first_trials` as points of `space`, which may be an edited sdxl.toml: what it does not search is left out.

    Raises UserError where the export lies outside of the space.
    """
    points: list[Params] = []
    for trial in sdxl_first_trials(best):
        point = {one.name: trial.get(one.name, one.default) for one in space.parameters}
        if reason := space.objection(point):
            raise UserError(
                f"The export of {best.origin} is outside of the search space: {reason}. Give --space a copy of "
                "search_spaces/sdxl.toml that has room for it."
            )
        if point not in points:
            points.append(point)
    return points


def sdxl_fixed_options(exported: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Options of an export without those that say whether text encoders are trained, where the study decides that."""
    if all(one.option != "text_encoder_lr" for one in space.parameters):
        return dict(exported)
    searched = ("text_encoder_lr", "network_train_unet_only", "cache_text_encoder_outputs")
    return {name: value for name, value in exported.items() if name not in searched}


def best_of_table(path: Path, *, sd15_base: str, data: Mapping[str, Any]) -> BestParams:
    """A trial's params.json, or a table of kohya's names, as if a study on SD1.5 had found it.

    What search_spaces/default.toml searches must lie in its ranges, and is its default where the file does not say it.
    Other options of train_network.py are taken as they are.

    Args:
        sd15_base: what it was trained on, as far as that is known. data: options that name the pictures.

    Raises UserError: see `read_init_params`; also options of one run, such as paths, and lengths of a schedule in steps.
    """
    from library.search.best_params import BaseModel, ObjectiveFacts
    from library.search.messages import OWN
    from library.search.results.best_trial import rate_reference
    from library.search.space_file import DEFAULT_SPACES, find_space, read_space

    space = read_space(find_space(DEFAULT_SPACES["train_network"]))
    given = _bare(read_json(path), path)
    if of_a_run := [name for name in given if name in OWN | {BASE, *data}]:
        raise UserError(
            f"{path}: {', '.join(of_a_run)} says where or on what one training ran. Take it out of the file."
        )
    if in_steps := [name for name in SCHEDULE if isinstance(given.get(name), int | float) and given[name] >= 1]:
        raise UserError(
            f"{path} gives {in_steps[0]} {given[in_steps[0]]:g} in steps, and does not say how many steps the training had. Write "
            "it as a share of them, such as 0.05."
        )
    searched = {name for one in space.parameters for name in (one.name, one.option)} | {"unet_lr"}
    more = {name: value for name, value in given.items() if name not in searched and _is_option(name, space)}
    point = _point({name: value for name, value in given.items() if name not in more}, path, space, {})
    config = {**space.resolve(point, {BASE: sd15_base, **data}), **more}
    return BestParams(
        created="",
        study=str(path),
        base_model=BaseModel("sd15", sd15_base),
        dataset="",
        objective=ObjectiveFacts("loss"),
        value=0.0,
        trial=0,
        params=point,
        train_config=config,
        lr_reference=rate_reference("train_network", config, steps=0),
        search_space=space.hash,
    )
