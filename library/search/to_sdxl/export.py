"""Exports the best training of an SD1.5 study to SDXL: a dataset file, a configuration, and the command that trains."""

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
from library.options.parser import flatten
from library.options.scripts import network_options_of
from library.options.search import SdxlOptions
from library.options.toml_file import PROJECT_ROOT
from library.search.best_params import BestParams
from library.search.held_out_pictures import EVALUATION_SEED, share_to_hold_out
from library.search.lines import folded
from library.search.to_sdxl.exported_files import (
    BUCKET_LIMITS,
    config_text,
    dataset_text,
    for_kohya,
    read_back,
    script_text,
    with_caption_extensions,
    with_same_ids,
)
from library.search.to_sdxl.rules import apply_rules, written_options
from library.search.to_sdxl.trainings import PictureFacts, Sd15Training, SdxlTraining

if TYPE_CHECKING:
    from library.data.dataset_schema import Dataset
    from library.data.training_images import TrainingImage
    from library.options.network import TrainNetworkOptions

CONFIG, DATASET, SCRIPT = "sdxl_config.toml", "sdxl_dataset.toml", "sdxl_train.sh"
REQUEST = "sdxl_export.json"
NAME = "sdxl_lora"
"""Of the folder and the adapters of the SDXL training."""

# With fewer pictures none is held out: a guess.
_FEW = 4
_SHOWN_CHANGES = ("resolution", *BUCKET_LIMITS, "batch_size", "validation_split", "validation_seed")


@dataclass(frozen=True)
class Request:
    """What an export was asked for. It is kept in sdxl_export.json, so that the export can be repeated with the same wishes."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    base_model: str
    dataset_config: str | None = None
    wishes: SdxlOptions = field(default_factory=SdxlOptions)


def last_request(folder: Path) -> Request | None:
    """The request of the export in `folder`; None where there is no export. Raises UserError for a damaged file."""
    if not (folder / REQUEST).is_file():
        return None
    try:
        return TypeAdapter(Request).validate_json(json.dumps(read_json(folder / REQUEST)))
    except ValidationError:
        raise UserError(
            f"{folder / REQUEST} is damaged. Delete it, and export again with the options that you want."
        ) from None


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        command: starts the training, from the folder in which the export was made.
        training: the training on SDXL.
        changes: `network_dim 32 -> 64`, for each option and dataset value that differs from the study's.
        warnings: about rules that are weak or do not suit this training.
    """

    config: Path
    dataset: Path
    script: Path
    command: str
    training: SdxlTraining
    changes: tuple[str, ...]
    warnings: tuple[str, ...]

    def report(self) -> str:
        """For the terminal."""
        lines = [f"{self.dataset}, {self.config}, {self.script}"]
        lines += [folded(f"  {change}", indent=4) for change in self.changes]
        lines += [folded(f"note: {warning}", indent=6) for warning in self.warnings]
        return "\n".join([*lines, "", self.command])


def export(
    best: BestParams,
    *,
    sdxl_base: str,
    output_dir: Path | str,
    dataset_config: Path | str | None = None,
    wishes: SdxlOptions | None = None,
) -> Exported:
    """Write sdxl_dataset.toml, sdxl_config.toml, sdxl_train.sh and sdxl_export.json (see `Request`) into `output_dir`.

    Files of an earlier export are replaced. Both TOML files are parsed and compared before they are written.

    Args:
        sdxl_base: a file, a folder, a hub id, or tiny-sdxl.
        dataset_config: the study's dataset file, if it has moved since.

    Raises UserError: a study that was not on SD1.5 or not of train_network.py, a base that does not exist or is not SDXL,
    missing data, a wish that the training does not allow.
    """
    folder = Path(output_dir)
    _require_transferable(best)
    require_sdxl(sdxl_base)
    sd15 = find_training(best, dataset_config)
    sdxl = apply_rules(sd15, wishes or SdxlOptions())
    sdxl = sdxl.with_datasets(with_caption_extensions(with_same_ids(dataset)) for dataset in sdxl.datasets)
    options = {
        "pretrained_model_name_or_path": sdxl_base,
        "dataset_config": str(folder / DATASET),
        **for_kohya(sdxl.options),
        **written_options(sdxl),
        "output_dir": str(folder / NAME),
        "output_name": NAME,
    }
    title = f"exported from {best.origin}"
    config, dataset = config_text(options, sd15, title, best.verdict), dataset_text(sdxl.datasets, title)
    read_back(config, dataset, options, sdxl.datasets)
    command = shlex.join(_command(folder / CONFIG))
    write_text(folder / DATASET, dataset)
    write_text(folder / CONFIG, config)
    write_text(folder / SCRIPT, script_text(command, title, folder / NAME))
    request = Request(sdxl_base, None if dataset_config is None else str(dataset_config), wishes or SdxlOptions())
    write_json(folder / REQUEST, asdict(request))
    return Exported(
        folder / CONFIG, folder / DATASET, folder / SCRIPT, command, sdxl, _changes(sd15, sdxl), sdxl.warnings
    )


def find_training(best: BestParams, dataset_config: Path | str | None = None) -> Sd15Training:
    """The best training of a study, with what the rules need to know of its pictures. Reads the headers of all pictures.

    Raises UserError where its options or its data can no longer be used.
    """
    options = trained_options(best, dataset_config)
    from library.data.collect import read_datasets
    from library.data.training_images import collect_images

    datasets = tuple(read_datasets(options, _native_side(options)))
    images = [[image for image in collect_images(dataset).images if not image.subset.is_reg] for dataset in datasets]
    areas = [[image.size[0] * image.size[1] for image in of_dataset] for of_dataset in images]
    pictures = tuple(PictureFacts(len(sizes), float(median(sizes)) if sizes else 0.0) for sizes in areas)
    # A table of parameters is for whatever its data say.
    per_step = (best.lr_reference.effective_batch or None) if dataset_config is not None else None
    return Sd15Training(options, datasets, pictures, best.lr_reference, _validation_share(datasets, images), per_step)


def trained_options(best: BestParams, dataset_config: Path | str | None = None) -> TrainNetworkOptions:
    """The options of the best training. dataset_config: in place of the study's data, which need not be there then.

    Raises UserError where they can no longer be used.
    """
    return network_options_of(best.train_config, best.config_origin, dataset_config)


def _require_transferable(best: BestParams) -> None:
    if best.base_model.family != "sd15":
        raise UserError(
            f"The study {best.study} ran on SDXL ({best.base_model.path}), so its options need no export. Train with the "
            "train_config of its best_params.json."
        )
    if best.script != "train_network":
        raise UserError(
            f"The study {best.study} tuned {best.script}.py. Only studies of train_network.py can be exported to SDXL; "
            "train_repa.py can be tuned on SDXL itself."
        )


def require_sdxl(base: str) -> None:
    """Raises UserError for a base that is there and not SDXL, and for one that is not there and not known to be."""
    from library.models.base_family import family_of
    from library.models.configs import published_family
    from library.models.embedded import TINY_SDXL
    from library.models.locate import base_status, locate_base
    from networks.families import SDXL

    if base == TINY_SDXL:
        return
    missing = base_status(base)
    if missing is None:
        family_of(locate_base(base), allowed=(SDXL,))
    elif published_family(base) != SDXL:
        raise UserError(f"The SDXL base cannot be checked: {missing}")


def _native_side(options: TrainNetworkOptions) -> int:
    """Side in pixels at which the study's base was trained; SD1.5's where the base is not on this machine."""
    from library.models.base_family import native_side
    from library.models.locate import base_status, locate_base
    from networks.families import SD15

    name = options.model.pretrained_model_name_or_path
    return SD15.native_side if base_status(name) else native_side(locate_base(name))


def _validation_share(datasets: tuple[Dataset, ...], images: list[list[TrainingImage]]) -> float | None:
    """See `Sd15Training.validation_share`; None where a data set's own share holds pictures out."""
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
    """With one process: with more, a step would have more pictures than in the study."""
    script, here = PROJECT_ROOT / "train_network.py", Path("train_network.py")
    path = str(here if here.exists() and here.resolve() == script else script)
    return ["python", path, "--config_file", str(config)]


def _changes(sd15: Sd15Training, sdxl: SdxlTraining) -> tuple[str, ...]:
    before = flatten(sd15.options)
    pairs = [(name, "", _shown(before[name]), _shown(new)) for name, new in written_options(sdxl).items()]
    for old, new in zip(sd15.datasets, sdxl.datasets, strict=True):
        names = [name for name in _SHOWN_CHANGES if old.enable_bucket or "bucket" not in name]
        pairs += [(name, f" ({old.name})", _shown(getattr(old, name)), _shown(getattr(new, name))) for name in names]
    return tuple(f"{name} {was} -> {now}{where}" for name, where, was, now in pairs if was != now)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
