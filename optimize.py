"""Find the best options for training a LoRA: many trainings, proposed by Optuna, judged on pictures that they have not seen.

    python optimize.py --n-trials 8                                               # the embedded base, minutes on two cores
    python optimize.py --dataset-config my.toml --base-model v1-5-pruned.safetensors --study-name mio --n-trials 50
    python optimize.py status --study-name mio --watch 10                         # in another terminal
    python optimize.py pick 7 --study-name mio                                    # choose trial 7, whatever its value
    python optimize.py report --study-name mio
    python optimize.py export --study-name mio --to sdxl --base-model sd_xl_base_1.0.safetensors

To resume, or to let other machines help, run the same command again. Ctrl-C once lets running trials finish, twice stops them.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, EXIT_STOPPED, UserError, script
from library.options.command_line import nearest
from library.options.parser import parse
from library.options.search import (
    DIALECT,
    ExportOptions,
    OptimizeOptions,
    PickOptions,
    PlaceOptions,
    ReportOptions,
    SdxlOptions,
    StatusOptions,
    without_password,
)
from library.words import plural

if TYPE_CHECKING:
    from library.search.results.status import StudyView
    from library.search.run.setup import Setup

TINY_SHEET_STEPS = 8


@script
def main(argv: list[str]) -> int:
    command = argv[0] if argv and not argv[0].startswith("-") else None
    if command is not None:
        if command not in COMMANDS:
            raise UserError(f"Unknown command {command}{nearest(command, COMMANDS)}. Commands: {', '.join(COMMANDS)}.")
        return COMMANDS[command](argv[1:])
    options = parse(OptimizeOptions, argv, prog="optimize.py", description=__doc__, dialect=DIALECT)
    if options.search.pick is not None:
        return picked(options.place, options.search.pick)
    from library.search.run.checks import check_trials
    from library.search.run.setup import set_up

    setup = set_up(options, shlex.join(["python", "optimize.py", *argv]))
    print_plan(options, setup)
    check_trials(setup.plan, options.trained.device, setup.now)
    return EXIT_OK if options.dry_run else run(options, setup)


def print_plan(options: OptimizeOptions, setup: Setup) -> None:
    from library.search.lines import folded
    from library.search.results.status import shown_params
    from library.search.run.setup import batch_of
    from library.search.study.proposals import choose_sampler

    plan, terms = setup.plan, setup.plan.terms
    sampler, why = choose_sampler(plan.sampler, plan.workers, plan.n_trials)
    lines = [
        f"study      {plan.name}, in {plan.output_dir}, stored in {without_password(plan.storage)}",
        f"trains     {terms.script}.py on {setup.base.path} ({setup.base.family}), batches of {batch_of(setup)}",
        f"objective  {terms.objective}; seed {terms.seed}",
        f"trials     {plan.n_trials}, {plan.workers} at a time, sampler {sampler} ({why})",
    ]
    if plan.confirm:
        lines.append(
            f"then       {plural(plan.confirm, 'best trial')} again, with {plural(plan.new_seeds, 'new seed')} each"
        )
    for parameter in terms.space.parameters:
        scale = " (log)" if parameter.log else ""
        values = " ".join(map(str, parameter.choices)) or f"{parameter.low:g} to {parameter.high:g}{scale}"
        lines.append(f"searches   {parameter.name}: {values}; default {parameter.default}")
    for number, params in enumerate(plan.initial, start=1):
        lines.append(f"begins     {number}: {shown_params(params)}")
    lines += [f"note       {note}" for note in setup.notes]
    print(folded("\n".join(lines)), flush=True)


def run(options: OptimizeOptions, setup: Setup) -> int:
    from library.search.results.status import StudyView
    from library.search.run.driver import Driver
    from library.search.run.gpus import assign
    from library.search.study.study import open_study
    from library.search.trainer.parent_side import TrainerProcess

    plan = setup.plan
    open_study(plan.name, plan.storage, plan.terms)  # refuses other terms before any GPU is locked
    environments = assign(plan.workers, options.trained.device)
    log = plan.output_dir / "trainers.log"
    result = Driver(plan, lambda number: TrainerProcess(environments[number], log)).run()
    view = StudyView(plan.name, plan.storage)
    if not result.interrupted:
        if options.outcome.sheet:
            attempt("contact sheet", lambda: draw_sheet(view, plan.output_dir, setup))
        if options.outcome.export and setup.base.family == "sd15" and plan.terms.script == "train_network":
            attempt("export to SDXL", lambda: export_again(plan.output_dir, options.outcome.sdxl_base))
    attempt("report", lambda: write_report(view, plan.output_dir))
    if result.interrupted:
        trials = plural(plan.n_trials, "trial")
        print(f"Interrupted after {result.done} of {trials}. Run the same command again to continue.")
        return EXIT_STOPPED
    return EXIT_OK


def attempt(what: str, work: Callable[[], None]) -> None:
    """Do what follows a study. An error in it is printed, and does not make the study a failure."""
    print(f"making     the {what}", flush=True)
    try:
        work()
    except UserError as error:
        print(f"No {what}: {error}", file=sys.stderr)


def draw_sheet(view: StudyView, folder: Path, setup: Setup) -> None:
    from library.search.results.contact_sheet import STEPS, draw_best

    draw_best(view, folder, setup.base.path, steps=TINY_SHEET_STEPS if setup.is_tiny else STEPS)


def write_report(view: StudyView, folder: Path) -> None:
    from library.search.results.running_report import REPORT
    from library.search.results.study_report import build_report

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT
    build_report(view, folder).write(path)
    print(f"report     {path}", flush=True)


def export_best(
    folder: Path, sdxl_base: str | None, dataset_config: str | None = None, wishes: SdxlOptions | None = None
) -> None:
    from library.search.best_params import read_best_params
    from library.search.results.best_trial import BEST_FILE
    from library.search.run.sdxl_study import default_sdxl_base
    from library.search.to_sdxl.export import export

    best = read_best_params(folder / BEST_FILE)
    base = sdxl_base or default_sdxl_base(best.base_model.path)
    print(export(best, sdxl_base=base, output_dir=folder, dataset_config=dataset_config, wishes=wishes).report())


def export_again(folder: Path, sdxl_base: str | None) -> None:
    """Export the study's best again, with the wishes of the export in `folder` if there is one."""
    from library.search.to_sdxl.export import last_request

    last = last_request(folder)
    if last is None:
        export_best(folder, sdxl_base)
    else:
        export_best(folder, sdxl_base or last.base_model, last.dataset_config, last.wishes)


# Sub-commands.


def status(argv: list[str]) -> int:
    options = parse(StatusOptions, argv, prog="optimize.py status", description=__doc__, dialect=DIALECT)
    from library.search.lines import folded
    from library.search.results.status import StudyView, status_text

    try:
        while True:
            view = StudyView(options.place.study_name, options.place.url)
            clear = "\033[H\033[J" if options.watch and sys.stdout.isatty() else ""
            print(f"{clear}{folded(status_text(view))}", flush=True)
            if options.watch is None or view.is_done:
                return EXIT_OK
            time.sleep(options.watch)
    except KeyboardInterrupt:
        return EXIT_OK


def report(argv: list[str]) -> int:
    options = parse(ReportOptions, argv, prog="optimize.py report", description=__doc__, dialect=DIALECT)
    from library.search.results.status import StudyView

    write_report(StudyView(options.place.study_name, options.place.url), options.place.folder)
    return EXIT_OK


def export_(argv: list[str]) -> int:
    options = parse(ExportOptions, argv, prog="optimize.py export", description=__doc__, dialect=DIALECT)
    folder = options.place.folder
    from library.search.results.best_trial import BEST_FILE

    if not (folder / BEST_FILE).is_file():
        raise UserError(
            f"{folder} has no {BEST_FILE}: no trial of the study {options.place.study_name} has ended there. Name its "
            "--output-dir."
        )
    export_best(folder, options.base_model, options.dataset_config, options.wishes)
    return EXIT_OK


def pick(argv: list[str]) -> int:
    if argv and argv[0].lstrip("-").isdigit():
        argv = ["--trial", *argv]
    options = parse(PickOptions, argv, prog="optimize.py pick", description=__doc__, dialect=DIALECT)
    return picked(options.place, options.trial)


def picked(place: PlaceOptions, trial: int) -> int:
    """Make `trial` the study's choice, and write best_params.json, report and export again."""
    from library.search.best_params import read_best_params
    from library.search.lines import folded
    from library.search.results.best_trial import BEST_FILE, pick_trial
    from library.search.results.status import StudyView
    from library.search.to_sdxl.export import CONFIG

    pick_trial(StudyView(place.study_name, place.url), trial, place.folder)
    view = StudyView(place.study_name, place.url)
    print(folded(view.verdict.words, indent=2))
    write_report(view, place.folder)
    best = read_best_params(place.folder / BEST_FILE)
    if (place.folder / CONFIG).is_file() and best.base_model.family == "sd15":
        attempt("export to SDXL", lambda: export_again(place.folder, None))
    return EXIT_OK


COMMANDS = {"status": status, "report": report, "export": export_, "pick": pick}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
