"""With and without alignment at equal steps, several seeds: train, measure, and write what was found.

    python tools/does_alignment_help.py
    python tools/does_alignment_help.py --base MODEL --teacher DINOV2 --data CLASS_FOLDERS CAPTIONED_FOLDER \\
        --resolution 512 --tap mid --token_grid 16 --mixed_precision bf16

Every finished run is kept in outputs/does_alignment_help; run the same command again to go on, or with more --seeds to add some.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import EXIT_OK, UserError, script
from library.files import write_json
from library.models.embedded import TINY_BASES
from tools.alignment_study.arms import RECIPES
from tools.alignment_study.claim import claim_folder
from tools.alignment_study.commands import adapter_file, train_command
from tools.alignment_study.own_data import studies_of
from tools.alignment_study.page import PARTS, RESULTS, Place
from tools.alignment_study.settings import (
    CLASSES,
    CONCEPT,
    STUDIES,
    Folders,
    Settings,
    make_runs,
)
from tools.alignment_study.training import ROOT, shown, train_all

FOR_TINY = ("resolution", "token_grid", "learning_rate")
OF_DATA = ("class_data", "concept_data")


@script
def main(argv: list[str]) -> int:
    options = parsed(argv)
    place = Place(options.docs or ROOT / "docs", options.part) if options.part else Place(options.out.resolve(), "")
    if options.from_results:
        if others := [f"--{name}" for name in given(options) if name not in ("from_results", "part", "docs", "out")]:
            raise UserError(f"--from_results writes what was found before: leave {', '.join(others)} out.")
        place.write()
        print(f"page       {place.page}")
        return EXIT_OK
    settings, studies = settings_of(options)
    runs = make_runs(studies, options.arms, options.seeds)
    folders = Folders(options.out.resolve())
    for run in runs:
        state = "trained" if adapter_file(run, folders).exists() else "to train"
        print(f"{state:9} {run}: {shown(train_command(run, settings, folders))}")
    if options.dry_run:
        return EXIT_OK
    from tools.alignment_study.results import measure_all

    place.read()
    claim_folder(folders, settings, partial(prepare, studies, settings, folders, options.teacher_steps))
    train_all(runs, settings, folders, options.jobs)
    results = measure_all(runs, settings, folders, place.images)
    results["facts"] = {"command": f"`{as_typed(options)}`", **results["facts"]}
    results["settings"]["teacher"] = options.teacher
    write_json(place.images / RESULTS, results)
    place.write()
    print(f"page       {place.page}\nnumbers    {place.images / RESULTS}")
    return EXIT_OK


def settings_of(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """What all runs share, and the studies. Raises UserError for options that contradict each other."""
    named = {field.name: getattr(options, field.name) for field in fields(Settings) if field.name not in OF_DATA}
    settings = Settings(**{name: value for name, value in named.items() if value is not None})
    if options.teacher_steps < 0 or (options.teacher_steps and options.teacher != Settings.teacher):
        raise UserError("teacher_steps train the embedded teacher further: name steps above 0, and no other --teacher.")
    if options.teacher_steps:
        settings = replace(settings, teacher=str(options.out.resolve() / "teacher"))
    if options.docs is not None and not options.part:
        raise UserError(
            "--docs is the folder of the page that --part writes a part of. Name the --part, or leave --docs out."
        )
    if options.jobs < 1:
        raise UserError(f"--jobs must be positive, got {options.jobs}.")
    own = studies_of(options.data)
    settings = replace(
        settings,
        base=_absolute(settings.base),
        teacher=_absolute(settings.teacher),
        clip=_absolute(settings.clip),
        class_data=own.get(CLASSES, ""),
        concept_data=own.get(CONCEPT, ""),
    )
    studies = options.studies or [*(own or (CLASSES, CONCEPT))]
    if own and not set(studies) <= own.keys():
        raise UserError(f"--data has pictures for {' and '.join(own)} alone; leave other --studies out.")
    if options.teacher_steps and CLASSES not in studies and CONCEPT not in studies:
        raise UserError(
            "--teacher_steps trains no teacher of scratch and plain: leave it out, or give --scratch_teacher_steps."
        )
    if settings.base not in TINY_BASES:
        if not own:
            raise UserError(f"--base {settings.base} is to learn from pictures of your own: name them with --data.")
        if left := [f"--{name}" for name in FOR_TINY if named[name] is None]:
            raise UserError(
                f"The defaults are for the tiny base. For --base {settings.base} give {', '.join(left)} too."
            )
    return settings, studies


def _absolute(name: str) -> str:
    """A file or folder that is there: the scripts run in another folder. Names of the project's models and the hub's stay."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="does_alignment_help.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--studies",
        nargs="+",
        choices=STUDIES,
        default=[],
        help="scratch, the positive control: a U-Net from nothing; plain: a LoRA on its pictures; classes: new classes; "
        "concept: one new thing (classes concept)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["0", "0.5"],
        help=f"lambda of each arm, or its recipe ({', '.join(RECIPES)}), with a lambda of its own as in trd:0.1 (0 0.5)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of training (%(default)s)")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        help="your pictures: a folder of class folders, a folder of pictures with captions (.txt), or both; a quarter is held out",
    )
    parser.add_argument(
        "--teacher_steps",
        type=int,
        default=0,
        help="train the embedded teacher for so many steps more on all classes, the new ones too, first (%(default)s)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "does_alignment_help", help="runs are kept here")
    parser.add_argument(
        "--part", choices=PARTS, default="", help="write this part of the page in --docs, not one in --out"
    )
    parser.add_argument("--docs", type=Path, help="folder of the page that --part is of (docs)")
    parser.add_argument(
        "--from_results",
        action="store_true",
        help="write the page anew from the results.json that is there; train and measure nothing",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the trainings and stop")
    for field in fields(Settings):
        if field.name not in OF_DATA:
            kind = {"str": str, "int": int, "float": float}[str(field.type)]
            default = None if field.name in FOR_TINY else field.default
            parser.add_argument(f"--{field.name}", type=kind, default=default, help=f"({field.default})")
    return parser.parse_args(argv)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that are not at their defaults."""
    return {
        name: getattr(options, name) for name, default in vars(parsed([])).items() if getattr(options, name) != default
    }


def as_typed(options: argparse.Namespace) -> str:
    """The command that gives the same numbers: what is not default, but for where things lie and how many run at once."""
    words = ["python", "tools/does_alignment_help.py"]
    for name, value in given(options).items():
        if name not in ("out", "docs", "jobs", "dry_run"):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def prepare(studies: Sequence[str], settings: Settings, folders: Folders, teacher_steps: int) -> None:
    """Teacher and pictures of all studies, where they are not there. What cannot be read or judged is refused here."""
    from library.evaluation.picture_encoders import check_clip_pictures
    from tools.alignment_study.subjects import make_pictures, subject_of
    from tools.alignment_study.teacher import knowing_teacher

    if settings.clip_judges:
        check_clip_pictures(settings.clip)
    else:
        print(
            "note       no --clip is named, so none judges likeness: the one of the tiny base has never seen photos",
            flush=True,
        )
    if teacher_steps:
        print("teacher    the embedded one, trained further on all classes", flush=True)
        knowing_teacher(Path(settings.teacher), teacher_steps)
    for study in studies:
        make_pictures(study, settings, folders)
        subject_of(study, settings, folders)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
