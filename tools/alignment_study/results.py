"""Everything that was found, as plain data: measures what was not measured, then compares the arms of each study."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from library.device import choose_device
from library.evaluation.picture_encoders import ClipPictures, DinoPictures
from library.files import read_json
from tools.alignment_study import measure
from tools.alignment_study.arms import WITHOUT
from tools.alignment_study.commands import plan_of
from tools.alignment_study.compare import compare, with_numbers
from tools.alignment_study.figures import write_figures
from tools.alignment_study.reader import trained_reader
from tools.alignment_study.settings import SCRATCH, Folders, Run, Settings, in_order
from tools.alignment_study.subjects import subject_of
from tools.alignment_study.training import seconds_file


def measure_all(runs: Sequence[Run], settings: Settings, folders: Folders, images: Path) -> dict[str, Any]:
    """The results; their figures are written into `images`."""
    device, facts = choose_device(None), dict[str, str]()
    clip, reader = None, None
    if not settings.own_pictures:
        print("reader     the classifier that reads shape and colour", flush=True)
        reader, right = trained_reader(folders.out / "reader.pt", settings.reader_steps)
        facts["the classifier reads right"] = f"{right:.1%} of unseen renders"
    if settings.clip_judges:
        clip = ClipPictures(settings.clip, device)
    judges = measure.Judges(DinoPictures(settings.teacher, device), clip, reader)
    images.mkdir(parents=True, exist_ok=True)
    studies: dict[str, Any] = {}
    for study in dict.fromkeys(run.study for run in runs):
        subject, own = subject_of(study, settings, folders), [run for run in runs if run.study == study]
        model = measure.load_drawing_model(plan_of(study, settings, folders).base)
        for run in (None, *own):
            print(f"measuring  {run or f'{study}, the untouched base'}", flush=True)
            measure.measure(run, study, settings, folders, subject, model)
        found = studies[study] = compared(measure.Numbers(study, subject, judges, folders), own)
        write_figures(study, found, own, folders, subject, images)
    facts = facts_of(runs, settings, folders, str(device)) | facts
    return {"format_version": 1, "facts": facts, "settings": asdict(settings), "studies": studies}


def compared(numbers: measure.Numbers, runs: Sequence[Run]) -> dict[str, Any]:
    """All numbers of a study, and the paired differences."""
    arms = _by_arm(runs, numbers.of)
    by_seed = {arm: with_numbers(some) for arm, some in arms.items()}
    differences = {
        arm: {
            one.measure: {**one.gap.to_json(), "better_in": one.better_in, "seeds": one.seeds, "verdict": one.verdict}
            for one in compare(by_seed[WITHOUT], by_seed[arm])
        }
        for arm in arms
        if arm != WITHOUT
    }
    found = {
        "base": numbers.of(None),
        "arms": arms,
        "differences": differences,
        "gains": _by_arm(runs, numbers.gain),
        "photos_among_themselves": numbers.photos_among_themselves(),
    }
    if gradients := {arm: seeds for arm, seeds in _by_arm(runs, numbers.gradients).items() if any(seeds.values())}:
        found["gradients"] = gradients
    if any(run.study == SCRATCH for run in runs):
        found["course"] = _by_arm(runs, numbers.course)
    return found


def _by_arm(runs: Sequence[Run], of: Callable[[Run], Any]) -> dict[str, dict[str, Any]]:
    """Arm -> seed -> what is found of the run."""
    found: dict[str, dict[str, Any]] = {}
    for run in in_order(runs):
        found.setdefault(str(run.arm), {})[str(run.seed)] = of(run)
    return found


def facts_of(runs: Sequence[Run], settings: Settings, folders: Folders, device: str) -> dict[str, str]:
    """What the page says of how it was made."""
    files = [file for run in runs if (file := seconds_file(run, folders)).exists()]
    seconds = sum(read_json(file)["seconds"] for file in files)
    studies = dict.fromkeys(run.study for run in runs)
    return {
        **{f"{study}: base, teacher": _models(study, settings, folders) for study in studies},
        "likeness and drift by": Path(settings.teacher).name,
        "steps": ", ".join(f"{study} {plan_of(study, settings, folders).steps}" for study in studies),
        "seeds of training": ", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
        "pictures of each prompt": f"{settings.drawn_seeds}, {settings.sampling_steps} sampling steps",
        "training, all runs": f"{seconds / 60:.0f} min on {device} ({os.cpu_count()} cores)",
        "versions": f"torch {version('torch')}, diffusers {version('diffusers')}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }


def _models(study: str, settings: Settings, folders: Folders) -> str:
    plan = plan_of(study, settings, folders)
    return f"{Path(plan.base).name}, {Path(plan.teacher).name}"
