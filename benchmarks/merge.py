"""Merging a LoRA into a full-size single file (fp16) beside cp, and beside other ways to do it.

python benchmarks/merge.py [--family sd15] [--repeats 5] [--folder /tmp] [--other COMMAND]

SD1.5 (2.1 GB): rank 8 on the attention projections, beside load-merge-save in memory. SDXL (6.9 GB): a LoCon of all 1,052 modules,
rank 16. COMMAND is another program's, with {base}, {lora} and {out} for its files: whole, with its imports, as merge_lora.py is
then measured too. Every other measurement is a process of its own, its seconds run from the end of its imports, and its memory
is counted beyond them. CPU seconds are of user and system together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common import RESULTS, save
from full_size import random_checkpoint, random_lora

if TYPE_CHECKING:
    from networks.spec import NetworkSpec

TARGETS = {
    "sd15": {"written_of_cp": 2.0, "peak_gb_beyond_libraries": 1.2},
    "sdxl": {"whole_of_cp": 3.0, "peak_gb_beyond_libraries": 1.5},
}
COMMAND = f"{RESULTS.parents[1] / 'merge_lora.py'} --pretrained_model_name_or_path {{base}} --models {{lora}} --save_to {{out}}"
LORAS = {"sd15": "128 modules, rank 8", "sdxl": "1052 modules, rank 16"}
Round = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=TARGETS, default="sd15")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="for the files, which stay; 3 times the base's size is needed"
    )
    parser.add_argument("--continued", action="store_true", help="add to the rounds of the result that is there")
    parser.add_argument("--other", default=None, help="another program's command, with {base}, {lora} and {out}")
    parser.add_argument("--worker", nargs=4, metavar=("WAY", "BASE", "LORA", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, *paths = arguments.worker
        print(json.dumps(work(way, *map(Path, paths))))
        return
    name = "merge" if arguments.family == "sd15" else f"merge_{arguments.family}"
    rounds: list[Round] = []
    if arguments.continued:
        rounds = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["measured"]["rounds"]
    with tempfile.TemporaryDirectory() as folder:
        base, lora = ((arguments.folder or Path(folder)) / f"{what}.safetensors" for what in ("base", "lora"))
        if not base.exists():
            random_checkpoint(base, arguments.family)
        if not lora.exists():
            random_lora(lora, spec_of(arguments.family))
        rounds += [measure(arguments.family, base, lora, arguments.other) for _ in range(arguments.repeats)]
        size = f"{base.stat().st_size / 1e9:.2f} GB"
    settings = {
        "family": arguments.family,
        "base": f"fp16, {size}",
        "lora": LORAS[arguments.family],
        "page_cache": "warm",
    }
    save(name, settings | {"repeats": len(rounds)}, *summary(rounds, TARGETS[arguments.family]))


def spec_of(family: str) -> NetworkSpec:
    from networks.spec import NetworkSpec

    if family == "sd15":
        return NetworkSpec(rank=8, alpha=8.0, targets="attention", text_encoder=False)
    return NetworkSpec(family=family, rank=16, alpha=16.0, conv_rank=16, conv_alpha=16.0)


def measure(family: str, base: Path, lora: Path, other: str | None) -> Round:
    """{way: {seconds, cpu_seconds, peak_gb}}; the ways follow each other, and start from the same page cache."""
    commands = {"other": other, "command": f"{sys.executable} {COMMAND}"} if other else {}
    found = {}
    for way in ("cp", "cp_and_sync", "written", "whole", *(["in_memory"] if family == "sd15" else []), *commands):
        out = base.with_name("out.safetensors")
        for left in base.parent.glob("out*"):
            left.unlink()
        os.sync()
        if way in commands:
            words = shlex.split(commands[way])
            found[way] = outside([word.format(base=base, lora=lora, out=out) for word in words], base)
        elif way == "cp":
            found[way] = outside(["cp", str(base), str(out)], base)
        elif way == "cp_and_sync":
            found[way] = outside(["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(base), str(out)], base)
        else:
            command = [sys.executable, __file__, "--worker", way, str(base), str(lora), str(out)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way] = json.loads(answer.splitlines()[-1])
    return found


def outside(command: list[str], base: Path) -> dict[str, float]:
    """A command, from its start to its end. Its memory is what it had resident at most, pages of mapped files too."""
    warm(base)
    before, start, peak = os.times(), time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):  # it may just have ended
            peak = max(peak, _resident("VmHWM", process.pid))
        time.sleep(0.05)
    seconds, after = time.perf_counter() - start, os.times()
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{shlex.join(command)} failed: {process.stderr.read().decode()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gb": peak}


def warm(base: Path) -> None:
    """Into the page cache, right before the clock starts: some machines drop pages that lie idle for seconds."""
    subprocess.run(["cp", base, "/dev/null"], check=True)


def work(way: str, base: Path, lora: Path, out: Path) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file, save_file

    from library.files import whole_file
    from library.merging.layouts import Merging, single_file_tensors
    from library.merging.merge import fold, place
    from library.merging.merge_report import Ingredient
    from library.merging.source import read_source
    from library.merging.strength import Strength
    from library.merging.write import Output, write_merged
    from library.models.checkpoint import open_checkpoint
    from library.models.locate import BaseLocation
    from library.models.tensor_files import write_tensor_file
    from networks.families import SD15
    from networks.original_names import original_place

    def merging() -> tuple[Merging, Ingredient]:
        source = read_source(lora)
        checkpoint = open_checkpoint(BaseLocation(base.name, base))
        folds = place([(source.adapter, Strength())], checkpoint.shapes, checkpoint.family)
        return Merging(checkpoint, folds), Ingredient(source, Strength())

    def written() -> None:
        """The merge alone, as cp does: no verification, no hashes, no flush."""
        write_tensor_file(out, single_file_tensors(merging()[0]), {"format": "pt"})

    def whole() -> None:
        """All that merge_lora.py does: merged, flushed, read back and verified, inputs hashed, reported."""
        plan, ingredient = merging()
        write_merged(plan, [ingredient], Output(None, out))

    def in_memory() -> None:
        """The usual way: everything loaded, merged, saved."""
        tensors, source = load_file(base), read_source(lora)
        for target, module in source.adapter.modules.items():
            key = original_place(SD15, target.component, f"{target.path}.weight").key
            tensors[key] = fold(tensors[key], [(module, 1.0)]).to(torch.float16)
        with whole_file(out) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    ways: dict[str, Callable[[], None]] = {"written": written, "whole": whole, "in_memory": in_memory}
    warm(base)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start, used = _resident("VmRSS"), time.perf_counter(), time.process_time()
    ways[way]()
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gb": _resident("VmHWM") - before}


def _resident(field: str, process: int | str = "self") -> float:
    """VmRSS or VmHWM (the peak since it was reset) of a process, GB. getrusage's peak is inherited from the parent."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(f"{field}:"))


def summary(rounds: list[Round], bounds: dict[str, float]) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """Medians, ratios of medians within one run, and the targets."""

    def median(way: str, field: str) -> float:
        return statistics.median(one[way][field] for one in rounds)

    measured: dict[str, object] = {}
    for way in rounds[0]:
        seconds = measured[f"{way}_seconds"] = median(way, "seconds")
        measured[f"{way}_fastest_seconds"] = min(one[way]["seconds"] for one in rounds)
        measured[f"{way}_cpu_seconds"] = median(way, "cpu_seconds")
        measured[f"{way}_of_cp"] = seconds / median("cp", "seconds")
    measured["whole_of_cp_and_sync"] = median("whole", "seconds") / median("cp_and_sync", "seconds")
    measured["peak_gb_beyond_libraries"] = max(one["whole"]["peak_gb"] for one in rounds)
    for way in rounds[0].keys() & {"in_memory", "command", "other"}:
        measured[f"{way}_peak_gb"] = max(one[way]["peak_gb"] for one in rounds)
    if "other" in rounds[0]:
        measured["command_of_other"] = median("command", "seconds") / median("other", "seconds")
    measured["rounds"] = rounds
    targets = {name: {"at_most": bound, "met": measured[name] <= bound} for name, bound in bounds.items()}  # type: ignore[operator]
    return measured, targets


if __name__ == "__main__":
    shutil.which("cp") or sys.exit("this benchmark compares with cp, which is not here")
    main()
