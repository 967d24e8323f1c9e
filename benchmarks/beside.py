"""A LoRA training of train_network.py and of other programs in turn, A B A B ..., on the same cores: start, step, memory.

    python benchmarks/beside.py                                           # beside a plain loop of diffusers and PEFT
    python benchmarks/beside.py --other kohya="bash kohya.sh {base} {pictures} {out} {steps}" --other plain

In a command {base}, {pictures}, {out}, {steps}, {resolution} and {rank} are filled in; it has to count its steps in its output as
"1/10", and begins with nothing cached. Everything after -- goes to train_network.py. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from common import save
from full_size import PICTURES, lora_training, make_pictures, random_base
from watch import Figures, TrainingFailed, watch

ROOT = Path(__file__).resolve().parents[1]
OURS = "train_network.py of this project"
PLAIN = "{python} benchmarks/plain_loop.py {base} {out} {pictures} {resolution} {steps} {rank}"
GOALS = {
    "first_step_seconds": {"kohya": 0.4},
    "step_seconds": {"kohya": 0.75, "plain": 1.0},
    "peak_pss_gb": {"kohya": 0.6},
}
"""Ours as a share of the other program's, at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", action="append", metavar="NAME=COMMAND", help='another program, or "plain"')
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--base", default=None, help="a single file; default: random weights of the family")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cores", default=None, help="as 0,1; default: all that this process may use")
    parser.add_argument("--folder", default=None, help="where the random base is kept, and outputs go")
    parser.add_argument("--name", default=None, help="of the result")
    parser.add_argument("rest", nargs="*", help="more options for train_network.py, behind --")
    arguments = parser.parse_args()
    if arguments.steps == PICTURES:
        parser.error(f"--steps {PICTURES} cannot be told from {PICTURES} pictures being cached. Give another number.")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        settings, measured, targets = compare(arguments, Path(folder))
    save(arguments.name or f"beside_{arguments.family}_{arguments.resolution}_cpu", settings, measured, targets)


def compare(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings, figures and targets of all rounds."""
    base = Path(arguments.base or random_base(Path(arguments.folder or folder), arguments.family)).resolve()
    make_pictures(folder / "pictures", arguments.resolution)
    cores = sorted(os.sched_getaffinity(0))
    if arguments.cores is not None:
        cores = [int(core) for core in arguments.cores.split(",")]
    commands = {"ours": OURS, **dict(map(_named, arguments.other or ["plain"]))}
    rounds: dict[str, list[Figures]] = {name: [] for name in commands}
    for number in range(1, arguments.rounds + 1):
        for name, command in commands.items():
            out = folder / f"{name}{number}"
            out.mkdir()
            if command == PLAIN:
                write_configurations(base, out)
            if command == OURS:
                words = _ours(arguments, base, folder / "pictures", out)
            else:
                words = _filled(command, arguments, base=base, pictures=folder / "pictures", out=out)
            try:
                figures = watch(words, arguments.steps, cores=cores, folder=ROOT)
            except TrainingFailed as error:
                sys.exit(f"error: {name}: {error}")
            rounds[name].append(figures)
            print(f"round {number} {name:8}" + _line(figures), flush=True)
    keys = ("family", "resolution", "rank", "steps", "rounds")
    settings = {key: getattr(arguments, key) for key in keys}
    settings |= {"precision": "float32", "cores": len(cores), "more": " ".join(arguments.rest) or "none"}
    return settings, *summary(rounds)


def summary(rounds: dict[str, list[Figures]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Medians, the ratios of ours to each other program's by round, and the goals. rounds: by program, ours first."""
    measured: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for figure in Figures.__dataclass_fields__:
        values = {name: [getattr(one, figure) for one in runs] for name, runs in rounds.items()}
        for name, own in values.items():
            measured[f"{name}_{figure}"] = median(own)
        for name in list(values)[1:]:
            ratios = [mine / other for mine, other in zip(values["ours"], values[name], strict=True)]
            key = f"{figure}_of_{name}"
            measured[key] = median(ratios)
            measured[f"{key}_by_round"] = ratios
            if name in GOALS.get(figure, {}):
                goal = GOALS[figure][name]
                targets[key] = {"at_most": goal, "met": measured[key] <= goal}
    measured["rounds"] = {name: [asdict(one) for one in runs] for name, runs in rounds.items()}
    return measured, targets


def write_configurations(base: Path, folder: Path) -> None:
    """What diffusers has to have beside a single file: the configurations of its parts, and the tokenizer."""
    from library.merging.diffusers_folder import write_rest
    from library.models.checkpoint import open_checkpoint
    from library.models.locate import locate_base

    write_rest(open_checkpoint(locate_base(str(base))), folder)


def _ours(arguments: argparse.Namespace, base: Path, pictures: Path, out: Path) -> list[str]:
    options = {name: getattr(arguments, name) for name in ("resolution", "rank", "steps")}
    words = lora_training(base, pictures, out, out / "cache", batch=1, precision="no", **options)
    return [sys.executable, *words, *arguments.rest]


def _named(other: str) -> tuple[str, str]:
    name, _, command = other.partition("=")
    return name, command or PLAIN


def _filled(command: str, arguments: argparse.Namespace, **paths: Path) -> list[str]:
    values = {"python": sys.executable, "steps": arguments.steps, "resolution": arguments.resolution}
    values |= {"rank": arguments.rank, **paths}
    return [word.format(**values) for word in shlex.split(command)]


def _line(figures: Figures) -> str:
    return (
        f"first step after {figures.first_step_seconds:.1f} s ({figures.first_step_cpu_seconds:.1f} CPU-s), then "
        f"{figures.step_seconds:.2f} s a step ({figures.step_cpu_seconds:.1f} CPU-s), {figures.peak_pss_gb:.2f} GB PSS, "
        f"{figures.peak_anonymous_gb:.2f} GB anonymous"
    )


if __name__ == "__main__":
    main()
