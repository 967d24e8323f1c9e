"""OUTPUT/run.html: what people look at while a run goes on, made of metrics.jsonl and the samples: a restart loses nothing."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from library.data.collect import TrainingData
from library.errors import Stopped
from library.progress import clock_text
from library.report.curves import Chart, Curve, Point
from library.report.page import WEBP_QUALITY, Embedded, Page
from library.training.loop import Run
from library.training.metrics_file import METRICS, metric_rows
from library.training.output import RUN_PAGE
from library.training.seen import Sight
from library.training.task import LoraTask
from library.words import plural

EVERY = 60.0
"""Seconds after which the page is written though nothing was validated, drawn or saved."""
RELOAD = 20.0
POINTS = 200
"""Of a curve, at most."""
FRAMES, FEWEST_FRAMES, SIDE = 240, 8, 256
"""Samples on the page, over all prompts; of one prompt at least; pixels."""
SHEETS = 24
"""Of what the U-Net sees, at most."""
WIDE = (420, 190)
FINISHED = "Finished"

_SAMPLE = r"_(?P<epoch>e?)(?P<place>\d{6,})_(?P<number>\d{2,})_(?P<date>\d{14})_(?P<seed>\d+)\.png"


@dataclass
class RunPage:
    """Called with a step, writes the page; a context that writes it once more at the end, however that comes.

    Whatever goes wrong with it is said once, and the training goes on.
    """

    run: Run
    name: str
    data: TrainingData
    options: Mapping[str, Any]
    step: int
    sight: Sight | None = None
    ended: str | None = None
    """How the run ended, in words."""
    _frames: dict[Path, tuple[Embedded, str]] = field(default_factory=dict)
    """Samples by file, with their prompts."""
    _sheets: dict[int, tuple[Embedded, str]] = field(default_factory=dict)
    """What the U-Net saw, by step."""
    _written: float = field(default_factory=time.monotonic)
    _failed: bool = False

    @classmethod
    def of(
        cls, run: Run, task: LoraTask, data: TrainingData, options: Mapping[str, Any], step: int
    ) -> AbstractContextManager[RunPage | None]:
        """The page of the main process; the others have none."""
        if not run.processes.is_main:
            return nullcontext()
        sees = task.alignment is not None and task.alignment.options.needs_teacher
        sight = Sight(task, data) if sees else None
        return cls(run, run.output.output_name, data, options, step, sight)

    def __enter__(self) -> RunPage:
        self(self.step)
        if not self._failed:
            self.run.processes.say(f"open {self.run.output.output_dir / RUN_PAGE} in a browser to watch the run")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.ended = f"{FINISHED} at step {self.step}."
        elif isinstance(error, Stopped):
            self.ended = str(error)
        else:
            self.ended = f"Ended at step {self.step}: {str(error) or type(error).__name__}"
        self(self.step)

    def due(self, step: int) -> bool:
        """Whether it is a minute old: before the first validation it shows how the losses begin."""
        self.step = step
        return time.monotonic() - self._written >= EVERY

    def __call__(self, step: int) -> None:
        self.step, self._written = step, time.monotonic()
        try:
            self.page().write(self.run.output.output_dir / RUN_PAGE)
        except Exception as error:  # whatever it is, the training is worth more
            if not self._failed:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.run.processes.say(f"warning: {RUN_PAGE} could not be written, and the run goes on: {reason}")
            self._failed = True

    def page(self) -> Page:
        last, rows = self.run.plan.last_step, metric_rows(self.run.output.output_dir / METRICS)
        page = Page(f"{self.name}: step {self.step} of {last}", self._lead(rows), None if self.ended else RELOAD)
        if self.ended:
            (page.paragraph if self.ended.startswith(FINISHED) else page.notice)(self.ended)
        self._samples(page)
        self._seen(page)
        page.heading("Curves")
        charts = [chart for chart in _charts(rows) if chart.curves]
        page.charts(
            charts or [Chart("Loss", [])],
            "Lines are running means of what was logged, bands one standard deviation around them. The gap is the loss of held-out "
            "pictures minus that of as many training pictures: where it grows, the run memorises."
            if "val/gap" in {name for row in rows for name in row}
            else "Lines are running means of what was logged, bands one standard deviation around them.",
        )
        if self.run.processes.warnings:
            page.heading("Warnings")
            for words in dict.fromkeys(self.run.processes.warnings):
                page.notice(words)
        self._data(page)
        page.heading("Options")
        given = {name: value for name, value in self.options.items() if value is not None}
        page.code("\n".join(f"{name} = {_shown(value)}" for name, value in given.items()), "All options")
        return page

    def _lead(self, rows: Sequence[Mapping[str, Any]]) -> str:
        newest = {name: value for row in rows for name, value in row.items()}
        parts = [f"{label} {newest[name]:.4f}" for label, name in (("loss", "train/loss"), ("validation", "val/loss"),
                 ("token", "train/token")) if name in newest]  # fmt: skip
        if "time/step_ms" in newest:
            parts.append(f"{newest['time/step_ms']:.0f} ms a step")
            left = (self.run.plan.last_step - self.step) * newest["time/step_ms"] / 1000
            parts += [f"about {clock_text(left)} left"] if not self.ended and left > 0 else []
        return ", ".join(parts)

    # ------------------------------------------------------------------------------------------------ pictures

    def _samples(self, page: Page) -> None:
        strips = self._strips()
        if not strips:
            return
        page.heading("Samples")
        most = max(FEWEST_FRAMES, FRAMES // len(strips))
        for number, files in sorted(strips.items()):
            chosen = _thinned(sorted(files.items()), most)
            shown = [(step, *self._frame(path)) for step, path in chosen]
            page.heading(shown[-1][2], level=3)
            page.strip(f"sample {number}", [(picture, f"step {step}") for step, picture, _ in shown])
            if len(chosen) < len(files):
                page.paragraph(f"{len(chosen)} of {plural(len(files), 'sample')}, evenly chosen.")

    def _strips(self) -> dict[int, dict[int, Path]]:
        """Number of the prompt -> step -> the newest file."""
        pattern, strips = re.compile(re.escape(self.name) + _SAMPLE), dict[int, dict[int, Path]]()
        for path in sorted((self.run.output.output_dir / "sample").glob("*.png")):  # of one step by date
            if (found := pattern.fullmatch(path.name)) is not None:
                step = int(found["place"]) * (self.run.plan.steps_per_epoch if found["epoch"] else 1)
                if step <= self.step:
                    strips.setdefault(int(found["number"]), {})[step] = path
        return strips

    def _frame(self, path: Path) -> tuple[Embedded, str]:
        if path not in self._frames:
            with Image.open(path) as picture:
                words = str(picture.info.get("parameters", "")).split("\nNegative prompt:")[0].split("\nSteps:")[0]
                self._frames[path] = Embedded(picture.convert("RGB"), SIDE, WEBP_QUALITY), words or path.stem
        return self._frames[path]

    def _seen(self, page: Page) -> None:
        if self.sight is None:
            return
        if self.step not in self._sheets and (not self._sheets or self._validated(self.step)):
            with self.run.trained.judged():
                sheet, cosine = self.sight.sheet()
            self._sheets[self.step] = Embedded(sheet, 512, WEBP_QUALITY), f"step {self.step}: cosine {cosine:.3f}"
            kept = _thinned(sorted(self._sheets), SHEETS)
            self._sheets = {step: self._sheets[step] for step in kept}
        page.heading("What the U-Net sees")
        page.paragraph(
            "Held-out pictures, the teacher's tokens of them, what the head predicts from the U-Net's map of the noised picture, "
            "the cosine of the two (red 1, grey 0, blue -1), and that map itself, each as its first three principal components."
        )
        page.strip("seen", [frame for _, frame in sorted(self._sheets.items())], max_side=512)

    def _validated(self, step: int) -> bool:
        return step >= self.run.plan.last_step or self.run.validation_comes(step) or not self.run.validates

    # -------------------------------------------------------------------------------------------------- words

    def _data(self, page: Page) -> None:
        data = self.data
        page.heading("Data")
        rows: list[Sequence[str | int]] = [("trained on", len(data.training)), ("held out", len(data.validation))]
        rows += [("left out", len(data.dropped))] if data.dropped else []
        if data.classes is not None:
            rows += [(one.name, one.source.describe()) for one in data.classes.sets]
        page.table(["", ""], rows)
        if data.classes is None:
            for dataset, table in zip(data.datasets, data.tables, strict=True):
                page.code(f"dataset {dataset.name}, batch size {dataset.batch_size}\n{table}")
        if data.dropped:
            page.table(["left out", "why"], list(data.dropped.items())[:20])
        for note in data.notes:
            (page.notice if note.startswith("warning") else page.paragraph)(note)


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    names = dict.fromkeys(name for row in rows for name in row)
    reference = {name: value for row in rows for name, value in row.items() if name.startswith("reference/")}

    def chart(title: str, *wanted: str, lines: Mapping[str, float] | None = None, log: bool = False) -> Chart:
        curves = [_curve(rows, name) for name in wanted if name in names]
        return Chart(title, curves, "step", lines or {}, log=log, size=WIDE)

    base = {"frozen base": reference[key]} if (key := "reference/frozen_base_loss") in reference else {}
    constant = {"best constant": reference[key]} if (key := "reference/constant_token_loss") in reference else {}
    rates = [name for name in names if name.startswith("lr/")]
    return [
        chart("Loss", "train/diffusion" if "lambda" in names else "train/loss", lines=base),
        chart("Validation", "val/loss", "val/train_loss", lines=base),
        chart("Gap of the validation", "val/gap", lines={"no gap": 0.0}),
        chart("Token loss", "train/token", "val/token", lines=constant),
        chart("Manifold loss", "train/manifold", "val/manifold"),
        chart("lambda", "lambda"),
        chart("Learning rates", *rates),
        chart("Gradient norm", "train/grad_norm", log=True),
        chart("Speed, pictures a second", "time/samples_per_second"),
    ]


TITLES = {
    "train/diffusion": "training",
    "train/loss": "training",
    "val/loss": "held out",
    "val/train_loss": "training pictures",
}


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Its running mean, of few points the points; with a band where there are enough for one."""
    label = TITLES.get(name, name.split("/")[-1].replace("_", " "))
    if name in ("train/token", "train/manifold"):
        label = "training"
    elif name in ("val/token", "val/manifold"):
        label = "held out"
    points = [(float(row["step"]), float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    if name.startswith(("val/", "lr/", "lambda")) or len(points) < 10:
        return Curve(label, _thinned(points, POINTS))
    means, deviations = running(np.array([value for _, value in points]), max(3, len(points) // 15))
    shown: list[tuple[Point, Point]] = [
        ((step, mean), (mean - deviation, mean + deviation))
        for (step, _), mean, deviation in zip(points, means.tolist(), deviations.tolist(), strict=True)
    ]
    shown = _thinned(shown, POINTS)
    return Curve(label, [point for point, _ in shown], [band for _, band in shown])


def running(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the `width` values around each; at the ends of those that there are."""
    centred = values - values.mean()
    sums = [np.concatenate([[0.0], np.cumsum(centred**power)]) for power in (1, 2)]
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    means, squares = ((one[high] - one[low]) / (high - low) for one in sums)
    return means + values.mean(), np.sqrt(np.maximum(squares - means**2, 0.0))


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly chosen, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
