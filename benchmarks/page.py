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

| script | what it measures |
|---|---|
| `store_read.py` | samples a second from the LMDB stores into a training batch, beside a memcpy of the same bytes |
| `repa_step.py` | seconds, memory and data wait of a U-REPA step; full SD1.5 size on a GPU, the tiny model on a CPU |
| `merge.py` | seconds and memory of merging a LoRA into full-size SD1.5 or SDXL, beside `cp`, load-merge-save and another program |
| `train_network.py` | seconds and memory of a LoRA step at full size, as a user starts it, beside published figures |
| `cache_build.py` | images a second through the cache pipeline, beside decoding alone and encoding alone |
| `samplers.py` | seconds of a picture of one step by every sampler, full-size SD1.5 or SDXL with random weights |
| `optimize.py` | steps in which a study finds what random search finds; its parent's cost; eight parents on one database |
"""


def section(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"\n## {path.stem}\n"]
    lines.append(f"{result['device']}; torch {result['versions']['torch']}; {result['date'][:10]}")
    lines.append("; ".join(f"{name} {value}" for name, value in result["settings"].items()) + "\n")
    lines += ["| figure | measured | target |", "|---|---|---|"]
    for name, value in result["measured"].items():
        if not isinstance(value, int | float):  # details, which stay in the JSON, or nothing to tell
            continue
        if "_regret_at_" in name and not result["settings"].get(
            "full"
        ):  # one side stopped early: not of the same steps
            continue
        lines.append(f"| {name} | {value:.4g} | {target(result['targets'].get(name))} |")
    return "\n".join(lines) + "\n"


def target(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    bound = f">= {entry['at_least']}" if "at_least" in entry else f"<= {entry['at_most']}"
    met = {True: "met", False: "not met"}.get(entry["met"], entry["met"])
    return f"{bound}: {met}"


if __name__ == "__main__":
    page = HEAD + "".join(section(path) for path in sorted(RESULTS.glob("*.json")))
    write_text(RESULTS.parent / "README.md", page)
    print(page)
