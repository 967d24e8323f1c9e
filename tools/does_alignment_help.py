"""With and without alignment at equal steps, several seeds: train, measure, and write docs/does_alignment_help.md's results.

    python tools/does_alignment_help.py

Every finished run is kept in outputs/does_alignment_help; run the same command again to go on, or with more --seeds to add some.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import EXIT_OK, RunFailed, UserError, script
from library.files import read_json, write_json, write_text
from tools.alignment_study.arms import RECIPES, WITHOUT
from tools.alignment_study.settings import (
    CLASSES,
    STUDIES,
    Folders,
    Run,
    Settings,
    adapter_file,
    cache_command,
    claim_folder,
    in_order,
    make_runs,
    train_command,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGES = "does_alignment_help.md", "images/does_alignment_help"


@script
def main(argv: list[str]) -> int:
    options = parsed(argv)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    if options.teacher_steps < 0 or (options.teacher_steps and options.teacher != Settings.teacher):
        raise UserError("teacher_steps train the embedded teacher further: name steps above 0, and no other --teacher.")
    if options.teacher_steps:
        settings = replace(settings, teacher=str(options.out.resolve() / "teacher"))
    runs = make_runs(options.studies, options.arms, options.seeds)
    folders = Folders(options.out.resolve())
    for run in runs:
        state = "trained" if adapter_file(run, folders).exists() else "to train"
        print(f"{state:9} {run}: {shown(train_command(run, settings, folders))}")
    if options.dry_run:
        return EXIT_OK
    from tools.alignment_study.page import put_between_marks, results_text

    page = read_page(options.docs)
    claim_folder(folders, settings, partial(make_teacher, settings, options.teacher_steps))
    train_all(runs, settings, folders, options.jobs)
    results = measure_all(runs, settings, folders, options.docs / IMAGES)
    results["facts"] = {"command": f"`{as_typed(options)}`", **results["facts"]}
    results["settings"]["teacher"] = options.teacher
    figures = {study: one.pop("figures") for study, one in results["studies"].items()}
    write_json(folders.out / "results.json", results)
    write_json(options.docs / IMAGES / "results.json", results)
    write_text(options.docs / PAGE, put_between_marks(page, results_text(results, figures, IMAGES)))
    print(f"page       {options.docs / PAGE}\nnumbers    {folders.out / 'results.json'}")
    return EXIT_OK


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="does_alignment_help.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="which (all)")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["0", "0.5"],
        help=f"lambda of each arm, or its recipe ({', '.join(RECIPES)}), with a lambda of its own as in trd:0.1 (0 0.5)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of training (%(default)s)")
    parser.add_argument(
        "--teacher_steps",
        type=int,
        default=0,
        help="train the embedded teacher for so many steps more on all classes, the new ones too, first (%(default)s)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "does_alignment_help", help="runs are kept here")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page and its images")
    parser.add_argument("--dry_run", action="store_true", help="print the trainings and stop")
    for field in fields(Settings):
        kind = {"str": str, "int": int, "float": float}[str(field.type)]
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help="(%(default)s)")
    return parser.parse_args(argv)


def as_typed(options: argparse.Namespace) -> str:
    """The command that gives the same numbers: what is not default, but for where things lie and how many run at once."""
    words = ["python", "tools/does_alignment_help.py"]
    for name, default in vars(parsed([])).items():
        value = getattr(options, name)
        if value != default and name not in ("out", "docs", "jobs", "dry_run"):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def make_teacher(settings: Settings, steps: int) -> None:
    """Train the teacher that knows all classes, where one is asked for."""
    if steps:
        from tools.alignment_study.teacher import knowing_teacher

        print("teacher    the embedded one, trained further on all classes", flush=True)
        knowing_teacher(Path(settings.teacher), steps)


def read_page(docs: Path) -> str:
    """The page that the results go into; in another folder than docs/, a copy of it. Raises UserError where its marks are lost."""
    from tools.alignment_study.page import put_between_marks

    file = docs / PAGE if (docs / PAGE).is_file() else ROOT / "docs" / PAGE
    page = file.read_text(encoding="utf-8")
    put_between_marks(page, "")  # said before hours of training
    return page


def train_all(runs: Sequence[Run], settings: Settings, folders: Folders, jobs: int) -> None:
    """Train what is not there. A study's first run goes alone: it builds the caches that the others share."""
    from tools.alignment_study.subjects import make_pictures

    for study in dict.fromkeys(run.study for run in runs):
        make_pictures(study, settings, folders)
        todo = [run for run in runs if run.study == study and not adapter_file(run, folders).exists()]
        if todo and study == CLASSES:
            call(cache_command(settings, folders), folders.study(study) / "caches.log", jobs=1)
        for some in (todo[:1], todo[1:]):
            with ThreadPoolExecutor(max(1, jobs)) as pool:
                list(pool.map(lambda run: train_one(run, settings, folders, jobs), some))


def train_one(run: Run, settings: Settings, folders: Folders, jobs: int) -> None:
    start, file = time.perf_counter(), seconds_file(run, folders)
    before = read_json(file)["seconds"] if file.exists() else 0  # of a training that was interrupted
    print(f"training   {run}", flush=True)
    try:
        call(train_command(run, settings, folders), log_file(run, folders), jobs)
    finally:
        write_json(file, {"seconds": before + round(time.perf_counter() - start)})
    print(f"trained    {run}, {time.perf_counter() - start:.0f} s", flush=True)


def log_file(run: Run, folders: Folders) -> Path:
    return folders.study(run.study) / f"{run.folder_name}.log"


def seconds_file(run: Run, folders: Folders) -> Path:
    return folders.study(run.study) / f"{run.folder_name}.seconds.json"


def call(command: Sequence[str], log: Path, jobs: int) -> None:
    """Run one of the project's scripts. Raises RunFailed with its last words where it fails."""
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = " ".join(log.read_text(encoding="utf-8").splitlines()[-2:])
        raise RunFailed(f"{command[1]} ended with exit code {code}: {last} All it said is in {log}.")


def measure_all(runs: Sequence[Run], settings: Settings, folders: Folders, images: Path) -> dict[str, Any]:
    """Measure what was not measured, then compare everything."""
    from library.device import choose_device
    from library.evaluation.picture_encoders import ClipPictures, DinoPictures
    from library.models.locate import locate_clip
    from tools.alignment_study import measure
    from tools.alignment_study.figures import write_figures
    from tools.alignment_study.reader import trained_reader
    from tools.alignment_study.subjects import subject_of

    device = choose_device(None)
    print("reader     the classifier that reads shape and colour", flush=True)
    reader, right = trained_reader(folders.out / "reader.pt", settings.reader_steps)
    judges = measure.Judges(
        DinoPictures(settings.teacher, device), ClipPictures(str(locate_clip(settings.clip).path), device), reader
    )
    model = measure.load_drawing_model(settings)
    images.mkdir(parents=True, exist_ok=True)
    studies: dict[str, Any] = {}
    for study in dict.fromkeys(run.study for run in runs):
        subject, own = subject_of(study, settings, folders), [run for run in runs if run.study == study]
        for run in (None, *own):
            print(f"measuring  {run or f'{study}, the untouched base'}", flush=True)
            measure.measure(run, study, settings, folders, subject, model)
        studies[study] = compared(measure.Numbers(study, subject, judges, folders), own)
        found = studies[study]
        arms = {arm: {int(seed): one for seed, one in some.items()} for arm, some in found["arms"].items()}
        found["figures"] = write_figures(study, found["base"], arms, own, folders, subject, images)
    facts = facts_of(runs, settings, folders, str(device), right)
    return {"format_version": 1, "facts": facts, "settings": asdict(settings), "studies": studies}


def compared(numbers: Any, runs: Sequence[Run]) -> dict[str, Any]:
    """All numbers of a study, and the paired differences, as plain data. numbers: a `measure.Numbers`."""
    from tools.alignment_study.compare import compare

    arms: dict[str, dict[str, Any]] = {}
    gains: dict[str, dict[str, Any]] = {}
    for run in in_order(runs):
        arms.setdefault(str(run.arm), {})[str(run.seed)] = numbers.of(run)
        gains.setdefault(str(run.arm), {})[str(run.seed)] = numbers.gain(run)
    by_seed = {arm: {int(seed): one for seed, one in some.items()} for arm, some in arms.items()}
    differences = {
        arm: {
            one.measure: {**one.gap.to_json(), "better_in": one.better_in, "seeds": one.seeds, "verdict": one.verdict}
            for one in compare(by_seed[WITHOUT], by_seed[arm])
        }
        for arm in arms
        if arm != WITHOUT
    }
    base = numbers.of(None)
    return {
        "base": base,
        "arms": arms,
        "differences": differences,
        "gains": gains,
        "photos_among_themselves": numbers.photos_among_themselves(),
    }


def facts_of(runs: Sequence[Run], settings: Settings, folders: Folders, device: str, right: float) -> dict[str, str]:
    """What the page says of how it was made."""
    files = [file for run in runs if (file := seconds_file(run, folders)).exists()]
    seconds = sum(read_json(file)["seconds"] for file in files)
    lengths = {"classes": settings.steps, "concept": settings.concept_steps}
    return {
        "base, teacher": f"{settings.base}, {Path(settings.teacher).name}",
        "steps": ", ".join(f"{study} {lengths[study]}" for study in dict.fromkeys(run.study for run in runs)),
        "seeds of training": ", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
        "pictures of each prompt": f"{settings.drawn_seeds}, {settings.sampling_steps} sampling steps",
        "the classifier reads right": f"{right:.1%} of unseen renders",
        "training, all runs": f"{seconds / 60:.0f} min on {device} ({os.cpu_count()} cores)",
        "versions": f"torch {version('torch')}, diffusers {version('diffusers')}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }


def shown(command: Sequence[str]) -> str:
    """As a user types it in the repository's root."""
    return shlex.join(["python", *(word.removeprefix(f"{ROOT}/") for word in command[1:])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
