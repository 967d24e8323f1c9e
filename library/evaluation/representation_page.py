"""How much of the teacher's representation a training has learned, as part of a page: maps, what to conclude, curves, numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from library.evaluation.representation import RepresentationResult, Row
from library.evaluation.standard_errors import Spread, paired_difference
from library.report.curves import Chart, Curve
from library.report.page import Page
from library.words import plural

SHOWN_MEASURES = ("token_cosine", "token_cosine_centred", "sample_mae", "recall@1", "recall@5", "recall@10",
                  "cknna", "cka", "mutual_knn", "linear_probe", "knn_accuracy")  # fmt: skip
COLUMNS = 4
FITTED = "trunk + fitted head"
STATE_WORDS = 12
"""Letters of a state's name under a curve."""


def add_representation(page: Page, found: RepresentationResult) -> None:
    page.heading("Representation")
    _add_sight(page, found)
    page.verdict(representation_verdict(found))
    if found.pictures:
        page.heading("More held-out pictures", level=3)
        columns = list(found.pictures[0].columns())
        page.pictures(
            [(picture, f"{name}, {maps.sample_id}" if name == columns[0] else name)
             for maps in found.pictures for name, picture in maps.columns().items()],
            columns=2 * len(columns), max_side=160,
        )  # fmt: skip
        page.paragraph(f"Held-out pictures and {found.pictured}, each as its first three principal components.")
    for note in found.notes:
        page.notice(note)
    chosen = found.settings.pictured_at
    rows = [row for row in found.rows if row.timestep in (chosen, None)]
    measures = [name for name in SHOWN_MEASURES if any(name in row.measures for row in rows)]
    if found.earlier:
        page.heading("Over the training", level=3)
        page.charts(
            list(_over_training(found, measures, chosen)),
            f"At timestep {chosen}. Dashed: the base's trunk, with a fitted head for measures of tokens.",
            columns=COLUMNS,
        )
    if charts := list(_over_timesteps(found, measures)):
        page.heading("Over the timesteps", level=3)
        page.charts(charts, "Bars are one standard deviation over noise seeds.", columns=COLUMNS)
    page.heading("Numbers of the representation", level=3)
    page.paragraph(
        f"How much of the teacher's representation {found.checkpoint} has learned at {found.tap}, on {found.held_out} held-out "
        f"pictures of {plural(found.classes, 'class', 'classes')}; probes and heads are fitted on {found.fitted} others. Compare "
        "them with the baselines: the frozen base with a newly fitted head, a random trunk, constants and the grid's ceiling."
    )
    cells: list[list[str | None]] = [
        [
            row.name,
            *(f"{row.measures[name]}{_star(found, row, name)}" if name in row.measures else None for name in measures),
        ]
        for row in rows
    ]
    cells.append(["chance", *(f"{found.chance[name]:.3f}" if name in found.chance else None for name in measures)])
    page.table(
        ["", *map(_title, measures)],
        cells,
        caption=f"At timestep {chosen}; ± is the standard deviation over noise seeds. * significantly different from the base's "
        "trunk, by paired differences over the seeds.",
    )
    meanings = found.to_json()["meanings"]
    page.table(["", ""], [[_title(name), meanings.get(name, "")] for name in measures])


def _add_sight(page: Page, found: RepresentationResult) -> None:
    """A row for each picture and timestep: photo, the teacher's tokens, and of each model the head's tokens and their cosine."""
    if not found.seen:
        return
    models = list(dict.fromkeys(sight.name for sight in found.seen))
    timesteps = list(dict.fromkeys(sight.timestep for sight in found.seen))
    of = {(sight.name, sight.timestep): sight.maps for sight in found.seen}
    cells = []
    for place, first in enumerate(found.seen[0].maps):
        for timestep in timesteps:
            cells += [(first.photo, f"{first.sample_id}, timestep {timestep}"), (first.teacher, "teacher")]
            for name in models:
                maps = of[name, timestep][place]
                cells += [(maps.predicted, name), (maps.cosine, f"{name}: cosine {maps.mean_cosine:.2f}")]
    page.heading("What the U-Net sees", level=3)
    page.pictures(cells, columns=2 + 2 * len(models), max_side=160)
    page.paragraph(
        f"Tokens that the checkpoint's head reads off the U-Net at {found.tap} while it is shown the picture in noise (the more, "
        "the higher the timestep), and the teacher's of the picture without, by the same three principal components. The cosine of "
        "both is blue at -1, grey at 0 and red at 1. base: the same head on the U-Net without the adapter."
    )


def representation_verdict(found: RepresentationResult) -> str:
    """What training did to the trunk: newly fitted heads on the checkpoint's and on the base's."""
    timestep = found.settings.pictured_at
    rows = {row.name: row.measures["token_cosine"] for row in found.rows
            if row.timestep == timestep and "token_cosine" in row.measures}  # fmt: skip
    own, base = rows.get(f"checkpoint {FITTED}"), rows.get(f"base {FITTED}")
    if own is None:
        return f"{found.checkpoint} was not compared with the teacher at timestep {timestep}."
    words = f"A new head finds the teacher's tokens in {found.checkpoint}'s trunk with a cosine of {own} at timestep {timestep}"
    if base is None:
        return f"{words}."
    gap = paired_difference(own, base)
    if not gap.is_significant:
        return f"{words}, in the frozen base's with {base}: the trunk has not learned anything that can be told from noise."
    learned = "the trunk has learned" if gap.value > 0 else "the trunk tells less of them than before"
    return f"{words}, in the frozen base's with {base}: {learned}, beyond the noise of the seeds."


def _title(measure: str) -> str:
    return measure.replace("_", " ")


def _over_timesteps(found: RepresentationResult, measures: Sequence[str]) -> Iterator[Chart]:
    timesteps = {row.timestep for row in found.rows if row.timestep is not None}
    for measure in measures if len(timesteps) > 1 else ():
        curves = []
        for name in found.names():
            spreads = {row.timestep: row.measures[measure] for row in found.rows
                       if row.name == name and row.timestep is not None and measure in row.measures}  # fmt: skip
            if spreads:
                curves.append(_curve(found, name, spreads))
        if curves:
            yield Chart(_title(measure), curves, "timestep")


def _over_training(found: RepresentationResult, measures: Sequence[str], timestep: int) -> Iterator[Chart]:
    """The checkpoint's rows over the states of the training, at one timestep."""
    results = [*found.earlier, found]
    ticks = {float(place): result.checkpoint[-STATE_WORDS:] for place, result in enumerate(results)}
    ticks = {place: words for place, words in ticks.items() if place in (0, len(results) - 1)}
    for measure in measures:
        curves = []
        for name in (name for name in found.names() if name.startswith("checkpoint")):
            known = [result.row(name, timestep).measures.get(measure) for result in results if name in result.names()]
            if len(known) == len(results) and None not in known:
                spreads = {place: one for place, one in enumerate(known) if one is not None}
                curves.append(_curve(found, name, spreads))
        bases = [row for row in found.rows if row.name.startswith("base trunk") and row.timestep == timestep]
        means = [row.measures[measure].mean for row in bases if measure in row.measures]
        if curves:
            yield Chart(_title(measure), curves, "", {"base": means[0]} if means else {}, ticks=ticks)


def _curve(found: RepresentationResult, name: str, spreads: Mapping[int, Spread]) -> Curve:
    """spreads: by x. A name has one colour in all charts."""
    band = [(one.mean - (one.deviation or 0), one.mean + (one.deviation or 0)) for one in spreads.values()]
    return Curve(
        name, [(float(x), one.mean) for x, one in spreads.items()], band, bars=True, colour=found.names().index(name)
    )


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
