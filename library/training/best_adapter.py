"""Finds the adapter with the best validation loss among those that a training saved.

python -m library.training.best_adapter outputs/mine
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from library.errors import EXIT_OK, UserError, script
from library.training.metrics_file import METRICS, metric_rows


@dataclass(frozen=True)
class Judged:
    """An adapter and the validation loss of the step in which it was saved."""

    file: Path
    step: int
    loss: float


def judged_adapters(folder: Path) -> list[Judged]:
    """The saved adapters of a run whose step was validated, the best first. folder: its output_dir.

    Where weights are averaged, validation judges the average, so NAME-ema.safetensors is taken for its step. Raises UserError
    where nothing was validated, or no adapter of a validated step is left.
    """
    from safetensors import safe_open

    metrics = folder / METRICS
    if not metrics.is_file():
        raise UserError(f"{folder} has no metrics.jsonl. Name the output_dir of a training.")
    losses = {row["step"]: row["val/loss"] for row in metric_rows(metrics) if row.get("val/loss") is not None}
    if not losses:
        raise UserError(f"{metrics} has no val/loss: no pictures were held out. Train with validation_split.")
    found: dict[int, Judged] = {}
    for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.stem.endswith("-ema")):
        with safe_open(path, "numpy") as file:
            step = int((file.metadata() or {}).get("ss_steps", -1))
        if step in losses:
            found[step] = Judged(path, step, losses[step])
    if not found:
        raise UserError(f"None of the adapters in {folder} was saved in a validated step ({_some(sorted(losses))}).")
    return sorted(found.values(), key=lambda adapter: adapter.loss)


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "")


@script
def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(
            "Name one folder, the output_dir of a training: python -m library.training.best_adapter outputs/mine"
        )
    adapters = judged_adapters(Path(argv[0]))
    for adapter in adapters:
        print(f"{adapter.loss:.5f}  step {adapter.step:6}  {adapter.file}")
    print(f"best: {adapters[0].file}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
