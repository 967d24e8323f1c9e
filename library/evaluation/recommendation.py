"""Writes the weight at which an adapter is to be used into its file, and beside it what the managers of A1111 and ComfyUI show.

NAME.safetensors gets `ss_recommended_weight` in its metadata. NAME.json gets "preferred weight", "activation text" and "sd version"
(A1111's extensions-builtin/Lora/ui_edit_user_metadata.py), NAME.png is the preview.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from library.errors import UserError
from library.evaluation.generated_pictures import AppliedAdapter, with_adapter
from library.evaluation.generation import GenerationPlan
from library.evaluation.generation_result import GenerationResult
from library.evaluation.prompt_sets import words_of
from library.files import read_json, require_writable, whole_file, write_json
from library.inference.infotext import Infotext, save_png
from library.inference.picture_infotext import infotext_of, model_name
from library.models.tensor_files import NewTensor, TensorFile, write_tensor_file
from networks.families import Family

WEIGHT_KEY = "ss_recommended_weight"
SD_VERSIONS = {"sd15": "SD1", "sdxl": "SDXL"}
"""By the keys of families, as A1111 calls them."""
OUR_VERSION = "Version: repa-scripts"


@dataclass(frozen=True)
class Card:
    """What is written of an adapter. preview: with its parameters text; None where the subject was not drawn."""

    weight: float
    activation: str
    family: Family
    preview: tuple[Image.Image, Infotext] | None


def check_recommendation(adapter: Path) -> None:
    """Raise UserError where `write_card` could not write; before anything slow."""
    if adapter.is_dir():
        raise UserError(
            f"--write writes into an adapter file, and {adapter} is a training state. Name the adapter, or leave --write out."
        )
    require_writable(adapter.parent)
    read_card(adapter)


def read_card(adapter: Path) -> dict[str, Any]:
    """The .json beside an adapter; empty where there is none. Raises UserError for one that is no card."""
    path = adapter.with_suffix(".json")
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is not the card of an adapter: it holds no fields. Move it away, or leave --write out."
        )
    return found


def write_recommendation(plan: GenerationPlan, result: GenerationResult, say: Callable[[str], None]) -> None:
    """The weight that was found, into the adapter that it is for. Where none is recommended, that is said."""
    strength = result.strength
    assert strength is not None
    if (weight := strength.recommended) is None:
        say(f"Nothing was written into {strength.checkpoint}: no weight is recommended.")
        return
    path = next(candidate.path for candidate in plan.candidates if candidate.name == strength.checkpoint)
    adapter, preview, activation = plan.adapters[strength.checkpoint], None, ""
    if plan.subject is not None:
        request = with_adapter(plan.subject.requests[0], AppliedAdapter(path, adapter, weight))
        picture = strength.swept.drawn[f"{weight:g}"].subject[0]
        preview = picture, infotext_of(request, plan.subject.seeds[0], model_name(plan.base))
        activation = words_of(plan.subject.requests[0])
    write_card(path, Card(weight, activation, adapter.family, preview), say)


def write_card(adapter: Path, card: Card, say: Callable[[str], None]) -> None:
    """Each file whole or not at all. Fields that a person wrote stay, but for the weight; so does a preview that is not ours."""
    known = read_card(adapter)
    file = TensorFile(adapter)
    tensors = [NewTensor(name, at.dtype, at.shape, (at,)) for name, at in file.tensors.items()]
    with whole_file(adapter) as temporary:
        write_tensor_file(temporary, tensors, {**file.metadata, WEIGHT_KEY: f"{card.weight:g}"})
        times = adapter.stat()
        os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))  # checkpoints are put in order by them
    path = adapter.with_suffix(".json")
    defaults = {"activation text": card.activation, "sd version": SD_VERSIONS.get(card.family.key, "Unknown")}
    kept = {name: value for name, value in known.items() if value}
    write_json(path, {**known, **defaults, **kept, "preferred weight": card.weight})
    say(f"wrote the weight {card.weight:g} into {adapter} and {path}")
    if card.preview is None:
        return
    path = adapter.with_suffix(".png")
    if path.exists() and not _is_ours(path):
        say(f"kept {path}, a preview that was there before")
        return
    picture, info = card.preview
    save_png(picture, path, info)
    say(f"wrote {path}, the preview")


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return OUR_VERSION in str(picture.info.get("parameters", ""))
    except OSError:
        return False
