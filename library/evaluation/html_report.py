"""The report page of an evaluation: findings, table, curves, pictures side by side, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from library.evaluation.denoising import QUARTERS
from library.evaluation.generation import BASE, MEASURES, GenerationPlan, GenerationResult
from library.evaluation.standard_errors import Estimate, paired_difference
from library.inference.grids import grid
from library.report.page import Page
from library.report.template import COLOURS
from library.words import plural

if TYPE_CHECKING:
    from PIL import Image

    from library.evaluation.representation import RepresentationResult, Row

SHOWN_PROMPTS, SHOWN_SEEDS = 8, 4
SHOWN_PHOTOS = 12
CURVES = ("likeness", "drift", "adherence", "adherence_subject", "diversity", "kid", "cmmd", "loss")
REPRESENTATION_MEASURES = ("token_cosine", "token_cosine_centred", "sample_mae", "recall@1", "recall@5", "recall@10",
                           "cknna", "cka", "mutual_knn", "linear_probe", "knn_accuracy")  # fmt: skip


def report_page(
    plan: GenerationPlan,
    result: GenerationResult,
    facts: Mapping[str, str],
    options: Mapping[str, Any],
    representation: RepresentationResult | None = None,
) -> Page:
    """facts: what the evaluation was made with (base, photos, device, versions). options: the resolved ones."""
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
    _pictures(page, plan, result)
    if representation is not None:
        _representation(page, representation)
    page.heading("How it was made")
    page.table(["", ""], [[name, value] for name, value in facts.items()])
    page.code(json.dumps(options, indent=2, ensure_ascii=False), caption="All options")
    return page


def findings(result: GenerationResult) -> list[str]:
    """The main results in a few sentences, which say where a difference is not significant."""
    sentences = []
    if "likeness" in result.best:
        name, own, gap = _best_of(result, "likeness")
        differs = "significantly" if gap.is_significant else "not significantly"
        base = result.estimates[BASE]["likeness"].value
        sentences.append(f"Most like the subject: {name}, {own}, {differs} different from the base's {base:.3f}.")
    least = result.best["drift"].name
    sentences.append(f"Least drift: {least}, {result.estimates[least]['drift']}.")
    if "loss" in result.best:
        name, own, gap = _best_of(result, "loss")
        change = math.exp(own.value) - 1
        verdict = "" if gap.is_significant else ", not a significant difference"
        sentences.append(
            f"Denoising loss: {name}, {abs(change):.1%} {'below' if change < 0 else 'above'} the base's{verdict}."
        )
    return sentences


def _best_of(result: GenerationResult, measure: str) -> tuple[str, Estimate, Estimate]:
    """The best checkpoint's name, its number, and its difference to the base."""
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
        caption="± is half of the 95 % interval over seeds (of the loss: over photos). * significantly different from the base, by "
        "paired differences; drift, which is 0 for the base, has no star. For comparison: likeness of the photos to each other; "
        "drift of the base's pictures with another seed.",
    )
    if len(result.names) > 1:
        page.heading("Which is best", level=3)
        page.table(
            ["", "best", "not significantly different"],
            [
                [MEASURES[measure].title, best.name, ", ".join(best.alike) or "none"]
                for measure, best in result.best.items()
                if measure in measures
            ],
            caption="By paired differences over the same prompts and seeds. One comparison in twenty is significant by chance.",
        )
    page.heading("What they mean", level=3)
    page.table(["", ""], [[MEASURES[measure].title, MEASURES[measure].meaning] for measure in measures])


def _mark(result: GenerationResult, name: str, measure: str) -> str:
    gap = result.against_base.get(name, {}).get(measure)
    return " *" if gap is not None and gap.is_significant else ""


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
            y=[estimate.value for estimate in own],
            error_y={
                "array": [estimate.margin if math.isfinite(estimate.margin) else 0 for estimate in own],
                "thickness": 1.2,
            },
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
            y=[100 * (math.exp(estimate.value) - 1) for estimate in own],
            customdata=[str(estimate) for estimate in own],
            hovertemplate="%{y:.1f} % (log ratio %{customdata})",
            mode="lines+markers",
            name=name,
        )
    figure.add_hline(y=0, line={"dash": "dash", "color": COLOURS[6]})
    figure.update_layout(height=320, xaxis={"tickangle": 0}, yaxis={"ticksuffix": " %"}, showlegend=True)
    page.figure(
        figure,
        "Loss on the held-out photos relative to the base's, with the same noise and timesteps, mean over photos; below 0 is lower "
        "than the base's. A lower loss in the later quarters means better shapes and layout, in the first better texture.",
    )


def _pictures(page: Page, plan: GenerationPlan, result: GenerationResult) -> None:
    if plan.photos:
        page.heading("Held-out photos")
        page.pictures([(photo.picture, photo.caption or photo.name) for photo in plan.photos[:SHOWN_PHOTOS]])
    models = [BASE, *result.names]
    for title, prompts, kind in (
        ("The subject", plan.subject, "subject"),
        ("Unrelated prompts", plan.unrelated, "unrelated"),
    ):
        if prompts is None:
            continue
        page.heading(title)
        for number, request in enumerate(prompts.requests[:SHOWN_PROMPTS]):
            page.heading(request.prompt, level=3)
            shown = SHOWN_SEEDS if len(prompts.requests) == 1 else 2
            rows = [place for place, (which, _) in enumerate(prompts.places) if which == number][:shown]
            pictures = [
                (getattr(result.drawn[name], kind)[place], f"{name}, seed {prompts.places[place][1]}")
                for place in rows
                for name in models
            ]
            page.pictures(pictures, columns=len(models))


def _representation(page: Page, found: RepresentationResult) -> None:
    page.heading("Representation")
    page.paragraph(
        f"How much of the teacher's representation {found.checkpoint} has learned at {found.tap}, on {found.held_out} held-out "
        f"pictures of {plural(found.classes, 'class', 'classes')}; probes and heads are fitted on {found.fitted} others. Compare "
        "them with the baselines: the frozen base with a newly fitted head, a random trunk, constants and the grid's ceiling."
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
            *(f"{row.measures[name]}{_star(found, row, name)}" if name in row.measures else None for name in measures),
        ]
        for row in rows
    ]
    cells.append(["chance", *(f"{found.chance[name]:.3f}" if name in found.chance else None for name in measures)])
    page.table(
        ["", *(name.replace("_", " ") for name in measures)],
        cells,
        caption=f"At timestep {chosen}; ± is the standard deviation over noise seeds. * significantly different from the base's "
        "trunk, by paired differences over the seeds.",
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
            [(picture, f"{name}, {maps.sample_id}" if name == columns[0] else name)
             for maps in found.pictures for name, picture in maps.columns().items()],
            columns=len(columns),
        )  # fmt: skip


def _star(found: RepresentationResult, row: Row, measure: str) -> str:
    """A star where a number of the checkpoint's trunk differs significantly from the base trunk's."""
    theirs = row.name.replace("checkpoint trunk", "base trunk")
    bases = [
        other
        for other in found.rows
        if (other.name, other.timestep) == (theirs, row.timestep) and measure in other.measures
    ]
    if theirs == row.name or not bases:
        return ""
    return " *" if paired_difference(row.measures[measure], bases[0].measures[measure]).is_significant else ""


def _over_training(page: Page, found: RepresentationResult, measures: Sequence[str], timestep: int) -> None:
    """Curves of the checkpoint's rows over the states of the training, at one timestep."""
    page.heading("Over the training", level=3)
    results = [*found.earlier, found]
    own = [name for name in found.names() if name.startswith("checkpoint")]
    for measure in measures:
        figure = go.Figure()
        for name in own:
            spreads = [result.row(name, timestep).measures.get(measure) for result in results if name in result.names()]
            if len(spreads) == len(results) and None not in spreads:
                figure.add_scatter(
                    x=[result.checkpoint for result in results],
                    y=[spread.mean for spread in spreads if spread is not None],
                    error_y={
                        "array": [spread.deviation or 0 for spread in spreads if spread is not None],
                        "thickness": 1,
                    },
                    mode="lines+markers",
                    name=name,
                )
        bases = [row for row in found.rows if row.name.startswith("base trunk") and row.timestep == timestep]
        if known := [row.measures[measure].mean for row in bases if measure in row.measures]:
            figure.add_hline(y=known[0], line={"dash": "dash", "color": COLOURS[6]})
        if figure.data:
            figure.update_layout(title=measure.replace("_", " "), height=300, showlegend=True)
            page.figure(
                figure, f"At timestep {timestep}. Dashed: the base's trunk, with a fitted head for measures of tokens."
            )


def sheets_of(plan: GenerationPlan, result: GenerationResult, name: str) -> dict[str, Image.Image]:
    """A checkpoint's pictures of the subject and of unrelated prompts: a row for each prompt, a column for each seed."""
    drawn, sheets = result.drawn[name], {}
    for kind, prompts, pictures in (
        ("subject", plan.subject, drawn.subject),
        ("unrelated", plan.unrelated, drawn.unrelated),
    ):
        if prompts is not None:
            sheets[kind] = grid(
                pictures,
                len(prompts.seeds),
                column_headings=[f"seed {seed}" for seed in prompts.seeds],
                row_headings=[request.prompt for request in prompts.requests],
                title=name,
            )
    return sheets
