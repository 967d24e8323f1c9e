"""Make benchmarks/README.md of the results in benchmarks/results.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS

from library.files import write_text

HEAD = """# Benchmarks

One script for each figure; each writes a JSON file with settings, versions and device, and `python benchmarks/page.py` makes this
page of them. Ratios are measured side by side in one run: on a shared machine the absolute rates mean little.

`benchmarks/on_gpu.sh` runs what is to be measured on a GPU, in order of worth ([gpu](../docs/gpu.md)).

| script | what it measures |
|---|---|
| `store_read.py` | samples a second from the LMDB stores into a training batch, beside a memcpy of the same bytes |
| `repa_step.py` | seconds, memory and data wait of a U-REPA step; full SD1.5 size on a GPU, the tiny model on a CPU |
| `alignment_recipes.py` | what each way to align costs a step beside lambda 0: measured on the tiny model, counted at full size |
| `merge.py` | seconds and memory of merging a LoRA into full-size SD1.5 or SDXL, beside `cp`, load-merge-save and another program |
| `train_network.py` | seconds and memory of a LoRA step at full size, as a user starts it, beside published figures |
| `beside.py` | start, step and memory of a LoRA training beside other programs, in turn on the same cores |
| `profile_step.py` | which of torch's operations a LoRA step spends its time in |
| `resume.py` | whether a training resumed halfway ends with the same bits, and what deterministic kernels cost |
| `count_step.py` | kernel launches, FLOP, bytes and memory of a step at full size, counted on the meta device without a GPU |
| `cache_build.py` | images a second through the cache pipeline, beside decoding alone and encoding alone |
| `samplers.py` | seconds of a picture of one step by every sampler, full-size SD1.5 or SDXL with random weights |
| `optimize.py` | steps in which a study finds what random search finds; its parent's cost; eight parents on one database |
"""

KOHYA, PLAIN = "kohya's sd-scripts", "diffusers and PEFT"
HEADLINES = (
    ("beside_sd15_256_cpu", "A LoRA step of SD1.5 at 256 px, float32, two CPU cores",
     "ours_step_seconds", {KOHYA: "kohya_step_seconds", PLAIN: "plain_step_seconds"}),
    ("beside_sd15_256_cpu", "From the command to the end of its first step",
     "ours_first_step_seconds", {KOHYA: "kohya_first_step_seconds", PLAIN: "plain_first_step_seconds"}),
    ("beside_sd15_256_cpu", "Peak memory of that training",
     "ours_peak_pss_gb", {KOHYA: "kohya_peak_pss_gb", PLAIN: "plain_peak_pss_gb"}),
    ("merge_sdxl", "Merging a LoRA into SDXL and verifying it",
     "command_seconds", {KOHYA: "other_seconds", "`cp`": "cp_seconds"}),
    ("merge_sdxl", "Peak memory of that merge", "command_peak_gb", {KOHYA: "other_peak_gb"}),
    ("cache_decode", "Pictures of 1024 px decoded and cut, a second",
     "1024_to_1024_pipeline_per_second", {"decoding alone": "1024_to_1024_decode_only_per_second"}),
    ("store_read", "Latents read from a store into batches, a second", "latents_per_second", {}),
    ("optimize_search", "Share of random search's steps in which a study finds as good a recipe", "median_share_of_steps", {}),
)  # fmt: skip
"""The result, what was measured, the figure, and what it stands beside."""

UNITS = {"seconds": "s", "gb": "GB", "gib": "GiB"}
"""By a word of a figure's name."""


def write() -> str:
    """The page, written."""
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    text = HEAD + headlines(results) + glance(results) + "".join(section(path) for path in results)
    write_text(RESULTS.parent / "README.md", text)
    return text


def headlines(results: dict[Path, dict[str, Any]]) -> str:
    """The figures that a reader comes for, in words."""
    by_name = {path.stem: result for path, result in results.items()}
    rows = [
        f"| [{what}](#{stem}) | {number(here, by_name[stem])} | "
        f"{', '.join(f'{program} {number(name, by_name[stem])}' for program, name in others.items())} |"
        for stem, what, here, others in HEADLINES
        if stem in by_name
    ]
    head = ["\n## At a glance\n", "| | here | beside it |", "|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def glance(results: dict[Path, dict[str, Any]]) -> str:
    """A row for each target: those missed first, then those met, then those that nobody could measure."""
    order = {False: 0, True: 1}
    rows = []
    for path, result in results.items():
        for name, entry in result["targets"].items():
            met = verdict(entry).partition(":")[0]  # why it could not be measured is told below
            row = f"| {met} | [{path.stem}](#{path.stem}) | {words(name)} | {number(name, result)} | {bound(entry)} |"
            rows.append((order.get(entry["met"], 2), row))
    counts = [sum(place == wanted for place, _ in rows) for wanted in range(3)]
    head = [
        "\n## Targets\n",
        f"{counts[1]} met, {counts[0]} missed, {counts[2]} not measured.\n",
        "| | result | figure | measured | target |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row for _, row in sorted(rows, key=lambda row: row[0]))]) + "\n"


def section(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"\n## {path.stem}\n"]
    lines.append(f"{result['device']}; torch {result['versions']['torch']}; {result['date'][:10]}")
    lines.append("; ".join(f"{name} {value}" for name, value in result["settings"].items()) + "\n")
    if outcomes := result.get("outcomes"):  # of on_gpu.py
        lines += [
            "| part | outcome |",
            "|---|---|",
            *(f"| {name} | {said.replace('|', '/')} |" for name, said in outcomes.items()),
            "",
        ]
    targets = result["targets"]
    lines += ["| figure | measured | target |", "|---|---|---|"] if targets else ["| figure | measured |", "|---|---|"]
    for name, value in result["measured"].items():
        if not isinstance(value, int | float):  # details, which stay in the JSON, or nothing to tell
            continue
        if "_regret_at_" in name and not result["settings"].get(
            "full"
        ):  # one side stopped early: not of the same steps
            continue
        row = f"| {words(name)} | {number(name, result)} |"
        lines.append(f"{row} {target(targets.get(name))} |" if targets else row)
    return "\n".join(lines) + "\n"


def words(name: str) -> str:
    """A figure's name without its unit."""
    return " ".join(word for word in name.split("_") if word not in UNITS) or name


def number(name: str, result: dict[str, Any]) -> str:
    """A figure with its unit."""
    value = result["measured"][name]
    words = [] if "_of_" in name else name.split("_")  # of another one: a ratio
    unit = next((f" {UNITS[word]}" for word in words if word in UNITS), "")
    return f"{value:,.0f}{unit}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}{unit}"


def target(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{bound(entry)}: {verdict(entry)}"


def bound(entry: dict[str, Any]) -> str:
    return f">= {entry['at_least']}" if "at_least" in entry else f"<= {entry['at_most']}"


def verdict(entry: dict[str, Any]) -> str:
    return {True: "met", False: "**missed**"}.get(entry["met"], entry["met"])


if __name__ == "__main__":
    print(write())
