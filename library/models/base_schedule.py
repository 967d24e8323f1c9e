"""The noise schedule that a base's files say it was trained on, judged before anything is loaded. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_json
from library.models.header import read_metadata, read_shapes
from networks.prediction_names import FLOW_NAME, name_by_metadata, schedule_of, type_in_file

_FILE, _INDEX = "scheduler/scheduler_config.json", "model_index.json"


def folder_scheduler_config(folder: Path) -> dict[str, Any]:
    """scheduler_config.json of a diffusers folder; the class that its index names, where the file says none."""
    config = read_json(folder / _FILE)
    if not isinstance(config, dict):
        raise UserError(f"{folder / _FILE} is no configuration: it holds no names and values.")
    if config.get("_class_name") is None and (folder / _INDEX).is_file():
        named = (read_json(folder / _INDEX).get("scheduler") or [None, None])[1]
        return config | ({} if named is None else {"_class_name": named})
    return config


def check_schedule(path: Path) -> None:
    """Raise UserError, with its name, where a folder or single file says of a schedule that this program does not have."""
    if path.is_file():
        said: dict[str, Any] = {
            "prediction_type": type_in_file(read_shapes(path), read_metadata(path)),
            "beta_start": None,
        }
        where = str(path)
    elif (path / _FILE).is_file():
        said, where = folder_scheduler_config(path), f"The scheduler of {path}"
    else:
        return  # whoever needs it says so
    if isinstance(found := schedule_of(said), str):
        raise UserError(f"{where} {found}")


def require_kind(adapter: str, metadata: Mapping[str, str], base: str, is_flow: bool, remedy: str) -> None:
    """Raise UserError where an adapter's file says that its base was a flow model and this one is none, or the other way round.

    A file that says nothing fits both. remedy: the option that says that the base is a flow model; given, nobody asks here.
    """
    trained = name_by_metadata(metadata) is FLOW_NAME
    if trained and not is_flow:
        raise UserError(
            f"{adapter} was trained on a flow model, and {base} is none by its files: its pictures would be noise. If it is one "
            f"all the same, say {remedy}."
        )
    said = metadata.get("modelspec.prediction_type")
    if is_flow and not trained and said:
        raise UserError(
            f"{adapter} was trained on a base that predicts {said}, and {base} is a flow model: its pictures would be noise. If "
            f"its file is wrong, as those of forks of kohya's scripts can be, say {remedy}."
        )
