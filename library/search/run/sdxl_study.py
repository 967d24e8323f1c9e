"""The small study on SDXL that continues a result on SD1.5 (--base-model with an SDXL base, and --init-params)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json
from library.models.embedded import SHAPES, TINY_BASES, TINY_SDXL
from library.options.scripts import option_types
from library.options.search import SdxlOptions
from library.search.best_params import BaseModel, BestParams, ObjectiveFacts, Params, is_best_params, parse_best_params
from library.search.half_batch import ACCUMULATION
from library.search.results.best_trial import rate_reference
from library.search.run.init_params import bare_table, point_of
from library.search.space import Space
from library.search.space_file import DEFAULT_SPACES, find_space, read_space
from library.search.terms import DECIDED_BY_TRIALS
from library.search.to_sdxl.export import Exported, export, trained_options
from library.search.to_sdxl.network_rules import TEXT_BAND, rank, text_ratio
from library.search.to_sdxl.rules import written_options
from library.search.to_sdxl.trainings import Sd15Training, SdxlTraining
from library.words import plural
from networks.families import SD15, SDXL

SDXL_SPACE = "sdxl"
TRIALS = 15
"""Of a study that starts from a known result; the guide asks for 10 to 20."""
# Parameters of search_spaces/sdxl.toml.
MULTIPLIER, DIM = "learning_rate_multiplier", "network_dim"
TEXT_RATIO, TRAIN_TEXT = "text_encoder_ratio", "train_text_encoders"
BASE = "pretrained_model_name_or_path"
SCHEDULE = ("lr_warmup_steps", "lr_decay_steps")
SMALLER_RATE = 0.7
"""Factor of the rate in the second trial. Rates go with 1 / sqrt(width), and SDXL's U-Net is 1471 / 768 times as wide (geometric
mean)."""


@dataclass(frozen=True)
class Start:
    """What a study on SDXL begins with.

    Attributes:
        fixed: the export, as options that hold for all trials.
        initial: points of the space: the export, the export with 0.7 times its learning rate, and without text encoders.
        notes: messages for the user.
    """

    fixed: dict[str, Any]
    initial: tuple[Params, ...]
    notes: tuple[str, ...]


def default_sdxl_base(sd15_base: str) -> str:
    return TINY_SDXL if sd15_base in TINY_BASES else SDXL.hub_id


def default_sd15_base(sdxl_base: str) -> str:
    """The base that a table of parameters is taken to be for; its native resolution is the default one."""
    return SHAPES if sdxl_base in TINY_BASES else SD15.hub_id


def continues_sd15(path: Path, space: Space, *, is_named: bool) -> bool:
    """Whether --init-params is to be exported from SD1.5: the space multiplies a given rate, and the file is not of SDXL.

    is_named: whether the user named the space. Raises UserError where it needs a result on SD1.5 and the file is one on SDXL.
    """
    if space.searches_rate:
        return False
    content = read_json(path)
    if not is_best_params(content):
        return True
    best = parse_best_params(content, path)
    if best.base_model.family == "sd15":
        return True
    if is_named:
        raise UserError(
            f"The study {best.study} of {path} ran on SDXL, but this search space continues a study on SD1.5. To continue that "
            "study, run its own command again with more --n-trials; to start another one, name a space that searches "
            "learning_rate, such as --space default."
        )
    return False


def start_from_sd15(
    path: Path, space: Space, *, base: str, folder: Path, dataset_config: str | None, data: Mapping[str, Any]
) -> Start:
    """Export the result in `path` into `folder`, by the rules, and make the start of a study of it.

    Args:
        dataset_config: used in place of the data that a study names.
        data: options that name the pictures, for a table that names none.

    Raises UserError: as `export` and `read_init_params`; an export that lies outside the space; no pictures.
    """
    best = _result(path, base, data)
    initial = initial_points(best, space, dataset_config)
    exported = export(best, sdxl_base=base, output_dir=folder, dataset_config=dataset_config)
    values = {BASE: base, "dataset_config": str(exported.dataset), **written_options(exported.training)}
    searched = ", ".join(parameter.name for parameter in space.parameters)
    note = f"{best.origin} is exported to SDXL, and all options are fixed to the export but for what is searched: {searched}"
    return Start(fixed_options(values, space), tuple(initial), (note, _step_note(exported, best)))


def _step_note(exported: Exported, best: BestParams) -> str:
    """How many pictures a step has, and why."""
    training, known = exported.training, best.lr_reference.effective_batch
    batch, accumulation = max(one.batch_size for one in training.datasets), training.options[ACCUMULATION]
    words = f"a step has {plural(batch * accumulation, 'picture')}, {batch} x {accumulation} (batch x accumulation)"
    if not known:
        return words
    if batch * accumulation == known:
        return f"{words}, with which the learning rate was found"
    return f"{words}; the learning rate was found with {known}, and is multiplied by the root of the ratio"


def _result(path: Path, base: str, data: Mapping[str, Any]) -> BestParams:
    content = read_json(path)
    if is_best_params(content):
        return parse_best_params(content, path)
    if not data:
        raise UserError(
            f"{path} names no pictures, and --dataset-config is missing, so there is nothing to train {base} on."
        )
    return result_of_table(path, sd15_base=default_sd15_base(base), data=data)


def first_trials(best: BestParams, dataset_config: str | None = None) -> list[Params]:
    """Points of search_spaces/sdxl.toml for the first trials, where options are fixed to the export of `best`.

    The export; the export with 0.7 times its learning rate; the export without text encoders, if it trains them. Raises
    UserError as `export`.
    """
    options = trained_options(best, dataset_config)
    sd15 = Sd15Training(options, (), (), best.lr_reference)
    if not options.trains_unet:
        raise UserError(f"{best.origin} trained the text encoders only, but a study on SDXL is about the U-Net.")
    trains_text = options.trains_text_encoders
    exported: Params = {
        MULTIPLIER: 1.0,
        DIM: rank(sd15, SdxlTraining({}, ()), SdxlOptions()).options["network_dim"],
        # A point of the space needs a ratio even where text encoders are not trained.
        TEXT_RATIO: text_ratio(sd15) if trains_text else sum(TEXT_BAND) / 2,
        TRAIN_TEXT: trains_text,
    }
    trials: list[Params] = [exported, {**exported, MULTIPLIER: SMALLER_RATE}]
    return [*trials, {**exported, TRAIN_TEXT: False}] if trains_text else trials


def initial_points(best: BestParams, space: Space, dataset_config: str | None = None) -> list[Params]:
    """`first_trials` as points of `space`, which may be an edited sdxl.toml; parameters that it does not have are left out.

    Raises UserError where the export lies outside the space.
    """
    points: list[Params] = []
    for trial in first_trials(best, dataset_config):
        point = {parameter.name: trial.get(parameter.name, parameter.default) for parameter in space.parameters}
        if reason := space.objection(point):
            raise UserError(
                f"The export of {best.origin} is outside the search space: {reason}. Give --space a copy of "
                "search_spaces/sdxl.toml that includes it."
            )
        if point not in points:
            points.append(point)
    return points


def fixed_options(exported: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Options of an export, without those that decide whether text encoders are trained if the study searches that."""
    if all(parameter.option != "text_encoder_lr" for parameter in space.parameters):
        return dict(exported)
    searched = ("text_encoder_lr", "network_train_unet_only", "cache_text_encoder_outputs")
    return {name: value for name, value in exported.items() if name not in searched}


def result_of_table(path: Path, *, sd15_base: str, data: Mapping[str, Any]) -> BestParams:
    """A trial's params.json, or a table of kohya's names, as if a study on SD1.5 had found it.

    What search_spaces/default.toml searches must lie in its ranges, with its default where the file does not have it. Other
    options of train_network.py are used as they are.

    Args:
        sd15_base: the base that the parameters are for. data: options that name the pictures.

    Raises UserError: see `read_init_params`; also for options of one run, such as paths, and schedules counted in steps.
    """
    space = read_space(find_space(DEFAULT_SPACES["train_network"]))
    given = bare_table(read_json(path), path)
    if of_a_run := [name for name in given if name in DECIDED_BY_TRIALS | {BASE, *data}]:
        raise UserError(
            f"{path} has {', '.join(of_a_run)}: where or on what one training ran. Keep only parameters in the file."
        )
    if in_steps := [name for name in SCHEDULE if isinstance(given.get(name), int | float) and given[name] >= 1]:
        raise UserError(
            f"{path} gives {in_steps[0]} {given[in_steps[0]]:g} in steps, but not how many steps the training had. Write it as a "
            "share of them, such as 0.05."
        )
    searched = {name for parameter in space.parameters for name in (parameter.name, parameter.option)} | {"unet_lr"}
    options = option_types("train_network")
    more = {name: value for name, value in given.items() if name not in searched and name in options}
    point = point_of({name: value for name, value in given.items() if name not in more}, path, space, {})
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
        lr_reference=replace(rate_reference("train_network", config, steps=0), effective_batch=0),
        search_space=space.hash,
    )
