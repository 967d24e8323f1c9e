"""Carries the best training of an SD1.5 study to SDXL: a dataset file, a configuration, and the line that runs them."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from library.errors import UserError
from library.files import read_json, write_json, write_text
from library.options.toml_file import PROJECT_ROOT
from library.search.best_params import BestParams
from library.search.held_out_pictures import EVALUATION_SEED, share_to_hold_out
from library.search.to_sdxl.exported_files import (
    config_text,
    dataset_text,
    options_of,
    read_back,
    script_text,
    with_same_ids,
)
from library.search.to_sdxl.rules import carry, written_options
from library.search.to_sdxl.trainings import Found, Pictures, Recipe, SdxlOptions

if TYPE_CHECKING:
    from library.data.dataset_schema import Dataset
    from library.data.training_images import TrainingImage
    from library.options.network import TrainNetworkOptions

CONFIG, DATASET, SCRIPT = "sdxl_config.toml", "sdxl_dataset.toml", "sdxl_train.sh"
REQUEST = "sdxl_export.json"

# With fewer pictures, none can be spared: a guess.
_FEW = 4
_NATIVE_SD15 = 512


@dataclass(frozen=True)
class Request:
    """What an export was asked for, kept beside it so that the next one is asked for the same: sdxl_export.json."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    base_model: str
    dataset_config: str | None = None
    wishes: SdxlOptions = field(default_factory=SdxlOptions)


def last_request(folder: Path) -> Request | None:
    """Of the export in `folder`; None where there is none. Raises UserError for a file that is damaged."""
    if not (folder / REQUEST).is_file():
        return None
    try:
        return TypeAdapter(Request).validate_json(json.dumps(read_json(folder / REQUEST)))
    except ValidationError:
        raise UserError(
            f"{folder / REQUEST} is damaged. Delete it, and export anew with the options that you want."
        ) from None


@dataclass(frozen=True)
class Exported:
    """What an export left.

    Attributes:
        command: runs the training as it is, from the folder in which the export was made.
        changes: `network_dim 32 -> 64`, of every option and dataset value that differs from the study's.
        warnings: where a rule is weak, or meets something it does not suit.
    """

    config: Path
    dataset: Path
    script: Path
    command: str
    recipe: Recipe
    changes: tuple[str, ...]
    warnings: tuple[str, ...]

    def report(self) -> str:
        """For the terminal."""
        lines = [f"{self.dataset}, {self.config}, {self.script}"]
        lines += [f"  {change}" for change in self.changes]
        lines += [f"note: {warning}" for warning in self.warnings]
        return "\n".join([*lines, "", self.command])


def export(
    best: BestParams,
    *,
    sdxl_base: str,
    output_dir: Path | str,
    dataset_config: Path | str | None = None,
    train_dir: Path | str | None = None,
    output_name: str = "sdxl_lora",
    wishes: SdxlOptions | None = None,
) -> Exported:
    """Write sdxl_dataset.toml, sdxl_config.toml and sdxl_train.sh into `output_dir`, and return what to run.

    Files of an earlier export are replaced. Both TOML files are read back before they are written. What was asked for is
    kept in sdxl_export.json (see `last_request`).

    Args:
        sdxl_base: a file, a folder, a hub id, or tiny-sdxl.
        dataset_config: the study's dataset file, where it lies elsewhere now than when the study ran.
        train_dir: output_dir of the training to come; sdxl_lora in `output_dir` by default.
        output_name: of its adapters.

    Raises UserError: a study that was not on SD1.5 or not of train_network.py, a base that is not there or no SDXL, data
    that are not there, a wish that cannot be granted.
    """
    folder = Path(output_dir)
    train_dir = folder / "sdxl_lora" if train_dir is None else Path(train_dir)
    _require_transferable(best)
    _require_sdxl(sdxl_base)
    found = find(best, dataset_config)
    recipe = carry(found, wishes or SdxlOptions())
    recipe = recipe.with_datasets(map(with_same_ids, recipe.datasets))
    options = {
        "pretrained_model_name_or_path": sdxl_base,
        "dataset_config": str(folder / DATASET),
        **written_options(recipe),
        "output_dir": str(train_dir),
        "output_name": output_name,
    }
    title = f"exported from {best.origin}"
    config, dataset = config_text(options, found, title, best.verdict), dataset_text(recipe.datasets, title)
    read_back(config, dataset, options, recipe.datasets)
    command = shlex.join(_command(folder / CONFIG))
    write_text(folder / DATASET, dataset)
    write_text(folder / CONFIG, config)
    write_text(folder / SCRIPT, script_text(command, title, train_dir))
    request = Request(sdxl_base, None if dataset_config is None else str(dataset_config), wishes or SdxlOptions())
    write_json(folder / REQUEST, asdict(request))
    return Exported(
        folder / CONFIG, folder / DATASET, folder / SCRIPT, command, recipe, _changes(found, recipe), recipe.warnings
    )


def find(best: BestParams, dataset_config: Path | str | None = None) -> Found:
    """The best training as it was, with what the rules have to know of its pictures. Headers of all pictures are read.

    Raises UserError where its options or its data cannot be used any more.
    """
    options = options_of(best.train_config, dataset_config, best.config_origin)
    from library.data.network_data import read_datasets
    from library.data.training_images import collect_images

    datasets = tuple(read_datasets(options, _native_side(options)))
    images = [[one for one in collect_images(dataset).images if not one.subset.is_reg] for dataset in datasets]
    areas = [[one.size[0] * one.size[1] for one in of_dataset] for of_dataset in images]
    pictures = tuple(Pictures(len(one), float(median(one)) if one else 0.0) for one in areas)
    return Found(options, datasets, pictures, best.lr_reference, _validation_share(datasets, images))


def _require_transferable(best: BestParams) -> None:
    if best.base_model.family != "sd15":
        raise UserError(
            f"The study {best.study} ran on SDXL ({best.base_model.path}): its options need no export. Train with "
            "the train_config of its best_params.json."
        )
    if best.script != "train_network":
        raise UserError(
            f"The study {best.study} tuned {best.script}.py, which trains SD1.5 alone. Only studies of train_network.py can be "
            "exported to SDXL."
        )


def _require_sdxl(base: str) -> None:
    from library.models.configs import published_family
    from library.models.family import family_of
    from library.models.locate import TINY_SDXL, base_status, locate_base
    from networks.original_names import SDXL

    if base == TINY_SDXL:
        return
    missing = base_status(base)
    if missing is None:
        family_of(locate_base(base), allowed=(SDXL,))
    elif published_family(base) != SDXL:
        raise UserError(f"The SDXL base cannot be checked: {missing}")


def _native_side(options: TrainNetworkOptions) -> int:
    """Side in pixels that the study's base was trained at; SD1.5's where the base is not on this machine."""
    from library.models.family import native_side
    from library.models.locate import base_status, locate_base

    name = options.model.pretrained_model_name_or_path
    return _NATIVE_SD15 if base_status(name) else native_side(locate_base(name))


def _validation_share(datasets: tuple[Dataset, ...], images: list[list[TrainingImage]]) -> float | None:
    """See `Found.validation_share`. Pictures are held out by a hash of their names, so a share of few may be none."""
    from library.data.training_images import split_validation

    every = [image for of_dataset in images for image in of_dataset]
    if len({image.identity for image in every}) < _FEW:
        return 0.0
    for dataset, of_dataset in zip(datasets, images, strict=True):
        seed = EVALUATION_SEED if dataset.validation_seed is None else dataset.validation_seed
        if split_validation(of_dataset, dataset.validation_split, seed)[1]:
            return None
    return share_to_hold_out(every)


def _command(config: Path) -> list[str]:
    """One process: with more, a step would have more pictures than in the study."""
    script = PROJECT_ROOT / "train_network.py"
    here = Path("train_network.py")
    is_here = here.exists() and here.resolve() == script
    return [
        "accelerate",
        "launch",
        "--num_processes",
        "1",
        str(here if is_here else script),
        "--config_file",
        str(config),
    ]


def _changes(found: Found, recipe: Recipe) -> tuple[str, ...]:
    from library.options.parser import flatten

    before = flatten(found.options)
    after = written_options(recipe)
    changes = [f"{name} {_said(before[name])} -> {_said(after[name])}" for name in after if before[name] != after[name]]
    for old, new in zip(found.datasets, recipe.datasets, strict=True):
        names = (
            "resolution",
            "min_bucket_reso",
            "max_bucket_reso",
            "bucket_reso_steps",
            "batch_size",
            "validation_split",
            "validation_seed",
        )
        pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
        if not old.enable_bucket:
            pairs = [pair for pair in pairs if "bucket" not in pair[0]]
        changes += [f"{name} {_said(a)} -> {_said(b)} ({old.name})" for name, a, b in pairs if a != b]
    return tuple(changes)


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_said(item) for item in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
