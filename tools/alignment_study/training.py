"""Runs the commands of a comparison: caches, a few steps of each arm to say how long all takes, the trainings. No torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.errors import RunFailed
from library.files import read_json, write_json
from library.training.metrics_file import METRICS, metric_rows
from tools.alignment_study.arms import Arm
from tools.alignment_study.commands import VALIDATIONS, adapter_file, cache_command, plan_of, train_command
from tools.alignment_study.settings import CONCEPT, Folders, Run, Settings

ROOT = Path(__file__).resolve().parents[2]
TRIED = 20
"""Steps that an arm is timed for; metrics come every ten, and the first ten are slower."""


def train_all(runs: Sequence[Run], settings: Settings, folders: Folders, jobs: int) -> None:
    """Train what is not there. A study's first run goes alone: it builds the caches that the others share."""
    todo = [run for run in runs if not adapter_file(run, folders).exists()]
    studies = list(dict.fromkeys(run.study for run in todo))
    for study in studies:
        if study != CONCEPT:
            print(f"caches     {study}", flush=True)
            call(cache_command(study, settings, folders), folders.study(study) / "caches.log", jobs=1)
    if len(todo) > 1:
        say_times(todo, settings, folders, jobs)
    for study in studies:
        own = [run for run in todo if run.study == study]
        for some in (own[:1], own[1:]):
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda run: train_one(run, settings, folders, jobs), some))


def say_times(todo: Sequence[Run], settings: Settings, folders: Folders, jobs: int) -> None:
    """Print how long each arm will train, by a few steps of each. What starts a script and measures a run is not counted."""
    whole = 0.0
    for study, arm in dict.fromkeys((run.study, run.arm) for run in todo):
        count = sum((run.study, run.arm) == (study, arm) for run in todo)
        step, other = _tried(study, arm, settings, folders, jobs)
        seconds = plan_of(study, settings, folders).steps * step + VALIDATIONS * other
        whole += count * seconds
        print(
            f"time       {study}, {arm.title}: {step:.3g} s a step, {_minutes(seconds)} a run, {count} to train",
            flush=True,
        )
    print(
        f"time       all trainings: at least {_minutes(whole / jobs)}, {jobs} at once; measuring comes after",
        flush=True,
    )


def _tried(study: str, arm: Arm, settings: Settings, folders: Folders, jobs: int) -> tuple[float, float]:
    """(seconds of a step, of a validation) in `TRIED` steps, one validation among them, in a folder that does not stay."""
    short = ["--max_train_steps", str(TRIED)]
    if study != CONCEPT:
        short += ["--validate_every_n_steps", str(TRIED // 2)]
    folders.study(study).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="timed_", dir=folders.study(study)) as into:
        command = [*train_command(Run(study, arm, 0), settings, folders, Path(into)), *short]
        call(command, folders.study(study) / "timed.log", jobs)
        rows = metric_rows(Path(into) / METRICS)
    timed = next(row for row in reversed(rows) if "time/step_ms" in row)
    return timed["time/step_ms"] / 1000, 0.0 if study == CONCEPT else timed.get("time/other_s", 0.0)


def _minutes(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def train_one(run: Run, settings: Settings, folders: Folders, jobs: int) -> None:
    start, file = time.perf_counter(), seconds_file(run, folders)
    before = read_json(file)["seconds"] if file.exists() else 0  # of a training that was interrupted
    print(f"training   {run}", flush=True)
    try:
        call(train_command(run, settings, folders), folders.study(run.study) / f"{run.folder_name}.log", jobs)
    finally:
        write_json(file, {"seconds": before + round(time.perf_counter() - start)})
    print(f"trained    {run}, {time.perf_counter() - start:.0f} s", flush=True)


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


def shown(command: Sequence[str]) -> str:
    """As a user types it in the repository's root."""
    return shlex.join(["python", *(word.removeprefix(f"{ROOT}/") for word in command[1:])])
