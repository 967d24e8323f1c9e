"""The contact sheet of a study: what the five best draw, beside the base, with the same prompts and seeds.

generate.py draws it in a process of its own, so that the study's process never loads a model.
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

if TYPE_CHECKING:
    from library.search.results.status import Look

FOLDER, INDEX = "contact_sheet", "pictures.json"
PROMPTS, SEED = 2, 42
STEPS = 20
SECONDS = 1800  # of all pictures, also on a slow machine


def draw_best(look: Look, folder: Path, base: str, *, steps: int = STEPS) -> None:
    """Draw the sheet into folder/contact_sheet, and give optuna-dashboard its rows.

    Raises UserError where there is nothing to draw with, RunFailed where drawing failed or took too long.
    """
    trials = [one.trial for one in look.verdict.candidates[:5] if _adapter(folder, one.trial).is_file()]
    prompts = _prompts(_adapter(folder, trials[0])) if trials else []
    if not prompts:
        raise UserError("the adapters of the best are gone, or name no caption to draw.")
    out = folder / FOLDER
    lines: list[str] = []
    index: list[dict[str, str]] = []
    for prompt in prompts:
        for trial in (None, *trials):
            name = "base" if trial is None else f"trial {trial}"
            # As generate.py names them: the line's number, and the seed where there are several.
            index.append({"file": f"sheet_{len(lines):02d}_{SEED}.png", "caption": f"{name}, {prompt}"})
            lines.append(f"{prompt}{'' if trial is None else f' <lora:lora_trial_{trial}:1>'} --d {SEED}")
    write_text(out / "prompts.txt", "".join(f"{line}\n" for line in lines))
    words = ["--prompt_file", str(out / "prompts.txt"), "--steps", str(steps), "--output", str(out / "sheet.png")]
    words += [
        "--pretrained_model_name_or_path",
        base,
        "--lora_dir",
        *(str(_adapter(folder, one).parent) for one in trials),
    ]
    _generate(words)
    write_text(out / INDEX, json.dumps(index, indent=1))
    rows: dict[str, list[Path]] = {}
    for path, caption in sheet_pictures(folder):
        rows.setdefault(caption.partition(",")[0], []).append(path)
    attach_rows(look.study, rows, folder, StudyLog(folder))


def _generate(words: list[str]) -> None:
    command = [sys.executable, str(PROJECT_ROOT / "generate.py"), *words]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"generate.py drew for more than {SECONDS // 60} minutes and was stopped.") from None
    except OSError as error:
        raise RunFailed(f"generate.py could not be started: {error.strerror or error}.") from None
    if done.returncode != 0:
        raise RunFailed(f"generate.py said: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}")


def _adapter(folder: Path, trial: int) -> Path:
    return folder / f"trial_{trial:04d}" / f"lora_trial_{trial}.safetensors"


def _prompts(adapter: Path) -> list[str]:
    """Captions that the adapter was trained with, from its metadata."""
    from safetensors import SafetensorError, safe_open

    from library.evaluation.prompts import plain_text, trained_captions

    try:
        with safe_open(adapter, "numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{adapter} cannot be read: {error}.") from None
    return [plain_text(one) for one in trained_captions(metadata)[:PROMPTS]]


def sheet_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of the sheet with captions, row by row; none where it was not drawn."""
    index = folder / FOLDER / INDEX
    if not index.is_file():
        return []
    found = [(folder / FOLDER / one["file"], str(one["caption"])) for one in read_json(index)]
    return [(path, caption) for path, caption in found if path.is_file()]
