"""Everything that is to be measured on a GPU, in one command: does it train, how fast, in how much memory, to the same bits.

    benchmarks/on_gpu.sh                             # the first eight minutes' worth
    benchmarks/on_gpu.sh --minutes 30                # all of it
    benchmarks/on_gpu.sh --only lora_sd15 resume

Parts run in order of worth, each as a process of its own with a time limit; what fails is said and left behind. Each part writes
benchmarks/results/gpu_NAME.json, all of them on_gpu.json, and benchmarks/README.md is made of them. Nothing is downloaded: bases
are random, and kept in --folder for the next time. Without a GPU the parts run at tiny size, which shows that they work; their
results are thrown away.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import common
import page

from library.errors import EXIT_BAD_INPUT, UserError
from library.files import read_json, write_json
from library.options.network import TrainNetworkOptions
from library.options.parser import flatten

BENCHMARKS = Path(__file__).resolve().parent
# Some of a part's time for its start: less is not worth beginning with.
LEAST_SECONDS = 20.0


@dataclass(frozen=True)
class Part:
    """A benchmark with its options. tiny: what is different about them without a GPU. rest: goes on to train_network.py."""

    name: str
    what: str
    script: str
    options: str
    tiny: str
    seconds: int
    """More would be a sign that something hangs; a guess."""
    rest: str = ""

    def words(self, *, tiny: bool, folder: Path) -> list[str]:
        kept = ["--folder", str(folder)] if self.script in KEEPING else []
        changed = self.tiny.split() if tiny else []
        return [
            *self.options.split(),
            *changed,
            "--name",
            self.result,
            *kept,
            *(["--", *self.rest.split()] if self.rest else []),
        ]

    @property
    def result(self) -> str:
        return f"gpu_{self.name}"

    @property
    def unknown(self) -> list[str]:
        """Options of `rest` that train_network.py does not have."""
        known = flatten(TrainNetworkOptions())
        names = [word.removeprefix("--").removeprefix("no_") for word in self.rest.split() if word.startswith("--")]
        return [f"--{name}" for name in names if name not in known]


KEEPING = frozenset({"train_network.py", "resume.py", "samplers.py"})
"""Those that keep a random base for the next part."""

TINY_SD15 = "--base tiny-sd15 --resolution 64 --steps 2"
TINY_SDXL = "--base tiny-sdxl --resolution 64 --steps 2"
LORA_SD15 = "--family sd15 --resolution 512 --batch 1 --precision bf16"
LORA_SDXL = "--family sdxl --resolution 1024 --batch 1 --precision bf16"
REPA = "--batch 128 --steps 30 --samples 512"
TINY_REPA = "--tiny --batch 1 --steps 10 --samples 2"


def lora(
    name: str, what: str, family: str, steps: int, seconds: int, options: str = "", tiny: str = "", rest: str = ""
) -> Part:
    """A training of one family at its own size."""
    own, tiny_base = (LORA_SD15, TINY_SD15) if family == "sd15" else (LORA_SDXL, TINY_SDXL)
    return Part(
        name,
        what,
        "train_network.py",
        f"{own} --steps {steps} {options}",
        f"{tiny_base} --warm_up 1 {tiny}",
        seconds,
        rest,
    )


def repa(name: str, what: str, seconds: int, options: str, tiny: str = "") -> Part:
    return Part(name, what, "repa_step.py", f"{REPA} {options}", f"{TINY_REPA} {tiny}", seconds)


# The first three steps of a run with graphs are not yet replayed, and the fourth records.
GRAPHS = "--compile graphs --warm_up 6"
PARTS = (
    lora("lora_sd15", "SD1.5 LoRA, 512 px, batch 1: does it train", "sd15", 20, 120),
    lora("lora_sdxl", "SDXL LoRA, 1024 px, batch 1: does it train", "sdxl", 5, 150),
    repa("repa", "REPA step, batch 128", 120, "--compile none"),
    repa("repa_regional", "REPA step, --compile regional", 180, "--compile regional", "--compile none"),
    repa("repa_graphs", "REPA step, --compile graphs", 120, "--compile graphs"),
    lora("lora_sd15_graphs", "SD1.5 LoRA, --compile graphs", "sd15", 30, 90, GRAPHS, "--steps 4"),
    lora("lora_sdxl_graphs", "SDXL LoRA, --compile graphs", "sdxl", 15, 120, GRAPHS, "--steps 4"),
    Part(
        "resume", "exact resume, price of determinism", "resume.py", f"{LORA_SD15} --steps 12", TINY_SD15, 180
    ),
    Part("reading", "stores to batches, host alone", "store_read.py", "", "--samples 130 --batches 2 --repeats 1", 90),
    lora("sdxl_nf4", "SDXL base in nf4", "sdxl", 5, 150, rest="--base_quantization nf4 --gradient_checkpointing"),
    lora("sdxl_int8", "SDXL base in int8", "sdxl", 5, 150, rest="--base_quantization int8 --gradient_checkpointing"),
    lora("sdxl_fp8", "SDXL base in fp8", "sdxl", 5, 150, rest="--base_quantization fp8 --gradient_checkpointing"),
    lora("sdxl_swap", "SDXL, six blocks swapped", "sdxl", 5, 150, rest="--blocks_to_swap 6 --gradient_checkpointing"),
    Part(
        "samplers_sd15", "every sampler, SD1.5, 512 px", "samplers.py", "--family sd15 --size 512 --steps 10",
        "--base tiny-sd15 --size 64 --steps 1", 120,
    ),
    Part(
        "samplers_sdxl", "every sampler, SDXL, 1024 px", "samplers.py", "--family sdxl --size 1024 --steps 10",
        "--base tiny-sdxl --size 64 --steps 1", 180,
    ),
    lora("lora_sd15_fp8", "SD1.5 LoRA, --fp8_base", "sd15", 10, 90, rest="--fp8_base"),
    lora("lora_sd15_regional", "SD1.5 LoRA, --compile regional", "sd15", 20, 180, "--compile regional", "--compile none"),
)  # fmt: skip
BY_NAME = {part.name: part for part in PARTS}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts; what does not fit is left out")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(BY_NAME), help="these parts alone")
    parser.add_argument(
        "--folder", type=Path, help="where random bases (9 GB), caches and logs are kept; default: nowhere"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, whatever the device; results are thrown away")
    parser.add_argument("--part", choices=sorted(BY_NAME), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    tiny = arguments.tiny or not has_gpu()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.part:
            return carry_out(BY_NAME[arguments.part], folder, tiny=tiny)
        if tiny:
            print(
                "Tiny models, for want of a GPU or as asked: these figures show that the parts work, and nothing else."
            )
        chosen = [part for part in PARTS if not arguments.only or part.name in arguments.only]
        outcomes = run_all(chosen, folder, 60 * arguments.minutes, tiny=tiny)
        print_table(chosen, outcomes, results_in(folder, tiny=tiny))
    if not tiny:
        page.write()
    return 0 if all(outcome == "done" for outcome in outcomes.values()) else 1


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def results_in(folder: Path, *, tiny: bool) -> Path:
    return folder / "tiny_results" if tiny else common.RESULTS


def run_all(parts: list[Part], folder: Path, seconds: float, *, tiny: bool) -> dict[str, str]:
    """What became of each part. on_gpu.json is written after each, so that it is there whatever comes."""
    results, ends = results_in(folder, tiny=tiny), time.monotonic() + seconds
    results.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, str] = {}
    took: dict[str, float] = {}
    for part in parts:
        began = time.monotonic()
        left = ends - began
        print(f"{part.name:20} {part.what} ...", flush=True)
        if part.unknown:
            outcomes[part.name] = f"skipped: train_network.py does not know {', '.join(part.unknown)}"
        elif left < LEAST_SECONDS:
            outcomes[part.name] = "skipped: no time left"
        else:
            (results / f"{part.result}.json").unlink(missing_ok=True)  # of an earlier time
            outcomes[part.name] = attempt(part, folder, min(left, part.seconds), tiny=tiny)
        took[f"{part.name}_seconds"] = round(time.monotonic() - began, 1)
        print(f"{'':20} {outcomes[part.name]}, {took[f'{part.name}_seconds']:.0f} s", flush=True)
        result = {"settings": {"minutes": seconds / 60}, "outcomes": outcomes, "measured": took, "targets": {}}
        write_json(results / "on_gpu.json", result | common.environment())
    return outcomes


def attempt(part: Part, folder: Path, seconds: float, *, tiny: bool) -> str:
    """Run a part, and say in a line how it ended."""
    log = folder / "logs" / f"{part.name}.txt"
    log.parent.mkdir(exist_ok=True)
    code = start(part, log, folder, seconds, tiny=tiny)
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code is None:
        return f"failed: took longer than {seconds:.0f} s"
    if code == 0:
        return "done"
    objections = [line for line in said if line.startswith("error: ")]
    reason = (objections or said or [f"exit code {code}"])[-1].removeprefix("error: ")
    return f"{'refused' if code == EXIT_BAD_INPUT else 'failed'}: {reason}"


def start(part: Part, log: Path, folder: Path, seconds: float, *, tiny: bool) -> int | None:
    """Carry a part out in a process of its own, with those that it starts; its exit code, None where it took too long."""
    words = [sys.executable, str(BENCHMARKS / "on_gpu.py"), "--part", part.name, "--folder", str(folder)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*words, *(["--tiny"] if tiny else [])], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()


def carry_out(part: Part, folder: Path, *, tiny: bool) -> int:
    """Run the benchmark of a part in this process; its exit code."""
    path, results = BENCHMARKS / part.script, results_in(folder, tiny=tiny)
    with (
        mock.patch.object(sys, "argv", [str(path), *part.words(tiny=tiny, folder=folder)]),
        mock.patch.object(common, "RESULTS", results),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def print_table(parts: list[Part], outcomes: dict[str, str], results: Path) -> None:
    """Targets first; of parts without one their step time and memory."""
    print(f"\n{'part':20} {'figure':28} {'measured':>10}  target")
    for part in parts:
        try:
            result: dict[str, Any] = read_json(results / f"{part.result}.json")
        except (UserError, OSError):
            print(f"{part.name:20} {outcomes[part.name]}")
            continue
        measured, targets = result["measured"], result["targets"]
        shown = [*targets, *(name for name in ("step_seconds", "peak_gb") if name in measured and name not in targets)]
        for name in shown:
            print(f"{part.name:20} {name:28} {measured[name]:10.4g}  {page.target(targets.get(name))}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part does not outlive this
    sys.exit(main(sys.argv[1:]))
