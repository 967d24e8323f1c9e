"""An evaluation as a page: what was found first, then the table, curves, pictures side by side, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from library.evaluation.denoising import QUARTERS
from library.evaluation.estimates import Estimate
from library.evaluation.generation import BASE, MEASURES, GenerationResult, Wanted
from library.evaluation.spread import paired
from library.inference.grids import grid
from library.report.page import Page
from library.report.template import COLOURS

if TYPE_CHECKING:
    from PIL import Image

    from library.evaluation.representation import RepresentationResult, Row

SHOWN_PROMPTS, SHOWN_SEEDS = 8, 4
SHOWN_PHOTOS = 12
CURVES = ("likeness", "drift", "adherence", "adherence_subject", "diversity", "kid", "cmmd", "loss")
REPRESENTATION_MEASURES = ("token_cosine", "token_cosine_centred", "sample_mae", "recall@1", "recall@5", "recall@10",
                           "cknna", "cka", "mutual_knn", "linear_probe", "knn_accuracy")  # fmt: skip


def report_page(
    wanted: Wanted,
    result: GenerationResult,
    facts: Mapping[str, str],
    options: Mapping[str, Any],
    representation: RepresentationResult | None = None,
) -> Page:
    """facts: what the report says of itself (base, photos, device, versions). options: the resolved ones."""
    count = len(result.names)
    what = result.names[0] if count == 1 else f"{count} checkpoints, {result.names[0]} to {result.names[-1]}"
    page = Page(f"Evaluation of {what}", " ".join(findings(result)))
    for note in result.notes:
        page.notice(note)
    _numbers(page, result)
    if count > 1:
        _curves(page, result)
    if "loss_q1" in result.measured:
        _losses(page, result)
    _pictures(page, wanted, result)
    if representation is not None:
        _representation(page, representation)
    page.heading("How it was made")
    page.table(["", ""], [[name, value] for name, value in facts.items()])
    page.code(json.dumps(options, indent=2, ensure_ascii=False), caption="All options")
    return page


def findings(result: GenerationResult) -> list[str]:
    """What the numbers say, in a few sentences; a difference within its spread is said to be none."""
    said = []
    if "likeness" in result.best:
        name, own, gap = _best_of(result, "likeness")
        verdict = "told apart" if gap.is_told_from_zero else "not told apart"
        base = result.estimates[BASE]["likeness"].value
        said.append(f"Most like the subject: {name}, {own}, {verdict} from the base's {base:.3f}.")
    least = result.best["drift"].name
    said.append(f"Least drift: {least}, {result.estimates[least]['drift']}.")
    if "loss" in result.best:
        name, own, gap = _best_of(result, "loss")
        change = math.exp(own.value) - 1
        verdict = "" if gap.is_told_from_zero else ", within its spread"
        said.append(
            f"Denoising loss: {name}, {abs(change):.1%} {'below' if change < 0 else 'above'} the base's{verdict}."
        )
    return said


def _best_of(result: GenerationResult, measure: str) -> tuple[str, Estimate, Estimate]:
    """Its name, its number, and its difference to the base."""
    name = result.best[measure].name
    return name, result.estimates[name][measure], result.against_base[name][measure]


def _numbers(page: Page, result: GenerationResult) -> None:
    page.heading("Numbers")
    measures = [name for name in result.measured if not name.startswith("loss_q")]
    rows: list[list[str | float | None]] = []
    for name in [BASE, *result.names]:
        cells = [f"{result.estimates[name][measure]}{_mark(result, name, measure)}" for measure in measures]
        rows.append([name, *cells])
    if result.anchors:
        anchored = [f"{result.anchors[measure]:.3f}" if measure in result.anchors else None for measure in measures]
        rows.append(["for comparison", *anchored])
    page.table(
        ["", *(MEASURES[measure].title for measure in measures)],
        rows,
        caption="± is half of the 95 % interval over seeds (of the loss: over photos). * told apart from the base, by the paired "
        "difference; drift, which begins at 0, is compared with another seed's. For comparison: likeness of the photos to each "
        "other; drift of the base to itself with another seed.",
    )
    if len(result.names) > 1:
        page.heading("Which is best", level=3)
        page.table(
            ["", "best", "not told apart from it"],
            [
                [MEASURES[measure].title, best.name, ", ".join(best.alike) or "none"]
                for measure, best in result.best.items()
                if measure in measures
            ],
            caption="By paired differences over the same prompts and seeds. One comparison in twenty is told apart by chance.",
        )
    page.heading("What they mean", level=3)
    page.table(["", ""], [[MEASURES[measure].title, MEASURES[measure].meaning] for measure in measures])


def _mark(result: GenerationResult, name: str, measure: str) -> str:
    gap = result.against_base.get(name, {}).get(measure)
    return " *" if gap is not None and gap.is_told_from_zero else ""


def _curves(page: Page, result: GenerationResult) -> None:
    page.heading("Over the checkpoints")
    x, title = _axis(result)
    for measure in CURVES:
        if measure not in result.measured:
            continue
        own = [result.estimates[name][measure] for name in result.names]
        figure = go.Figure()
        figure.add_scatter(
            x=x,
            y=[one.value for one in own],
            error_y={"array": [one.margin if math.isfinite(one.margin) else 0 for one in own], "thickness": 1.2},
            mode="lines+markers",
            name="checkpoints",
            marker={"size": 7},
        )
        lines = {} if measure == "drift" else {"base": result.estimates[BASE][measure].value}
        if measure in result.anchors:
            lines["photos among themselves" if measure == "likeness" else "another seed"] = result.anchors[measure]
        for place, (name, value) in enumerate(lines.items()):
            figure.add_scatter(
                x=[x[0], x[-1]], y=[value, value], mode="lines", name=name,
                line={"dash": ("dash", "dot")[place], "color": COLOURS[(6, 2)[place]]},
            )  # fmt: skip
        figure.update_layout(title=MEASURES[measure].title, height=300, xaxis_title=title)
        page.figure(figure, MEASURES[measure].meaning)


def _axis(result: GenerationResult) -> tuple[list[int] | list[str], str]:
    steps = [candidate.step for candidate in result.candidates if candidate.step is not None]
    if len(set(steps)) == len(result.names):
        return steps, "step"
    return result.names, ""


def _losses(page: Page, result: GenerationResult) -> None:
    page.heading("Denoising loss by quarter of the timesteps")
    figure = go.Figure()
    for name in result.names:
        own = [result.estimates[name][f"loss_q{quarter}"] for quarter in range(1, QUARTERS + 1)]
        figure.add_scatter(
            x=["first<br>(least noise)", "second", "third", "last<br>(most noise)"],
            y=[100 * (math.exp(one.value) - 1) for one in own],
            customdata=[str(one) for one in own],
            hovertemplate="%{y:.1f} % (log ratio %{customdata})",
            mode="lines+markers",
            name=name,
        )
    figure.add_hline(y=0, line={"dash": "dash", "color": COLOURS[6]})
    figure.update_layout(height=320, xaxis={"tickangle": 0}, yaxis={"ticksuffix": " %"}, showlegend=True)
    page.figure(
        figure,
        "Loss on the held-out photos beside the base's, with the same noise and timesteps, mean over photos. Below 0 is less than "
        "the base. Falls in the later quarters tell of shapes and places, in the first of texture.",
    )


def _pictures(page: Page, wanted: Wanted, result: GenerationResult) -> None:
    if wanted.photos:
        page.heading("Held-out photos")
        page.pictures([(photo.picture, photo.caption or photo.name) for photo in wanted.photos[:SHOWN_PHOTOS]])
    everyone = [BASE, *result.names]
    for title, task, kind in (
        ("The subject", wanted.subject, "subject"),
        ("Unrelated prompts", wanted.unrelated, "unrelated"),
    ):
        if task is None:
            continue
        page.heading(title)
        for number, request in enumerate(task.requests[:SHOWN_PROMPTS]):
            page.heading(request.prompt, level=3)
            shown = SHOWN_SEEDS if len(task.requests) == 1 else 2
            rows = [place for place, (which, _) in enumerate(task.places) if which == number][:shown]
            pictures = [
                (getattr(result.drawn[name], kind)[place], f"{name}, seed {task.places[place][1]}")
                for place in rows
                for name in everyone
            ]
            page.pictures(pictures, columns=len(everyone))


def _representation(page: Page, found: RepresentationResult) -> None:
    page.heading("Representation")
    page.paragraph(
        f"What {found.checkpoint} knows of the teacher at {found.tap}, on {found.held_out} held-out pictures of {found.classes} "
        f"classes; probes and heads are fitted on {found.fitted} others. A number means something beside its baselines: the "
        "frozen base with a head fitted anew, a random trunk, constants, and the grid's ceiling."
    )
    for note in found.notes:
        page.notice(note)
    timesteps = sorted({row.timestep for row in found.rows if row.timestep is not None})
    chosen = found.settings.pictured_at
    rows = [row for row in found.rows if row.timestep in (chosen, None)]
    measures = [name for name in REPRESENTATION_MEASURES if any(name in row.measures for row in rows)]
    cells: list[list[str | None]] = [
        [
            row.name,
            *(
                f"{row.measures[name]}{_learned(found, row, name)}" if name in row.measures else None
                for name in measures
            ),
        ]
        for row in rows
    ]
    cells.append(["chance", *(f"{found.chance[name]:.3f}" if name in found.chance else None for name in measures)])
    page.table(
        ["", *(name.replace("_", " ") for name in measures)],
        cells,
        caption=f"At timestep {chosen}; ± is the deviation over noise seeds. * told apart from the base's trunk, by the "
        "differences seed by seed.",
    )
    if found.earlier:
        _over_training(page, found, measures, chosen)
    for measure in measures:
        figure = go.Figure()
        for name in found.names():
            points = [
                row for row in found.rows if row.name == name and row.timestep is not None and measure in row.measures
            ]
            if points:
                figure.add_scatter(
                    x=[row.timestep for row in points],
                    y=[row.measures[measure].mean for row in points],
                    error_y={"array": [row.measures[measure].deviation or 0 for row in points], "thickness": 1},
                    mode="lines+markers",
                    name=name,
                )
        if len(timesteps) > 1 and figure.data:
            figure.update_layout(title=measure.replace("_", " "), height=320, xaxis_title="timestep")
            page.figure(figure, found.to_json()["meanings"].get(measure, ""))
    if found.pictures:
        page.heading("Dense maps", level=3)
        page.paragraph(found.pictured)
        columns = list(found.pictures[0].columns())
        page.pictures(
            [(picture, f"{name}, {one.sample_id}" if name == columns[0] else name)
             for one in found.pictures for name, picture in one.columns().items()],
            columns=len(columns),
        )  # fmt: skip


def _learned(found: RepresentationResult, row: Row, measure: str) -> str:
    """A star where a number of the checkpoint's trunk is told apart from the same of the base's."""
    theirs = row.name.replace("checkpoint trunk", "base trunk")
    bases = [
        one for one in found.rows if (one.name, one.timestep) == (theirs, row.timestep) and measure in one.measures
    ]
    if theirs == row.name or not bases:
        return ""
    return " *" if paired(row.measures[measure], bases[0].measures[measure]).is_told_from_zero else ""


def _over_training(page: Page, found: RepresentationResult, measures: Sequence[str], timestep: int) -> None:
    """Curves of the checkpoint's own rows over the states of the training, at one timestep."""
    page.heading("Over the training", level=3)
    everyone = [*found.earlier, found]
    own = [name for name in found.names() if name.startswith("checkpoint")]
    for measure in measures:
        figure = go.Figure()
        for name in own:
            spreads = [one.row(name, timestep).measures.get(measure) for one in everyone if name in one.names()]
            if len(spreads) == len(everyone) and None not in spreads:
                figure.add_scatter(
                    x=[one.checkpoint for one in everyone],
                    y=[one.mean for one in spreads if one is not None],
                    error_y={"array": [one.deviation or 0 for one in spreads if one is not None], "thickness": 1},
                    mode="lines+markers",
                    name=name,
                )
        bases = [row for row in found.rows if row.name.startswith("base trunk") and row.timestep == timestep]
        if known := [row.measures[measure].mean for row in bases if measure in row.measures]:
            figure.add_hline(y=known[0], line={"dash": "dash", "color": COLOURS[6]})
        if figure.data:
            figure.update_layout(title=measure.replace("_", " "), height=300, showlegend=True)
            page.figure(figure, f"At timestep {timestep}; dashed, the base's trunk, for tokens with a fitted head.")


def sheets_of(wanted: Wanted, result: GenerationResult, name: str) -> dict[str, Image.Image]:
    """What one checkpoint drew, of the subject and of unrelated prompts: a row for each prompt, a column for each seed."""
    drawn, sheets = result.drawn[name], {}
    for kind, task, pictures in (
        ("subject", wanted.subject, drawn.subject),
        ("unrelated", wanted.unrelated, drawn.unrelated),
    ):
        if task is not None:
            sheets[kind] = grid(
                pictures,
                len(task.seeds),
                column_headings=[f"seed {seed}" for seed in task.seeds],
                row_headings=[request.prompt for request in task.requests],
                title=name,
            )
    return sheets
