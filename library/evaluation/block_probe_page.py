"""The page of a block probe: where to tap, what each block knows of noise and picture, and what bins of a training make of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import plotly.graph_objects as go

from library.evaluation.block_probe import CONTROLS, BlockProbe, Control, Reading
from library.report.page import Page
from library.report.template import COLOURS

TOLD = {"fed": "its own timestep", "frozen": "timestep frozen"}


def probe_page(found: BlockProbe, facts: Mapping[str, str], options: Mapping[str, Any]) -> Page:
    """facts: what it was made with. options: the resolved ones."""
    names = list(found.models)
    page = Page(f"What each block of {facts['base']} knows", " ".join(found.recommendation()))
    chance = {"accuracy": found.chance, "label": found.label_chance}
    page.heading("Noise level")
    page.figure(
        _bars(found, "accuracy", chance["accuracy"]),
        f"Share of inputs whose noise level a linear probe puts into the right one of {found.settings.bins} bins of log-SNR. A "
        "network that is told its timestep carries it along in every block; with the timestep frozen, only what a block sees of "
        "the noise is left. Dashed: chance.",
    )
    if found.label_chance is not None:
        page.heading("The picture")
        page.figure(
            _bars(found, "label", chance["label"]),
            f"Share of inputs whose {found.labels} a linear probe tells. Dashed: chance.",
        )
        page.figure(
            _bars(found, "pattern", None),
            f"Normalised mutual information of {found.settings.prototypes} clusters of a block's features and the {found.labels}, "
            "above that of shuffled labels; 0 is chance. Clusters follow what differs most, which may be something else.",
        )
    page.heading("Numbers")
    for name in names:
        _numbers(page, found, name)
    page.heading("What bins of timesteps read")
    page.figure(
        _by_level(found),
        "Accuracy with the timestep frozen, the mean over blocks: timestep_bins.json of the base. Difficulty is 1 less it.",
    )
    page.heading("How it was made")
    page.table(["", ""], [[name, value] for name, value in facts.items()])
    page.code(json.dumps(dict(options), indent=2, ensure_ascii=False, default=str), caption="All options")
    return page


def _bars(found: BlockProbe, what: Literal["accuracy", "pattern", "label"], chance: float | None) -> go.Figure:
    figure = go.Figure()
    for place, name in enumerate(found.models):
        for control in CONTROLS:
            figure.add_bar(
                x=found.blocks,
                y=[_value(found.models[name][block][control], what) for block in found.blocks],
                name=f"{name}, {TOLD[control]}",
                marker={"color": COLOURS[2 * place + CONTROLS.index(control)]},
            )
    if chance is not None:
        figure.add_hline(y=chance, line={"dash": "dash", "color": COLOURS[6]})
    figure.update_layout(height=340, barmode="group", showlegend=True)
    return figure


def _value(reading: Reading, what: str) -> float:
    if what == "pattern":
        assert reading.pattern is not None and reading.shuffled is not None
        return reading.pattern.mean - reading.shuffled.mean
    return getattr(reading, what).mean


def _by_level(found: BlockProbe) -> go.Figure:
    known = found.level_accuracy(found.base)
    middles = [(a + b) / 2 for a, b in zip(known.log_snr, known.log_snr[1:], strict=False)]
    figure = go.Figure()
    figure.add_bar(x=middles, y=known.accuracy, name="accuracy")
    figure.add_hline(y=found.chance, line={"dash": "dash", "color": COLOURS[6]})
    figure.update_layout(height=300, xaxis_title="log-SNR (to the right: less noise)", bargap=0.05)
    return figure


def _numbers(page: Page, found: BlockProbe, name: str) -> None:
    labelled = found.label_chance is not None
    columns = ["block", "noise level", "frozen", "bins off", "frozen"]
    columns += [found.labels, "frozen", "NMI", "shuffled"] if labelled else []
    rows: list[list[str | float | None]] = []
    for block, reading in found.models[name].items():
        cells = [_cell(found, name, block, control, "accuracy") for control in CONTROLS]
        cells += [f"{reading[control].off:.2f}" for control in CONTROLS]
        if labelled:
            cells += [_cell(found, name, block, control, "label") for control in CONTROLS]
            shuffled = reading["fed"].shuffled
            cells += [_cell(found, name, block, "fed", "pattern"), f"{shuffled.mean if shuffled else 0:.3f}"]
        rows.append([block, *cells])
    rows.append(["chance", *[f"{found.chance:.3f}"] * 2, None, None])
    if labelled:
        rows[-1] += [*[f"{found.label_chance:.3f}"] * 2, None, None]
    star = " * significantly different from the base, by paired differences over the noise levels."
    caption = (
        f"{name}: what a linear probe reads from each block, with the network's own timestep and with a frozen one; NMI of "
        f"clusters and {found.labels}, and of shuffled labels.{'' if name == found.base else star}"
    )
    page.table(columns, rows, caption=caption)


def _cell(
    found: BlockProbe, name: str, block: str, control: Control, what: Literal["accuracy", "pattern", "label"]
) -> str:
    change = None if name == found.base else found.change(name, block, control, what)
    mark = " *" if change is not None and change.is_significant else ""
    return f"{getattr(found.models[name][block][control], what).mean:.3f}{mark}"
