"""Keeps a folder's runs comparable: what they are made with is noted in it, and another run is refused. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import file_hash, read_json, write_json
from library.models.locate import DINOV2, locate_base, locate_dino, weight_files
from tools.alignment_study.arms import RECIPES, Arm
from tools.alignment_study.commands import train_command
from tools.alignment_study.own_data import listing
from tools.alignment_study.settings import STUDIES, Folders, Run, Settings


def claim_folder(folders: Folders, settings: Settings, prepare: Callable[[], object] = lambda: None) -> None:
    """Note in the folder what its runs are made with. Raises UserError where it holds runs that were made otherwise.

    prepare: makes what the runs begin with, if it is not there; called when all but its weights agrees. Where it refuses to, and
    has made no pictures yet, the folder is left to others.
    """
    file = folders.out / "settings.json"
    commands = {
        study: train_command(Run(study, Arm("", 1.0), 1), settings, Folders(Path("out")))[1:] for study in STUDIES
    }
    recipes = {recipe: Arm(recipe, 1.0).words(settings.steps) for recipe in RECIPES}
    pictures = {
        "pictures of the classes": listing(settings.class_data),
        "pictures of the concept": listing(settings.concept_data, captions=True),
    }
    wanted = {**asdict(settings), **pictures, "commands": commands, "recipes": recipes}
    there = read_json(file) if file.exists() else {}
    _refuse_others(folders, there, wanted)
    if not there:
        write_json(file, wanted)
    try:
        prepare()
    except UserError:
        if not there and not any(folders.pictures(study).exists() for study in STUDIES):
            file.unlink()
        raise
    weights = {"weights": _weights(settings)}
    _refuse_others(folders, there, weights)
    write_json(file, wanted | weights)


def _refuse_others(folders: Folders, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """A setting that was not known yet when the folder was claimed had its default."""
    noted = {**asdict(Settings()), **there} if there else {}
    changed = [name for name in wanted if name in noted and _differs(noted[name], wanted[name])]
    if changed:
        named = [name for name in changed if name not in ("commands", "recipes")]
        said = [f"{name} {noted[name]!s:.40} is now {wanted[name]!s:.40}" for name in named]
        raise UserError(
            f"{folders.out} holds runs made otherwise: {', '.join(said) or 'the commands that train are others now'}. "
            "Name another --out, move it away, or go back to its settings."
        )


def _differs(noted: Any, wanted: Any) -> bool:
    """A study or a recipe that was not known yet when the folder was claimed changes none of its runs."""
    if isinstance(noted, Mapping) and isinstance(wanted, Mapping):
        return any(noted[name] != wanted.get(name) for name in noted)
    return bool(noted != wanted)


def _weights(settings: Settings) -> str:
    """Of base and teacher: trained anew, they make other numbers."""
    base, teacher = locate_base(settings.base), locate_dino(settings.teacher)
    files = (
        [base.path]
        if base.is_file
        else [file for part in ("unet", "vae", "text_encoder") for file in weight_files(base.path, part)]
    )
    files += [teacher.path] if teacher.is_file else weight_files(teacher.path, DINOV2)
    return " ".join(file_hash(file)[:8] for file in files)
