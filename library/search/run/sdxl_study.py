"""The small study on SDXL that goes on from what was found on SD1.5 (--base-model with an SDXL base, and --init-params)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json
from library.models.locate import SHAPES, TINY_BASES, TINY_SDXL
from library.search.best_params import BestParams, is_best_params, parse_best_params
from library.search.run.init_params import BASE, best_of_table, sdxl_fixed_options, sdxl_points
from library.search.space import Space, Value

SDXL_SPACE = "sdxl"
TRIALS = 15
"""Of a study that begins with what is known; the guide asks for 10 to 20."""
SD15_BASE, SDXL_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True)
class Carried:
    """
    Attributes:
        fixed: the export, as options that hold for all trials.
        initial: the export, 0.7 times its learning rate, without text encoders; points of the space.
        note: what becomes of the study.
    """

    fixed: dict[str, Any]
    initial: tuple[dict[str, Value], ...]
    note: str


def default_sdxl_base(sd15_base: str) -> str:
    return TINY_SDXL if sd15_base in TINY_BASES else SDXL_BASE


def default_sd15_base(sdxl_base: str) -> str:
    """What a table of parameters without a base is taken to be found on: it decides what resolution is not given."""
    return SHAPES if sdxl_base in TINY_BASES else SD15_BASE


def goes_on_from_sd15(path: Path, space: Space, *, is_asked: bool) -> bool:
    """Whether --init-params is to be carried over: into a space that goes on from a given rate, from whatever is not SDXL's.

    is_asked: whether the user named the space. Raises UserError for a study on SDXL, and a space that needs one on SD1.5.
    """
    if space.searches_rate:
        return False
    content = read_json(path)
    if not is_best_params(content):
        return True
    best = parse_best_params(content, path)
    if best.base_model.family == "sd15":
        return True
    if is_asked:
        raise UserError(
            f"The study {best.study} of {path} ran on SDXL, and this search space goes on from a study on SD1.5. To go on with "
            "that study, run its own command again with more --n-trials; to begin another one, name a space that searches "
            "learning_rate, such as --space default."
        )
    return False


def carry_over(
    path: Path, space: Space, *, base: str, folder: Path, dataset_config: str | None, data: Mapping[str, Any]
) -> Carried:
    """Export what `path` has into `folder`, by the rules, and make a study's beginning of it.

    Args:
        dataset_config: in place of the data that a study names.
        data: options that name the pictures, for a table that names none.

    Raises UserError: as `export` and `read_init_params`; an export that lies outside of the space; no pictures.
    """
    from library.search.to_sdxl.export import export
    from library.search.to_sdxl.rules import written_options

    best = _best(path, base, data)
    initial = sdxl_points(best, space)
    exported = export(best, sdxl_base=base, output_dir=folder, dataset_config=dataset_config)
    values = {BASE: base, "dataset_config": str(exported.dataset), **written_options(exported.recipe)}
    searched = ", ".join(one.name for one in space.parameters)
    note = f"{best.origin} is carried to SDXL; its export is fixed but for what is searched ({searched})"
    return Carried(sdxl_fixed_options(values, space), tuple(initial), note)


def _best(path: Path, base: str, data: Mapping[str, Any]) -> BestParams:
    content = read_json(path)
    if is_best_params(content):
        return parse_best_params(content, path)
    if not data:
        raise UserError(
            f"{path} names no pictures, and --dataset-config is missing: there is nothing to train {base} on."
        )
    return best_of_table(path, sd15_base=default_sd15_base(base), data=data)
