"""The files of an export as text, and a check that train_network.py reads the intended values from them."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from library.data.caption_files import CaptionFolders, names_in
from library.data.dataset_config import ID_PREFIX, as_written, read_dataset_config
from library.data.dataset_schema import SUBSET_KEYS, SUBSET_ONLY, Dataset, Subset
from library.data.training_images import DEFAULT_EXTENSION
from library.options.alignment import AlignmentOptions
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import fields_of, flatten
from library.options.toml_file import as_toml, toml_table
from library.search.to_sdxl.trainings import Sd15Training

# Written with each subset, although a file may give them for all.
_OF_ONE_SUBSET = SUBSET_ONLY | {"num_repeats", "class_tokens", "custom_attributes"}
BUCKET_LIMITS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")


# Where kohya's script has no default, or another one, which would be taken there for what is not written.
_DEFAULTS_OF_ITS_OWN = ("network_module", "seed", "sdpa")
_NOT_OF_KOHYA = frozenset(fields_of(AlignmentOptions)) | frozenset(
    """
    adam_beta1 adam_beta2 adam_epsilon
    align_learning_rate align_max_grad_norm align_weight_decay allow_changed_options cache_dir channels_last compile
    deterministic device dino_model dry_run early_stop ema_decay ignore_unknown_keys log_every_n_steps masked_loss_renormalize
    missing_caption objective overwrite save_last_n_states sdxl weight_decay
    base_quantization blocks_to_swap report text_fusion text_fusion_encoders
    discrete_flow_shift flow_base_pixels flow_loss_weight flow_mode flow_model flow_recipe flow_shift_by_resolution flow_sigma_max
    any_teacher flow_kd_cfg flow_target teacher_latents train_parts train_parts_lr
    flow_sigma_min logit_mean logit_std mode_scale show_timesteps sigmoid_scale timestep_sampling weighting_scheme
    timestep_bin_correct timestep_bin_file timestep_bin_floor timestep_bin_jitter timestep_bin_min_acc timestep_bin_power
    timestep_bin_source timestep_bins
    """.split()  # noqa: SIM905
)
"""train_network.py's options that kohya's script would ignore without a word; tests hold them against its table."""


def for_kohya(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the training that kohya's script needs to be told, although they are train_network.py's defaults."""
    defaults = flatten(TrainNetworkOptions())
    return {name: options.get(name, defaults[name]) for name in _DEFAULTS_OF_ITS_OWN}


def _kohya_comment(options: Mapping[str, Any], sd15: Sd15Training) -> str:
    unknown = [name for name in options if name in _NOT_OF_KOHYA]
    kind = sd15.options.network.args.kind
    unknown += [] if kind.algo == "lora" else [f"network_args algo={kind.algo} (it would train a LoRA)"]
    words = "# kohya's sdxl_train_network.py takes this file too"
    return f"{words}, but ignores {', '.join(unknown)}." if unknown else f"{words}."


def config_text(options: Mapping[str, Any], sd15: Sd15Training, title: str, verdict: str = "") -> str:
    """A --config_file with `options` in the sections of their groups, and the study's value beside each that has changed.

    verdict: the study's conclusion, for a comment.
    """
    before = flatten(sd15.options)
    lines = [f"# SDXL, {title}. Options that are not here have train_network.py's default."]
    lines.append(_kohya_comment(options, sd15))
    lines += [f"# {' '.join(verdict.split())}"] if verdict else []
    groups = TrainNetworkOptions()
    for group in dataclasses.fields(groups):
        fields = dataclasses.fields(getattr(groups, group.name))
        names = [field.name for field in fields if field.name in options]
        lines += ["", f"[{group.name}]"] if names else []
        for name in names:
            line, was = f"{name} = {as_toml(options[name])}", before[name]
            lines.append(
                f"{line}  # {as_toml(was)} on SD1.5" if _is_worth_a_comment(name, was, options[name]) else line
            )
    return "\n".join(lines) + "\n"


def _is_worth_a_comment(name: str, was: Any, now: Any) -> bool:
    is_about_the_run = name in ("pretrained_model_name_or_path", "dataset_config", "output_dir", "output_name")
    return was not in (None, [], now) and not is_about_the_run


def dataset_text(datasets: Sequence[Dataset], title: str) -> str:
    """A --dataset_config with these datasets. Values that all subsets share are in [general]."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    tables = [_subset_values(subset) for subset in subsets]
    shared = {
        key: value
        for key, value in tables[0].items()
        if key not in _OF_ONE_SUBSET and all(table.get(key) == value for table in tables)
    }
    lines = [
        f"# Pictures for SDXL, {title}.",
        "# Relative paths start in the folder in which the training is started.",
        "",
    ]
    lines += toml_table("[general]", shared) if shared else []
    for dataset in datasets:
        lines += toml_table("[[datasets]]", _dataset_values(dataset))
        for subset in dataset.subsets:
            own = {key: value for key, value in _subset_values(subset).items() if key not in shared}
            lines += toml_table("[[datasets.subsets]]", own)
    return "\n".join(lines)


def _dataset_values(dataset: Dataset) -> dict[str, Any]:
    width, height = dataset.resolution
    values: dict[str, Any] = {
        "resolution": width if width == height else [width, height],
        "batch_size": dataset.batch_size,
        "enable_bucket": dataset.enable_bucket,
    }
    if dataset.enable_bucket:
        values |= {name: getattr(dataset, name) for name in BUCKET_LIMITS}
    defaults = Dataset(dataset.resolution)
    for name in ("network_multiplier", "validation_split", "validation_seed", "resize_interpolation"):
        if (value := getattr(dataset, name)) != getattr(defaults, name):
            values[name] = value
    return values


def _subset_values(subset: Subset) -> dict[str, Any]:
    """Values that differ from the defaults, in the order of the fields."""
    defaults = Subset()
    names = [field.name for field in dataclasses.fields(Subset) if field.name in SUBSET_KEYS]
    values = {name: getattr(subset, name) for name in names if getattr(subset, name) != getattr(defaults, name)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def with_same_ids(dataset: Dataset) -> Dataset:
    """The dataset with id prefixes, so that its pictures keep their ids, by which they are held out, when another file names it."""

    def named(subset: Subset) -> Subset:
        path = subset.image_dir or subset.metadata_file
        assert path is not None
        attributes = {name: value for name, value in subset.custom_attributes.items() if name != ID_PREFIX}
        if subset.name != as_written(path):
            attributes[ID_PREFIX] = subset.name
        return dataclasses.replace(subset, custom_attributes=attributes)

    return dataclasses.replace(dataset, subsets=tuple(map(named, dataset.subsets)))


def script_text(command: str, title: str, train_dir: Path) -> str:
    """A shell script that runs the command in the folder of the export, with any options given to the script."""
    best = shlex.join(["python", "-m", "library.training.best_adapter", str(train_dir)])
    return (
        f"#!/bin/sh\n# SDXL, {title}. Options can be added: sh sdxl_train.sh --dry_run\n"
        f"# With N processes instead of 1, divide gradient_accumulation_steps by N. Afterwards: {best}\n"
        f'cd {shlex.quote(os.getcwd())} && {command} "$@"\n'
    )


def with_caption_extensions(dataset: Dataset) -> Dataset:
    """The dataset with `.txt` named where captions are found under that ending, which kohya's script only looks for when told."""

    def named(subset: Subset) -> Subset:
        if (
            subset.image_dir is None
            or subset.metadata_file is not None
            or subset.caption_extension != DEFAULT_EXTENSION
        ):
            return subset
        folders = CaptionFolders(subset.image_dir)
        stems = [Path(name).stem for name in names_in(subset.image_dir) if Path(name).suffix != ".txt"]
        endings = {
            ending for ending in (DEFAULT_EXTENSION, ".txt") if any(folders.find(stem, ending) for stem in stems)
        }
        return dataclasses.replace(subset, caption_extension=".txt") if endings == {".txt"} else subset

    return dataclasses.replace(dataset, subsets=tuple(map(named, dataset.subsets)))


def read_back(config: str, dataset: str, options: Mapping[str, Any], datasets: Sequence[Dataset]) -> None:
    """Read both texts as train_network.py will. Raises UserError where it would refuse them.

    Raises RuntimeError where it would read other values than intended, which is a defect of this module.
    """
    with TemporaryDirectory() as folder:
        config_file, dataset_file = Path(folder) / "sdxl_config.toml", Path(folder) / "sdxl_dataset.toml"
        config_file.write_text(config, encoding="utf-8")
        dataset_file.write_text(dataset, encoding="utf-8")
        parsed = parse_network_options(["--config_file", str(config_file)], prog="train_network.py", description=None)
        found = read_dataset_config(dataset_file, parsed.dataset_defaults())
    values = flatten(parsed)
    other = {name: values[name] for name, value in options.items() if values[name] != value}
    if other or list(map(_comparable, found)) != list(map(_comparable, datasets)):
        raise RuntimeError(f"the exported files do not have the intended values: {other or found}")


def _comparable(dataset: Dataset) -> Dataset:
    """The dataset without its name and notes, and without limits of buckets where buckets are off. Subsets keep their names."""
    kept = dataclasses.replace(dataset, name="", notes=())
    without: dict[str, Any] = dict.fromkeys(BUCKET_LIMITS, 0)
    return kept if kept.enable_bucket else dataclasses.replace(kept, **without)
