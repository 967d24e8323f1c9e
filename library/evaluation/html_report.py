"""The report page of an evaluation: pictures, what to do, curves in a row, numbers, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.evaluation.denoising import QUARTERS
from library.evaluation.generation import GenerationPlan
from library.evaluation.generation_result import BASE, GenerationResult, Strength, to_use
from library.evaluation.measure_table import MEASURES
from library.evaluation.representation_page import add_representation, representation_verdict
from library.evaluation.standard_errors import Estimate
from library.evaluation.verdict import is_noise, strength_words, verdict
from library.inference.grids import grid
from library.report.curves import Chart, Curve
from library.report.page import Page, Quiet
from library.words import plural

if TYPE_CHECKING:
    from PIL import Image

    from library.evaluation.prompt_sets import PromptSet
    from library.evaluation.representation import RepresentationResult

SHOWN_PROMPTS, SHOWN_SEEDS = 8, 4
SHOWN_PHOTOS = 12
FIRST_PICTURES, FIRST_CHECKPOINTS, FIRST_COLUMNS = 3, 6, 8
"""What a page begins with: pictures of each of so many checkpoints, and how many of all stand side by side."""
SMALL = (190, 130)
"""Width and height of curves that stand in one row."""
CURVES = (
    *(
        "likeness",
        "identity",
        "drift",
        "nearness",
        "copies",
        "adherence",
        "adherence_subject",
        "diversity",
        "loss",
        "kid",
    ),
    "cmmd",
)
OF_STRENGTH = ("likeness", "identity", "drift", "nearness", "adherence", "adherence_subject", "diversity")
COMPARED_WITH = {
    "likeness": "photos",
    "identity": "by chance",
    "nearness": "real pictures",
    "copies": "by chance at most",
    "drift": "another seed",
}
"""What the anchor of a measure is."""
IN_A_ROW = 6


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
    page = Page(f"Evaluation of {what}")
    if representation is not None:
        add_representation(page, representation)
    _first_pictures(page, plan, result)
    page.verdict(verdict(result))
    for note in result.notes:
        page.notice(note)
    if result.strength is not None:
        _strength(page, plan, result.strength)
    if count > 1:
        page.heading("Over the checkpoints")
        page.charts(
            _curves(result),
            "Bars are 95 % intervals over seeds, of the loss over photos. Grey is noise; the dotted line is the checkpoint to use.",
            columns=IN_A_ROW,
        )
    _numbers(page, result)
    if result.near_training:
        _near_training(page, result)
    if "loss_q1" in result.measured:
        _losses(page, result)
    _pictures(page, plan, result)
    page.heading("How it was made")
    page.table(["", ""], [[name, value] for name, value in facts.items()])
    page.code(json.dumps(options, indent=2, ensure_ascii=False), caption="All options")
    return page


def findings(result: GenerationResult, representation: RepresentationResult | None = None) -> list[str]:
    """What to do, and the main results, for a terminal."""
    sentences = [] if representation is None else [representation_verdict(representation)]
    sentences.append(verdict(result))
    if result.strength is not None:
        sentences.append(strength_words(result.strength))
    for measure in ("likeness", "loss"):
        if measure in result.best:
            name = result.best[measure].name
            own, gap = result.estimates[name][measure], result.against_base[name][measure]
            differs = "significantly" if gap.is_significant else "not significantly"
            value = f"{own}" if measure == "likeness" else f"{math.exp(own.value) - 1:+.1%} to the base's"
            sentences.append(f"{MEASURES[measure].title}: best {name}, {value}, {differs} different from the base.")
    least = result.best["drift"].name
    sentences.append(f"Least drift: {least}, {result.estimates[least]['drift']}.")
    return sentences


# ---------------------------------------------------------------------------------------------------- pictures


def _first_pictures(page: Page, plan: GenerationPlan, result: GenerationResult) -> None:
    """A few of the subject (without one, of unrelated prompts): the base beside the checkpoints, of many some."""
    kind, prompts = ("unrelated", plan.unrelated) if plan.subject is None else ("subject", plan.subject)
    names = result.names
    if (count := FIRST_CHECKPOINTS - 1) < len(names) - 1:
        spread = {names[round(place * (len(names) - 1) / (count - 1))] for place in range(count)}
        names = [name for name in names if name in spread | {to_use(result)}]
    models = [BASE, *names]
    each = max(1, FIRST_PICTURES // len(prompts.requests))
    rows = [place for place, (_, seed) in enumerate(prompts.places) if seed in prompts.seeds[:each]][:FIRST_PICTURES]
    page.heading("Pictures")
    page.pictures(
        [
            (
                getattr(result.drawn[name], kind)[place],
                f"{name}: {_prompt_of(prompts, place)}" if name == BASE else name,
            )
            for place in rows
            for name in models
        ],
        columns=len(models) * min(len(rows), max(1, FIRST_COLUMNS // len(models))),
    )


def _prompt_of(prompts: PromptSet, place: int) -> str:
    number, seed = prompts.places[place]
    return f"{prompts.requests[number].prompt}, seed {seed}"


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


# ---------------------------------------------------------------------------------------------------- strength


def _strength(page: Page, plan: GenerationPlan, strength: Strength) -> None:
    swept = strength.swept
    page.heading(f"Strength of {strength.checkpoint}")
    for kind, prompts in (("subject", plan.subject), ("unrelated", plan.unrelated)):
        if prompts is not None:
            page.pictures(
                [
                    (
                        getattr(swept.drawn[name], kind)[0],
                        f"{name}: {_prompt_of(prompts, 0)}" if name == BASE else _weight_words(strength, name),
                    )
                    for name in [BASE, *swept.names]
                ],
                columns=len(swept.names) + 1,
                max_side=256,
            )
    page.verdict(strength_words(strength))
    page.charts(
        [
            Chart(
                MEASURES[measure].title,
                [_estimates("at this weight", list(strength.weights), [swept.estimates[name][measure] for name in swept.names])],
                "weight",
                _lines(swept, measure),
                marked=strength.recommended,
                size=SMALL,
            )
            for measure in OF_STRENGTH
            if measure in swept.measured
        ],
        "The same prompts and seeds at each weight. Bars are 95 % intervals over seeds; the dotted line is the recommended weight.",
        columns=IN_A_ROW,
    )  # fmt: skip


def _weight_words(strength: Strength, name: str) -> str:
    return f"{name}, recommended" if float(name) == strength.recommended else name


# ------------------------------------------------------------------------------------------------ curves, numbers


def _curves(result: GenerationResult) -> list[Chart]:
    steps = [step for step in result.steps.values() if step is not None]
    counted = len(set(steps)) == len(result.names)
    x = [float(step) for step in steps] if counted else [float(place) for place in range(len(result.names))]
    ends = {} if counted else {x[0]: result.names[0][-12:], x[-1]: result.names[-1][-12:]}
    return [
        Chart(
            MEASURES[measure].title,
            [_estimates("checkpoints", x, [result.estimates[name][measure] for name in result.names],
                        quiet=all(is_noise(result, name, measure) for name in result.names))],
            "step" if counted else "",
            _lines(result, measure),
            marked=x[result.names.index(to_use(result))],
            ticks=ends,
            size=SMALL,
        )
        for measure in CURVES
        if measure in result.measured
    ]  # fmt: skip


def _lines(result: GenerationResult, measure: str) -> dict[str, float]:
    """What a curve is compared with."""
    lines = {} if MEASURES[measure].from_base else {"base": result.estimates[BASE][measure].value}
    if measure in result.anchors:
        lines[COMPARED_WITH[measure]] = result.anchors[measure]
    return lines


def _estimates(name: str, x: Sequence[float], estimates: Sequence[Estimate], quiet: bool = False) -> Curve:
    margins = [one.margin if math.isfinite(one.margin) else 0.0 for one in estimates]
    band = [(one.value - margin, one.value + margin) for one, margin in zip(estimates, margins, strict=True)]
    return Curve(name, [(a, one.value) for a, one in zip(x, estimates, strict=True)], band, bars=True, quiet=quiet)


def _numbers(page: Page, result: GenerationResult) -> None:
    page.heading("Numbers")
    measures = [name for name in result.measured if not name.startswith("loss_q")]
    rows: list[list[str | float | None]] = [[BASE, *(str(result.estimates[BASE][measure]) for measure in measures)]]
    rows += [[name, *(_cell(result, name, measure) for measure in measures)] for name in result.names]
    if result.anchors:
        anchored = [f"{result.anchors[measure]:.3f}" if measure in result.anchors else None for measure in measures]
        rows.append(["for comparison", *anchored])
    page.table(
        ["", *(MEASURES[measure].title for measure in measures)],
        rows,
        caption="± is half of the 95 % interval over seeds (of the loss: over photos). Grey is noise: the difference to the base, "
        "by pairs of the same prompt and seed, is within its interval, so that the number says nothing. For comparison: "
        "likeness of the photos to each other; identity by chance, and the copies that may be by chance; nearness of held-out "
        "and other training pictures to training pictures; drift of the base's pictures with another seed.",
    )
    noise = [m for m in measures if all(is_noise(result, name, m) for name in result.names)]
    if noise:
        page.paragraph(f"Noise for every checkpoint: {'; '.join(MEASURES[measure].title for measure in noise)}.")
    if len(result.names) > 1:
        page.heading("Which is best", level=3)
        page.table(
            ["", "best", "not significantly different"],
            [
                [MEASURES[measure].title, best.name, ", ".join(best.alike) or "none"]
                for measure, best in result.best.items()
                if measure in measures and measure not in noise and not MEASURES[measure].by_itself
            ],
            caption="By paired differences over the same prompts and seeds. One comparison in twenty is significant by chance.",
        )
    page.heading("What they mean", level=3)
    page.table(["", ""], [[MEASURES[measure].title, MEASURES[measure].meaning] for measure in measures])


def _near_training(page: Page, result: GenerationResult) -> None:
    page.heading("Nearest training pictures", level=3)
    count = sum(one.is_copy for one in result.near_training)
    level = "" if "copies" not in result.measured else (
        " None of them is a copy: real pictures are as near to each other." if not count else
        f" {plural(count, 'picture is', 'pictures are')} nearer than real ones are to each other."
    )  # fmt: skip
    page.paragraph(
        f"The pictures of the subject that are nearest to a training picture, each before that picture.{level}"
    )
    pictures: list[tuple[Image.Image, str]] = []
    for one in result.near_training:
        drawn = result.drawn[one.checkpoint].subject[one.place]
        words = f"{one.checkpoint}, cosine {one.cosine:.3f}{', a copy' if one.is_copy else ''}"
        pictures += [(drawn, words), (one.photo, f"trained: {one.photo_name}")]
    page.pictures(pictures, columns=min(len(pictures), FIRST_COLUMNS), max_side=256)


def _cell(result: GenerationResult, name: str, measure: str) -> str:
    text = str(result.estimates[name][measure])
    return Quiet(text) if is_noise(result, name, measure) else text


def _losses(page: Page, result: GenerationResult) -> None:
    page.heading("Denoising loss by quarter of the timesteps")
    quarters = range(1, QUARTERS + 1)
    curves = [
        Curve(
            name,
            [(float(q), 100 * (math.exp(result.estimates[name][f"loss_q{q}"].value) - 1)) for q in quarters],
            quiet=all(is_noise(result, name, f"loss_q{q}") for q in quarters),
        )
        for name in result.names
    ]
    ticks = {1.0: "least noise", 2.0: "2", 3.0: "3", 4.0: "most noise"}
    page.charts(
        [Chart("Loss relative to the base's, %", curves, lines={"base": 0.0}, ticks=ticks)],
        "Loss on the held-out photos relative to the base's, with the same noise and timesteps, mean over photos; below 0 is lower "
        "than the base's. A lower loss in the later quarters means better shapes and layout, in the first better texture.",
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
