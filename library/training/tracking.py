"""What a run says about itself: status line, TensorBoard and metrics.jsonl, from values kept on the device till then."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from library.errors import Diverged
from library.files import write_text
from library.progress import clock_text


class MetricWindow:
    """Loss parts of the steps since the last report, on the device; read in one transfer."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[torch.Tensor] = []
        self._steps: list[int] = []
        self._samples: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, metrics: dict[str, torch.Tensor], samples: np.ndarray) -> None:
        self._names = list(metrics)
        self._rows.append(torch.stack([value.detach().float() for value in metrics.values()]))
        self._steps.append(step)
        self._samples.append(samples)

    def read(self) -> tuple[list[str], list[int], torch.Tensor, list[np.ndarray]]:
        """(names, steps, values [steps, names] still on the device, sample indices of each step), and start anew."""
        window = self._names, self._steps, torch.stack(self._rows), self._samples
        self._rows, self._steps, self._samples = [], [], []
        return window


class AnomalyWatch:
    """Steps whose manifold loss leaves its running median far behind, and steps that are no numbers at all."""

    def __init__(self, path: Path, factor: float = 5.0, memory: int = 200, warm: int = 20) -> None:
        self.path, self.factor, self.warm = path, factor, warm
        self._recent: deque[float] = deque(maxlen=memory)

    def is_anomalous(self, values: dict[str, float]) -> bool:
        if "manifold" not in values or len(self._recent) < self.warm:
            return False
        return values["manifold"] > self.factor * statistics.median(self._recent) > 0

    def record(self, step: int, values: dict[str, float], sample_ids: list[str]) -> str:
        """Append an anomalous step to the file; a sentence about it."""
        manifold, median = values["manifold"], statistics.median(self._recent)
        with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "median": median, "samples": sample_ids, **values}) + "\n")
        return f"step {step}: manifold loss {manifold:.4g} is {manifold / median:.0f} times its running median {median:.4g}"

    def remember(self, values: dict[str, float]) -> None:
        if "manifold" in values:
            self._recent.append(values["manifold"])

    @staticmethod
    def is_not_finite(values: dict[str, float]) -> bool:
        return not all(math.isfinite(value) for value in values.values())

    @staticmethod
    def refuse_non_finite(step: int, values: dict[str, float], sample_ids: list[str], last_state: Path | None) -> None:
        """Raise Diverged with step, components and sample ids where a value is not finite."""
        bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            kept = f"The last good state is {last_state}" if last_state else "No state had been saved yet"
            raise Diverged(
                f"step {step}: {', '.join(bad)} (all parts: {', '.join(f'{n} {v:.4g}' for n, v in values.items())}). "
                f"Samples of that step: {', '.join(sample_ids)}. {kept}. Lower the learning rate, or check these samples "
                "with prepare_cache.py --verify."
            )


class Clock:
    """Time spent training and time spent on everything else (validation, saving), apart."""

    def __init__(self) -> None:
        self.train = 0.0
        self.other = 0.0
        self._mark = time.perf_counter()

    def to_train(self) -> None:
        """What went since the last mark was training."""
        now = time.perf_counter()
        self.train, self._mark = self.train + now - self._mark, now

    def to_other(self) -> None:
        now = time.perf_counter()
        self.other, self._mark = self.other + now - self._mark, now


def status_words(epoch: str, values: dict[str, float], left: float | None, width: int) -> str:
    """What a line tells people, in at most `width` characters: where it is too narrow, the least telling parts go.

    values: the row that goes to the metrics, or nothing before there is one. left: seconds, None where it is not known.
    """
    # (in which order parts go, the part)
    parts = [(6, epoch)]
    if left is not None:
        parts.append((9, f"left {clock_text(left)}"))
    if "lambda" in values:
        parts.append((8, f"L_diff {values['train/diffusion']:.4f}"))
        parts += [
            (5, f"{name} {values[f'train/{name}']:.3f}") for name in ("token", "manifold") if f"train/{name}" in values
        ]
        parts.append((7, f"lambda {values['lambda']:.2g}"))
    elif values:
        parts.append((8, f"loss {values['train/loss']:.4f}"))
    if values:
        parts.append((4, f"lr {next(value for name, value in values.items() if name.startswith('lr/')):.1e}"))
        parts.append((3, f"{values['time/step_ms']:.0f} ms"))
        parts.append((1, f"{values['time/samples_per_second']:.4g} img/s"))
        parts.append((0, f"wait {100 * values['time/data_wait_share']:.1f}%"))
    if "memory/peak_gb" in values:
        parts.append((1, f"{values['memory/peak_gb']:.0f}/{values['memory/total_gb']:.0f} GB"))
    while len(line := "  ".join(text for _, text in parts)) > width and len(parts) > 1:
        parts.remove(min(parts, key=lambda part: part[0]))
    return line


class MetricLog:
    """Rows {"step": n, name: value, ...} to metrics.jsonl and to TensorBoard. Only the main process makes one.

    On resume, rows after the state's step go: the run writes them again.
    """

    def __init__(self, jsonl: Path, tensorboard: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        jsonl.parent.mkdir(parents=True, exist_ok=True)
        if jsonl.exists():
            write_text(jsonl, "".join(f"{line}\n" for line in _rows_until(jsonl, step)))
        self._file = open(jsonl, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def add(self, step: int, values: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            # A full disk must not end a run that could still save its state elsewhere in time.
            print(f"warning: step {step} could not be written to {self._file.name}: {error.strerror}.", file=sys.stderr)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def text(self, name: str, text: str) -> None:
        self._board.add_text(name, text)

    def picture(self, name: str, picture: Any, step: int) -> None:
        """picture: a PIL image."""
        self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _rows_until(path: Path, step: int) -> list[str]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            break  # torn by a kill: the last line
        if row["step"] <= step:
            lines.append(line)
    return lines
