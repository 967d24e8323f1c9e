"""The contact sheet of a study: pictures of the base and of the five best trials, with the same prompts and seeds.

generate.py draws them in another process, so that the study's process never loads a model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import RunFailed, UserError
from library.files import read_json, write_text
from library.options.toml_file import PROJECT_ROOT
from library.search.results.dashboard import attach_rows
from library.search.study.progress import StudyLog
from library.search.trial_files import adapter_file, adapter_name, trial_folder

if TYPE_CHECKING:
    from library.search.results.status import StudyView

FOLDER, INDEX = "contact_sheet", "pictures.json"
PROMPTS, SEED = 2, 42
STEPS = 20
TIME_LIMIT = 1800
"""Seconds for all pictures, enough for a slow machine."""


def draw_best(view: StudyView, folder: Path, base: str, *, steps: int = STEPS) -> None:
    """Draw the sheet into folder/contact_sheet and attach its rows to the study for optuna-dashboard. folder: of the study.

    Raises UserError where adapters or prompts are missing, RunFailed where drawing failed or took too long.
    """
    best = [candidate.trial for candidate in view.verdict.candidates[:5]]
    adapters = {trial: adapter_file(trial_folder(folder, trial), trial) for trial in best}
    adapters = {trial: file for trial, file in adapters.items() if file.is_file()}
    prompts = _prompts(next(iter(adapters.values()))) if adapters else []
    if not prompts:
        raise UserError("the adapters of the best trials are not there, or have no captions in their metadata.")
    out = folder / FOLDER
    lines: list[str] = []
    index: list[dict[str, str]] = []
    for prompt in prompts:
        for trial in (None, *adapters):
            name = "base" if trial is None else f"trial {trial}"
            # generate.py names pictures by the number of their line and, where there are several, their seed.
            index.append({"file": f"sheet_{len(lines):02d}_{SEED}.png", "caption": f"{name}, {prompt}"})
            lines.append(f"{prompt}{'' if trial is None else f' <lora:{adapter_name(trial)}:1>'} --d {SEED}")
    write_text(out / "prompts.txt", "".join(f"{line}\n" for line in lines))
    words = ["--prompt_file", str(out / "prompts.txt"), "--steps", str(steps), "--output", str(out / "sheet.png")]
    words += ["--pretrained_model_name_or_path", base, "--lora_dir", *(str(file.parent) for file in adapters.values())]
    _generate(words)
    write_text(out / INDEX, json.dumps(index, indent=1))
    rows: dict[str, list[Path]] = {}
    for path, caption in sheet_pictures(folder):
        rows.setdefault(caption.partition(",")[0], []).append(path)
    attach_rows(view.study, rows, folder, StudyLog(folder))


def _generate(words: list[str]) -> None:
    command = [sys.executable, str(PROJECT_ROOT / "generate.py"), *words]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"generate.py took more than {TIME_LIMIT // 60} minutes and was stopped.") from None
    except OSError as error:
        raise RunFailed(f"generate.py could not be started: {error.strerror or error}.") from None
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"generate.py failed: {last_line.removeprefix('error: ')}")


def _prompts(adapter: Path) -> list[str]:
    """Captions that the adapter was trained with, from its metadata."""
    from safetensors import SafetensorError, safe_open

    from library.evaluation.prompt_sets import plain_text, trained_captions

    try:
        with safe_open(adapter, "numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{adapter} cannot be read: {error}.") from None
    return [plain_text(caption) for caption in trained_captions(metadata)[:PROMPTS]]


def sheet_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of the sheet with their captions, row by row; none where it was not drawn."""
    index = folder / FOLDER / INDEX
    if not index.is_file():
        return []
    found = [(folder / FOLDER / entry["file"], str(entry["caption"])) for entry in read_json(index)]
    return [(path, caption) for path, caption in found if path.is_file()]
