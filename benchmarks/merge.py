"""Merging a rank-8 LoRA into a single file of full-size SD1.5 (fp16, 2.1 GB), beside cp, and beside load-merge-save in memory.

python benchmarks/merge.py [--repeats 5] [--folder /tmp]

Each measurement is a process of its own; seconds run from the end of its imports, memory is counted beyond them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import save
from full_size import random_checkpoint

RANK = 8
TARGETS = {"written_of_cp": 2.0, "peak_gb_beyond_libraries": 1.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the files go; 10 GB are needed")
    parser.add_argument("--worker", nargs=4, metavar=("WAY", "BASE", "LORA", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, *paths = arguments.worker
        print(json.dumps(work(way, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        base, lora = random_checkpoint(Path(folder) / "base.safetensors", "sd15"), Path(folder) / "lora.safetensors"
        make_lora(lora)
        settings = {"base": f"SD1.5 fp16, {base.stat().st_size / 1e9:.2f} GB", "rank": RANK, "page_cache": "warm"}
        save("merge", settings | {"repeats": arguments.repeats}, *summary(measure(base, lora, arguments.repeats)))


def measure(base: Path, lora: Path, repeats: int) -> list[dict[str, dict[str, float]]]:
    """Rounds of {way: {seconds, peak_gb}}; within a round the ways follow each other, and start from the same page cache."""
    rounds = []
    for _ in range(repeats):
        one = {}
        for way in ("cp", "cp_and_sync", "written", "whole", "in_memory"):
            out = base.with_name("out.safetensors")
            out.unlink(missing_ok=True)
            os.sync()
            one[way] = in_process(way, base, lora, out)
        rounds.append(one)
    return rounds


def in_process(way: str, base: Path, lora: Path, out: Path) -> dict[str, float]:
    if way in ("cp", "cp_and_sync"):
        warm(base)
        start = time.perf_counter()
        subprocess.run(["cp", base, out], check=True)
        if way == "cp_and_sync":
            subprocess.run(["sync", out], check=True)
        return {"seconds": time.perf_counter() - start, "peak_gb": 0.0}
    command = [sys.executable, __file__, "--worker", way, base, lora, out]
    answer = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


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
    before, start = _resident("VmRSS"), time.perf_counter()
    ways[way]()
    return {"seconds": time.perf_counter() - start, "peak_gb": _resident("VmHWM") - before}


def _resident(field: str) -> float:
    """VmRSS or VmHWM (the peak since it was reset) of this process, GB. getrusage's peak is inherited from the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(f"{field}:"))


def summary(rounds: list[dict[str, dict[str, float]]]) -> tuple[dict[str, float], dict[str, dict[str, object]]]:
    """Medians, ratios of medians within one run, and the targets."""
    seconds = {way: statistics.median(one[way]["seconds"] for one in rounds) for way in rounds[0]}
    fastest = {way: min(one[way]["seconds"] for one in rounds) for way in rounds[0]}
    measured = {f"{way}_seconds": value for way, value in seconds.items()}
    measured |= {f"{way}_fastest_seconds": value for way, value in fastest.items()}
    measured["written_of_cp"] = seconds["written"] / seconds["cp"]
    measured["written_of_cp_fastest"] = fastest["written"] / fastest["cp"]
    measured["whole_of_cp_and_sync"] = seconds["whole"] / seconds["cp_and_sync"]
    measured["in_memory_of_cp"] = seconds["in_memory"] / seconds["cp"]
    measured["peak_gb_beyond_libraries"] = max(one["whole"]["peak_gb"] for one in rounds)
    measured["in_memory_peak_gb"] = max(one["in_memory"]["peak_gb"] for one in rounds)
    targets = {name: {"at_most": bound, "met": measured[name] <= bound} for name, bound in TARGETS.items()}
    return measured, targets  # type: ignore[return-value]


def make_lora(path: Path) -> None:
    """A kohya file on the 128 attention projections of the conversion report."""
    import torch
    from accelerate import init_empty_weights
    from diffusers.models import UNet2DConditionModel
    from safetensors.torch import save_file

    from library.models.configs import configs_of
    from networks.adapter_export import adapter_tensors
    from networks.adapters import Adapter
    from networks.families import SD15, UNET
    from networks.kinds.lora import LoraModule
    from networks.names import Target
    from networks.spec import NetworkSpec
    from networks.targets import TRANSFORMER_PARENTS, layers_inside

    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(configs_of(SD15).unet)
    spec = NetworkSpec(rank=RANK, alpha=float(RANK), targets="attention")
    modules = {}
    for name, layer in layers_inside(unet, TRANSFORMER_PARENTS).items():
        if spec.size_of(target := Target(UNET, name), kernel=1) is not None:
            rows, columns = layer.weight.shape
            down, up = 0.02 * torch.randn(RANK, columns), 0.02 * torch.randn(rows, RANK)
            modules[target] = LoraModule(down, up, spec.alpha)
    save_file(adapter_tensors(Adapter(modules), "kohya"), path, metadata={"ss_base_model_version": "sd_v1"})


if __name__ == "__main__":
    shutil.which("cp") or sys.exit("this benchmark compares with cp, which is not here")
    main()
