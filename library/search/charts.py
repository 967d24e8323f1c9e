"""Figures of a study's report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from plotly.subplots import make_subplots

from library.report.template import COLOURS
from library.search.jobs import SLOTS
from library.search.noise import SIGMAS, Verdict
from library.search.values import FAILURE, IMPUTED, is_real, value_of

BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = COLOURS
LEAST_FOR_IMPORTANCE = 6
STABLE_IMPORTANCE = 30


def history(trials: Sequence[FrozenTrial], verdict: Verdict) -> go.Figure:
    """Values over trials, the best so far, and the band of the default configuration's noise."""
    figure = go.Figure()
    kinds: tuple[tuple[str, Any, str, str], ...] = (
        ("to the end", is_real, BLUE, "circle"),
        ("pruned (predicted)", lambda one: IMPUTED in one.user_attrs, GREY, "circle-open"),
        ("diverged (penalty)", lambda one: FAILURE in one.user_attrs, RED, "x"),
    )
    ended = [one for one in trials if one.state in (TrialState.COMPLETE, TrialState.PRUNED) and one.value is not None]
    for name, belongs, colour, symbol in kinds:
        some = [one for one in ended if belongs(one)]
        if some:
            figure.add_scatter(
                x=[one.number + 1 for one in some],
                y=[one.user_attrs.get(IMPUTED, one.value) for one in some],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 9},
                text=[_hover(one) for one in some],
                hovertemplate="trial %{x}: %{y:.4f}<br>%{text}<extra></extra>",
            )
    real = sorted(filter(is_real, ended), key=lambda one: one.number)
    best = [min(value_of(one) for one in real[: place + 1]) for place in range(len(real))]
    figure.add_scatter(
        x=[one.number + 1 for one in real],
        y=best,
        mode="lines",
        name="best so far",
        line={"color": ORANGE, "shape": "hv"},
    )
    if verdict.default is not None:
        if verdict.sigma is not None:
            low, high = verdict.default - SIGMAS * verdict.sigma, verdict.default + SIGMAS * verdict.sigma
            figure.add_hrect(y0=low, y1=high, fillcolor=GREEN, opacity=0.15, line_width=0)
        figure.add_hline(y=verdict.default, line={"color": GREEN, "dash": "dash"})
    figure.update_layout(xaxis={"title": "trial", "dtick": 1 if len(ended) <= 20 else None}, yaxis_title="value")
    return figure


def curves(trials: Iterable[FrozenTrial], best: Sequence[int]) -> go.Figure:
    """Value over each trial's own slots; `best`: numbers of trials in colour, the rest is grey."""
    figure = go.Figure()
    shown = [one for one in trials if one.intermediate_values]
    for trial in sorted(shown, key=lambda one: one.number + 1 in best):
        number, points = trial.number + 1, sorted(trial.intermediate_values.items())
        place = best.index(number) if number in best else None
        figure.add_scatter(
            x=[100 * slot / SLOTS for slot, _ in points],
            y=[value for _, value in points],
            mode="lines+markers",
            name=f"trial {number}",
            showlegend=place is not None,
            line={"color": GREY if place is None else COLOURS[place % 6], "width": 1 if place is None else 2.5},
            marker={"size": 4},
            opacity=0.45 if place is None else 1.0,
        )
    figure.update_layout(xaxis={"title": "share of the trial", "ticksuffix": " %"}, yaxis_title="value")
    return figure


def filtered(trials: Iterable[FrozenTrial]) -> optuna.Study:
    """The real trials alone, in memory: predictions and penalties tell of the sampler, not of the parameters."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize", pruner=optuna.pruners.NopPruner())
    study.add_trials(list(filter(is_real, trials)))
    return study


def importances(trials: Iterable[FrozenTrial]) -> tuple[dict[str, float], str] | None:
    """Share of the values' variance that each parameter explains, and by which method; None for too few trials."""
    study = filtered(trials)
    values = {trial.value for trial in study.trials}
    if len(study.trials) < LEAST_FOR_IMPORTANCE or len(values) < 3:
        return None
    evaluator: Any
    if find_spec("sklearn") is not None:
        evaluator, method = optuna.importance.FanovaImportanceEvaluator(seed=0), "fANOVA"
    else:
        evaluator, method = optuna.importance.PedAnovaImportanceEvaluator(), "PED-ANOVA"
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return None
    return dict(sorted(found.items(), key=lambda item: -item[1])), method


def importance(found: dict[str, float]) -> go.Figure:
    names = list(reversed(found))
    figure = go.Figure(go.Bar(x=[found[name] for name in names], y=names, orientation="h", marker={"color": BLUE}))
    figure.update_layout(height=70 + 32 * len(names), xaxis={"title": "share of the variance", "tickformat": ".0%"})
    return figure


def slices(trials: Iterable[FrozenTrial], space: dict[str, dict[str, Any]], order: Sequence[str]) -> go.Figure:
    """Value over each parameter by itself, two side by side."""
    real = list(filter(is_real, trials))
    rows = math.ceil(len(order) / 2)
    figure = make_subplots(rows, 2, subplot_titles=list(order), vertical_spacing=0.38 / max(rows, 2))
    for place, name in enumerate(order):
        row, column = place // 2 + 1, place % 2 + 1
        is_choice = "choices" in space[name]
        points = [(trial.params[name], value_of(trial), trial) for trial in real if name in trial.params]
        figure.add_scatter(
            x=[str(value) if is_choice else value for value, _, _ in points],
            y=[value for _, value, _ in points],
            mode="markers",
            marker={"color": [one.number + 1 for _, _, one in points], "colorscale": "Cividis", "size": 7},
            text=[_hover(one) for _, _, one in points],
            hovertemplate="%{x}: %{y:.4f}<br>%{text}<extra></extra>",
            showlegend=False,
            row=row,
            col=column,
        )
        axis: dict[str, Any] = {"nticks": 4}
        if is_choice:
            axis = {"type": "category", "categoryorder": "array"}
            axis["categoryarray"] = [str(choice) for choice in space[name]["choices"]]
        elif space[name].get("log"):
            axis = {"type": "log", "nticks": 4}
        figure.update_xaxes(**axis, row=row, col=column)
    figure.update_yaxes(nticks=5)
    figure.update_annotations(font={"size": 12})
    figure.update_layout(height=60 + 210 * rows)
    return figure


def parallel(trials: Iterable[FrozenTrial], order: Sequence[str]) -> go.Figure:
    figure = optuna.visualization.plot_parallel_coordinate(filtered(trials), params=list(order))
    figure.update_traces(labelangle=-20, labelside="bottom", selector={"type": "parcoords"})
    figure.update_layout(height=440, margin={"l": 50, "r": 50, "t": 30, "b": 90})
    return figure


def timeline(trials: Iterable[FrozenTrial]) -> go.Figure:
    """Seconds of each trial."""
    ended = [one for one in trials if one.datetime_start and one.datetime_complete]
    figure = go.Figure(
        go.Bar(
            x=[one.number + 1 for one in ended],
            y=[seconds_of(one) for one in ended],
            marker={"color": [_colour(one) for one in ended]},
            hovertemplate="trial %{x}: %{y:.0f} s<extra></extra>",
        )
    )
    figure.update_layout(height=300, xaxis_title="trial", yaxis={"title": "seconds", "ticksuffix": " s"})
    return figure


def seconds_of(trial: FrozenTrial) -> float:
    start, end = trial.datetime_start, trial.datetime_complete
    return (end - start).total_seconds() if start is not None and end is not None else 0.0


def _colour(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL or FAILURE in trial.user_attrs:
        return RED
    return BLUE if is_real(trial) else GREY


def _hover(trial: FrozenTrial) -> str:
    return "<br>".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items()
    )
