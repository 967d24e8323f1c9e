"""The files of an export as text, and proof that they are read as they were meant."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from library.data.dataset_config import ID_PREFIX, as_written, read_dataset_config
from library.data.dataset_schema import SUBSET_KEYS, SUBSET_ONLY, Dataset, Subset
from library.errors import UserError
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import flatten
from library.search.to_sdxl.trainings import Found

# A subset's own, though a file may give them for all.
_OF_ONE_SUBSET = SUBSET_ONLY | {"num_repeats", "class_tokens", "custom_attributes"}
_BUCKET_LIMITS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")


def options_of(train_config: Mapping[str, Any], dataset_config: Path | str | None, where: str) -> TrainNetworkOptions:
    """Flat options, as a study stores them, checked as if they came from a file.

    dataset_config: takes the place of whatever data they name. where: for the sentence of a UserError.
    """
    dropped = {"config_file", "output_config", "dry_run", "resume"}
    if dataset_config is not None:
        dropped |= {"train_data_dir", "reg_data_dir", "in_json", "dataset_repeats"}
        train_config = {**train_config, "dataset_config": str(dataset_config)}
    values = {name: value for name, value in train_config.items() if value is not None and name not in dropped}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train_config.toml"
        path.write_text("\n".join(_table("", values)), encoding="utf-8")
        try:
            return _parsed(path)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def config_text(options: Mapping[str, Any], found: Found, title: str, verdict: str = "") -> str:
    """A --config_file with `options` in the sections of their groups, and the study's value beside what has changed.

    verdict: what the study says of the trial, for a comment.
    """
    before = flatten(found.options)
    lines = [f"# SDXL, {title}. What is not here has train_network.py's default."]
    lines += [f"# {' '.join(verdict.split())}"] if verdict else []
    groups = TrainNetworkOptions()
    for group in dataclasses.fields(groups):
        names = [one.name for one in dataclasses.fields(getattr(groups, group.name)) if one.name in options]
        lines += ["", f"[{group.name}]"] if names else []
        for name in names:
            line, was = f"{name} = {_as_toml(options[name])}", before[name]
            lines.append(f"{line}  # {_as_toml(was)} on SD1.5" if _tells(name, was, options[name]) else line)
    return "\n".join(lines) + "\n"


def _tells(name: str, was: Any, now: Any) -> bool:
    """Whether the study's value is worth a comment."""
    is_about_the_run = name in ("pretrained_model_name_or_path", "dataset_config", "output_dir", "output_name")
    return was not in (None, [], now) and not is_about_the_run


def _as_toml(value: Any) -> str:
    """One value. Texts as JSON writes them, which TOML reads."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _table(heading: str, values: Mapping[str, Any]) -> list[str]:
    return [heading, *(f"{key} = {_as_toml(value)}" for key, value in values.items()), ""]


def dataset_text(datasets: Sequence[Dataset], title: str) -> str:
    """A --dataset_config that says the same. What all subsets share is in [general]."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    tables = [_subset_values(subset) for subset in subsets]
    shared = {
        key: value
        for key, value in tables[0].items()
        if key not in _OF_ONE_SUBSET and all(table.get(key) == value for table in tables)
    }
    lines = [
        f"# Pictures for SDXL, {title}.",
        "# Relative paths begin in the folder that the training is started in.",
        "",
    ]
    lines += _table("[general]", shared) if shared else []
    for dataset in datasets:
        lines += _table("[[datasets]]", _dataset_values(dataset))
        for subset in dataset.subsets:
            own = {key: value for key, value in _subset_values(subset).items() if key not in shared}
            lines += _table("[[datasets.subsets]]", own)
    return "\n".join(lines)


def _dataset_values(dataset: Dataset) -> dict[str, Any]:
    width, height = dataset.resolution
    values: dict[str, Any] = {
        "resolution": width if width == height else [width, height],
        "batch_size": dataset.batch_size,
        "enable_bucket": dataset.enable_bucket,
    }
    if dataset.enable_bucket:
        values |= {name: getattr(dataset, name) for name in _BUCKET_LIMITS}
    defaults = Dataset(dataset.resolution)
    for name in ("network_multiplier", "validation_split", "validation_seed", "resize_interpolation"):
        if (value := getattr(dataset, name)) != getattr(defaults, name):
            values[name] = value
    return values


def _subset_values(subset: Subset) -> dict[str, Any]:
    """What differs from the defaults, in the order of the fields."""
    defaults = Subset()
    values = {
        one.name: getattr(subset, one.name)
        for one in dataclasses.fields(Subset)
        if one.name in SUBSET_KEYS and getattr(subset, one.name) != getattr(defaults, one.name)
    }
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def with_same_ids(dataset: Dataset) -> Dataset:
    """The dataset such that its pictures keep their ids, by which they are held out, when it is read from another file."""

    def named(subset: Subset) -> Subset:
        path = subset.image_dir or subset.metadata_file
        assert path is not None
        attributes = {name: value for name, value in subset.custom_attributes.items() if name != ID_PREFIX}
        if subset.name != as_written(path):
            attributes[ID_PREFIX] = subset.name
        return dataclasses.replace(subset, custom_attributes=attributes)

    return dataclasses.replace(dataset, subsets=tuple(map(named, dataset.subsets)))


def script_text(command: str, title: str, train_dir: Path) -> str:
    """A shell script that runs the line where it was made; options given to it are handed on."""
    best = shlex.join(["python", "-m", "library.training.best_adapter", str(train_dir)])
    return (
        f"#!/bin/sh\n# SDXL, {title}. More options go behind it: sh sdxl_train.sh --dry_run\n"
        f"# With N processes instead of 1, divide gradient_accumulation_steps by N. Afterwards: {best}\n"
        f'cd {shlex.quote(os.getcwd())} && {command} "$@"\n'
    )


def read_back(config: str, dataset: str, options: Mapping[str, Any], datasets: Sequence[Dataset]) -> None:
    """Read both texts as train_network.py will. Raises UserError where it would refuse them.

    That it reads other values than were meant is a defect of this module: RuntimeError.
    """
    with TemporaryDirectory() as folder:
        config_file, dataset_file = Path(folder) / "sdxl_config.toml", Path(folder) / "sdxl_dataset.toml"
        config_file.write_text(config, encoding="utf-8")
        dataset_file.write_text(dataset, encoding="utf-8")
        parsed = _parsed(config_file)
        found = read_dataset_config(dataset_file, parsed.dataset_defaults())
    values = flatten(parsed)
    other = {name: values[name] for name, value in options.items() if values[name] != value}
    if other or list(map(_comparable, found)) != list(map(_comparable, datasets)):
        raise RuntimeError(f"the exported files do not say what was meant: {other or found}")


def _comparable(dataset: Dataset) -> Dataset:
    """Without names and notes, and limits of buckets that there are not. Subsets keep theirs, of which ids are made."""
    kept = dataclasses.replace(dataset, name="", notes=())
    without: dict[str, Any] = dict.fromkeys(_BUCKET_LIMITS, 0)
    return kept if kept.enable_bucket else dataclasses.replace(kept, **without)


def _parsed(path: Path) -> TrainNetworkOptions:
    return parse_network_options(["--config_file", str(path)], prog="train_network.py", description=None)
