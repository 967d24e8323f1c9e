"""Whether a captioning model will do, as far as names and files tell: nothing is fetched, and torch is not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from library.errors import UserError
from library.models.locate import is_hub_id

DESCRIBER = "Salesforce/blip-image-captioning-large"
TAGGER = "SmilingWolf/wd-vit-tagger-v3"
MODEL, TAGS = "model.onnx", "selected_tags.csv"
"""The files of a tagger."""


def check_describer(name: str) -> None:
    """Raises UserError for what is neither a folder of a model of transformers nor a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise no_describer(name, "it has no config.json.")
    elif folder.exists() or not is_hub_id(name):
        raise no_describer(name, "it is neither a folder nor a hub id.")


def no_describer(name: str, reason: str) -> UserError:
    return UserError(
        f"model {name} cannot be used: {reason} Give a hub id or a folder of an image-to-text model of transformers with its "
        f"processor, such as {DESCRIBER}."
    )


def check_tagger(name: str) -> None:
    """Raises UserError where onnxruntime is not installed, and for what is neither a folder of a tagger nor a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if absent := [file for file in (MODEL, TAGS) if not (folder / file).is_file()]:
            raise UserError(
                f"tagger {name} has no {' and no '.join(absent)}: a WD tagger is both files, such as {TAGGER}."
            )
    elif folder.exists() or not is_hub_id(name):
        raise UserError(f"tagger {name} is neither a folder nor a hub id. Give one such as {TAGGER}.")
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("tagger needs onnxruntime: pip install '.[tagger]' (or onnxruntime-gpu).")
