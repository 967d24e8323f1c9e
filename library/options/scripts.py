"""Options of the training script that a study tunes, by the script's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from library.errors import UserError
from library.options.network import TrainNetworkOptions, parse_network_options
from library.options.parser import fields_of, flatten
from library.options.repa import TrainRepaOptions, parse_repa_options
from library.options.search import Script
from library.options.toml_file import toml_table

Options = TypeVar("Options")

# These belong to one run or to the file itself.
_NOT_CHECKED = frozenset({"config_file", "output_config", "dry_run", "report", "resume"})
_DATA_OPTIONS = frozenset({"train_data_dir", "reg_data_dir", "in_json", "dataset_repeats", "conditioning_data_dir"})


def option_types(script: Script) -> dict[str, Any]:
    """Name -> type of every option of the script."""
    return fields_of(_options_class(script))


def option_default(script: Script, name: str) -> Any:
    """The value that the script takes for an option that is not given."""
    return flatten(_options_class(script)())[name]


def _options_class(script: Script) -> type[TrainNetworkOptions] | type[TrainRepaOptions]:
    return TrainNetworkOptions if script == "train_network" else TrainRepaOptions


def network_options_of(
    values: Mapping[str, Any], where: str = "", dataset_config: Path | str | None = None
) -> TrainNetworkOptions:
    """Flat values, as a study stores them, as checked options of train_network.py.

    Args:
        where: what the values are, to begin the sentence of a UserError with.
        dataset_config: used in place of the data that the values name.

    Raises UserError for what the script refuses.
    """
    dropped = _NOT_CHECKED
    if dataset_config is not None:
        dropped |= _DATA_OPTIONS
        values = {**values, "dataset_config": str(dataset_config)}
    return _checked(
        lambda file: parse_network_options(["--config_file", file], prog="train_network.py", description=None),
        {name: value for name, value in values.items() if name not in dropped},
        where,
    )


def repa_options_of(values: Mapping[str, Any], where: str = "") -> TrainRepaOptions:
    """Flat values as checked options of train_repa.py, whose dataset_config is the file of options itself. See above."""
    checked = _checked(
        lambda file: parse_repa_options(["--dataset_config", file], prog="train_repa.py", description=None),
        {name: value for name, value in values.items() if name not in _NOT_CHECKED | {"dataset_config"}},
        where,
    )
    # The file that they were read from is gone.
    return replace(checked, config=replace(checked.config, dataset_config=None))


def _checked(parse_file: Callable[[str], Options], values: Mapping[str, Any], where: str) -> Options:
    given = {name: value for name, value in values.items() if value is not None}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train_config.toml"
        path.write_text("\n".join(toml_table("", given)), encoding="utf-8")
        try:
            return parse_file(str(path))
        except UserError as error:
            # The file is gone with the folder.
            said = re.sub(rf" (\(|in ){path.name}(, line \d+)?\)?", "", str(error))
            raise UserError(f"{where}: {said}" if where else said) from None
