"""The study's plots and its sheet of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from library.files import read_json, whole_file, write_text
from library.inference.grids import grid
from library.report.template import COLOURS
from tools.alignment_study.arms import Arm
from tools.alignment_study.compare import MEASURES, with_numbers
from tools.alignment_study.measure import MEASURED, measured_folder
from tools.alignment_study.settings import CONCEPT, Folders, Run, in_order
from tools.alignment_study.subjects import Subject
from tools.alignment_study.svg import Panel, Series, chart

BLUE, *_, GREY = COLOURS
ARM_COLOURS = COLOURS[:-1]
"""Of the first arms; those after them have the same once more, dashed."""
SHOWN = ("right", "likeness", "likeness_clip", "drift", "right_old", "loss", "linear_probe", "token_cosine_centred")
GAPS = {"val/loss": "all timesteps", "val/loss_q1": "quarter 1", "val/loss_q4": "quarter 4"}
BY_TIMESTEP = {
    "linear_probe": "Linear probe",
    "knn_accuracy": "kNN accuracy",
    "token_cosine_centred": "Token cosine, centred",
}
COURSE = ("right", "kid")
SHEET_COLUMNS, TILE = 9, 80

Arms = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Arm -> seed -> numbers."""


def write_figures(
    study: str, found: Mapping[str, Any], runs: Sequence[Run], folders: Folders, subject: Subject, into: Path
) -> None:
    """The study's figures in `into`, of the kinds of `page.CAPTIONS`. found: its numbers, as in the results."""
    for earlier in into.glob(f"{study}_*.*"):
        earlier.unlink()
    arms = {arm: with_numbers(some) for arm, some in found["arms"].items()}
    figures = {f"{study}_numbers.svg": numbers(found["base"], arms)}
    if "course" in found:
        figures[f"{study}_course.svg"] = course(found["course"])
    if "gradients" in found:
        figures[f"{study}_gradients.svg"] = gradients(found["gradients"])
    if study != CONCEPT:
        kept = {run: read_json(folders.run(run) / MEASURED) for run in runs}
        figures[f"{study}_loss.svg"] = curves(kept)
        of_base = read_json(measured_folder(None, study, folders) / MEASURED)
        figures[f"{study}_features.svg"] = features(of_base["features"], kept)
    for name, text in figures.items():
        write_text(into / name, text)
    with whole_file(into / f"{study}_pictures.jpg") as temporary:
        sheet(study, runs, folders, subject).save(temporary, "JPEG", quality=82)


def numbers(base: Mapping[str, float], arms: Arms) -> str:
    """A panel for each measure: a line for each seed from arm to arm, and the untouched base."""
    panels = []
    names = list(arms)
    for measure in SHOWN:
        if any(measure not in one for arm in arms.values() for one in arm.values()):
            continue
        series = [
            Series("a seed", BLUE, [(place, arms[arm][seed][measure]) for place, arm in enumerate(names)])
            for seed in sorted(set.intersection(*(set(arm) for arm in arms.values())))
        ]
        if measure in base:
            ends = [(0.0, base[measure]), (len(names) - 1.0, base[measure])]
            series.append(Series("untouched base", GREY, ends, dashed=True, marks=False))
        ticks = [(float(place), _arm_title(arm)) for place, arm in enumerate(names)]
        panels.append(Panel(MEASURES[measure].title, ticks, series))
    return chart(panels, 4)


def course(found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """Arm -> seed -> step -> numbers, over the steps."""
    steps = [int(step) for step in next(iter(next(iter(found.values())).values()))]
    panels = []
    for key in COURSE:
        series = [
            _banded(arm, place, [(float(step), [one[str(step)][key] for one in seeds.values()]) for step in steps])
            for place, (arm, seeds) in enumerate(found.items())
        ]
        panels.append(Panel(MEASURES[key].title, [(float(step), f"{step}") for step in steps], series))
    return chart(panels, len(panels))


def curves(kept: Mapping[Run, Mapping[str, Any]]) -> str:
    """Validation loss over the steps, mean of the seeds; and what each arm has more than the one without, seed by seed.

    Validation noise is the seed's own, so that seeds lie further apart than arms; in the differences that cancels.
    """
    arms = _by_arm(kept)
    runs = {arm: {run.seed: _by_step(one["validation"]) for run, one in some.items()} for arm, some in arms.items()}
    steps = sorted(set.intersection(*(set(rows) for some in runs.values() for rows in some.values())))
    ticks = [(0.0, "0"), (steps[-1] / 2, f"{steps[-1] // 2}"), (float(steps[-1]), f"{steps[-1]}")]
    means = []
    for place, (arm, some) in enumerate(runs.items()):
        points = [(step, fmean(rows[step]["val/loss"] for rows in some.values())) for step in steps]
        means.append(_series(arm, place, points))
    panels = [Panel("Loss, mean of the seeds", ticks, means)]
    for key, title in GAPS.items():
        if not all(key in rows[step] for some in runs.values() for rows in some.values() for step in steps):
            continue
        series = [Series("", GREY, [(0.0, 0.0), (steps[-1], 0.0)], dashed=True, marks=False)]
        for place, (arm, some) in list(enumerate(runs.items()))[1:]:
            pairs = [(some[seed], runs["0"][seed]) for seed in sorted(some.keys() & runs["0"].keys())]
            rows = [
                (float(step), [with_[step][key] - without[step][key] for with_, without in pairs]) for step in steps
            ]
            series.append(_banded(arm, place, rows))
        panels.append(Panel(f"Difference, {title}", ticks, series))
    return chart(panels, 4)


def gradients(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Arm -> seed -> step -> cosine: a panel for each arm, a line for each seed, until alignment ended."""
    panels = []
    for arm, seeds in found.items():
        lines = [[(float(step), cosine) for step, cosine in one.items()] for one in seeds.values()]
        last = max(step for points in lines for step, _ in points)
        zero = Series("", GREY, [(0.0, 0.0), (last, 0.0)], dashed=True, marks=False)
        ticks = [(0.0, "0"), (last / 2, f"{last / 2:.0f}"), (last, f"{last:.0f}")]
        panels.append(Panel(_arm_title(arm), ticks, [zero, *(Series("a seed", BLUE, points) for points in lines)]))
    return chart(panels, max(2, len(panels)))


def _by_step(rows: Sequence[Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    return {int(row["step"]): row for row in rows}


def features(base: Sequence[Mapping[str, float]], kept: Mapping[Run, Mapping[str, Any]]) -> str:
    """What can be read off the trunk over the timesteps, which stand at equal distances."""
    panels = []
    for key, title in BY_TIMESTEP.items():
        if key not in base[0]:
            continue
        series = [Series("untouched base", GREY, [(float(x), row[key]) for x, row in enumerate(base)], dashed=True)]
        for place, (arm, some) in enumerate(_by_arm(kept).items()):
            columns = zip(*(one["features"] for one in some.values()), strict=True)
            series.append(
                _banded(arm, place, [(float(x), [row[key] for row in rows]) for x, rows in enumerate(columns)])
            )
        panels.append(Panel(title, [(float(x), f"{row['timestep']:g}") for x, row in enumerate(base)], series))
    return chart(panels, 3)


def sheet(study: str, runs: Sequence[Run], folders: Folders, subject: Subject) -> Image.Image:
    """Held-out pictures, and what base and arms draw of the same prompts and seed; the first training seed, the first noise."""
    places = _shown_places(subject)
    first = min(run.seed for run in runs)
    arms = in_order(run for run in runs if run.seed == first)
    rows: dict[str, list[Image.Image]] = {"held out": [_photo(subject, number, seed) for number, seed in places]}
    for name, run in [("base", None), *((run.arm.label, run) for run in arms)]:
        folder = measured_folder(run, study, folders) / "drawn"
        rows[name] = [Image.open(folder / f"new_{number:02d}_{seed}.png").convert("RGB") for number, seed in places]
    pictures = [one.resize((TILE, TILE), Image.Resampling.LANCZOS) for row in rows.values() for one in row]
    headings = None if study == CONCEPT else [subject.asked_new[number] for number, _ in places]
    return grid(pictures, len(places), column_headings=headings, row_headings=list(rows))


def _shown_places(subject: Subject) -> list[tuple[int, int]]:
    """(prompt, seed): the first seed of each prompt, then the next."""
    count = min(SHEET_COLUMNS, len(subject.new.requests))
    return [(number, subject.new.seeds[0]) for number in range(count)]


def _photo(subject: Subject, number: int, seed: int) -> Image.Image:
    kind = subject.asked_new[number]
    of_kind = [photo.picture for photo, one in zip(subject.photos, subject.kinds, strict=True) if one == kind]
    return of_kind[number % len(of_kind)]


def _by_arm(kept: Mapping[Run, Any]) -> dict[str, dict[Run, Any]]:
    arms = dict.fromkeys(run.arm for run in in_order(kept))
    return {str(arm): {run: found for run, found in kept.items() if run.arm == arm} for arm in arms}


def _banded(arm: str, place: int, rows: Iterable[tuple[float, Sequence[float]]]) -> Series:
    rows = list(rows)
    points = [(x, fmean(values)) for x, values in rows]
    band = [(x, min(values), max(values)) for x, values in rows]
    return _series(arm, place, points, band)


def _series(
    arm: str, place: int, points: Sequence[tuple[float, float]], band: Sequence[tuple[float, float, float]] = ()
) -> Series:
    again, colour = divmod(place, len(ARM_COLOURS))
    return Series(_arm_title(arm), ARM_COLOURS[colour], points, band, dashed=bool(again))


def _arm_title(arm: str) -> str:
    return Arm.parse(arm).label
