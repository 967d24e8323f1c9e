"""Figures of a study's report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from library.quiet import let_in
from library.report.template import COLOURS
from library.search.messages import SLOTS
from library.search.results.status import shown_params
from library.search.study.trial_values import FAILURE, IMPUTED, breaks, has_failed, is_real, may_win, value_of
from library.search.study.verdict import SIGMAS, Verdict

BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = COLOURS
LEAST_FOR_IMPORTANCE = 6
STABLE_IMPORTANCE = 30


def history(trials: Sequence[FrozenTrial], verdict: Verdict) -> go.Figure:
    """Value of each trial, the best value so far, and the band of the default configuration's noise."""
    figure = go.Figure()
    kinds: tuple[tuple[str, Any, str, str], ...] = (
        ("complete", may_win, BLUE, "circle"),
        ("follows prompts less", lambda trial: is_real(trial) and breaks(trial), PINK, "diamond-open"),
        ("pruned (predicted)", lambda trial: IMPUTED in trial.user_attrs, GREY, "circle-open"),
        ("diverged (penalty)", lambda trial: FAILURE in trial.user_attrs, RED, "x"),
    )
    ended = [
        trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.value is not None
    ]
    for name, belongs, colour, symbol in kinds:
        some = [trial for trial in ended if belongs(trial)]
        if some:
            figure.add_scatter(
                x=[trial.number + 1 for trial in some],
                y=[trial.user_attrs.get(IMPUTED, trial.value) for trial in some],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 9},
                text=[shown_params(trial.params, "<br>") for trial in some],
                hovertemplate="trial %{x}: %{y:.4f}<br>%{text}<extra></extra>",
            )
    real = sorted(filter(may_win, ended), key=lambda trial: trial.number)
    best = [min(value_of(trial) for trial in real[: place + 1]) for place in range(len(real))]
    figure.add_scatter(
        x=[trial.number + 1 for trial in real],
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
    """Value at each slot of each trial. best: numbers of the trials in colour; the others are grey."""
    figure = go.Figure()
    shown = [trial for trial in trials if trial.intermediate_values]
    for trial in sorted(shown, key=lambda trial: trial.number + 1 in best):
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
    """A study in memory with the real trials alone: predictions and penalties say nothing about the parameters."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize", pruner=optuna.pruners.NopPruner())
    study.add_trials(list(filter(is_real, trials)))
    return study


def importances(trials: Iterable[FrozenTrial]) -> dict[str, float] | None:
    """Share of the values' variance that each parameter explains by itself, the largest first.

    None for too few trials, or where parameters or values do not differ.

    Functional ANOVA of a random forest: Hutter, Hoos and Leyton-Brown, ICML 2014.
    """
    study = filtered(trials)
    if len(study.trials) < LEAST_FOR_IMPORTANCE:
        return None
    let_in("sklearn")
    try:
        found = optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(study)
    except RuntimeError:  # no tree of the forest has a branch
        return None
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def importance(found: dict[str, float]) -> go.Figure:
    names = list(reversed(found))
    figure = go.Figure(go.Bar(x=[found[name] for name in names], y=names, orientation="h", marker={"color": BLUE}))
    axis = {"tickformat": ".0%", "rangemode": "tozero", "nticks": 6}
    figure.update_layout(title="Importance by fANOVA", height=50 + 32 * len(names), xaxis=axis, margin={"t": 8})
    return figure


def slices(trials: Iterable[FrozenTrial], space: dict[str, dict[str, Any]], order: Sequence[str]) -> list[go.Figure]:
    """A figure for each parameter with the values of all trials, on the same value axis."""
    real = list(filter(is_real, trials))
    values = [value_of(trial) for trial in real]
    margin = 0.08 * (max(values) - min(values)) or 0.01
    return [_slice(real, name, space[name], (min(values) - margin, max(values) + margin)) for name in order]


def _slice(real: Sequence[FrozenTrial], name: str, what: dict[str, Any], span: tuple[float, float]) -> go.Figure:
    is_choice = "choices" in what
    points = [(trial.params[name], trial) for trial in real if name in trial.params]
    figure = go.Figure()
    figure.add_scatter(
        x=[str(value) if is_choice else value for value, _ in points],
        y=[value_of(trial) for _, trial in points],
        mode="markers",
        marker={"color": [trial.number + 1 for _, trial in points], "colorscale": "Cividis", "size": 7},
        text=[shown_params(trial.params, "<br>") for _, trial in points],
        hovertemplate="%{x}: %{y:.4f}<br>%{text}<extra></extra>",
    )
    axis: dict[str, Any] = {"nticks": 5}
    if is_choice:
        choices = [str(choice) for choice in what["choices"]]
        axis = {"type": "category", "categoryarray": choices, "range": [-0.5, len(choices) - 0.5], "tickangle": 0}
        axis |= {"tickvals": choices, "ticktext": [choice.replace("_", "_<br>") for choice in choices]}
    elif what.get("log"):
        axis = {"type": "log", "nticks": 5}
    figure.update_layout(title=name, height=220, xaxis=axis, yaxis={"nticks": 5, "range": span}, margin={"t": 8})
    return figure


def parallel(trials: Iterable[FrozenTrial], space: dict[str, dict[str, Any]], order: Sequence[str]) -> go.Figure:
    """For each trial a line through its value and its parameters; better trials are more orange."""
    real = [trial for trial in trials if is_real(trial) and set(order) <= trial.params.keys()]
    ranks = {trial.number: rank for rank, trial in enumerate(sorted(real, key=value_of))}
    dimensions = [{"label": "value", "values": [value_of(trial) for trial in real]}]
    dimensions += [_dimension(name, space[name], [trial.params[name] for trial in real]) for name in order]
    colours = [[0, ORANGE], [0.4, GREY], [1, GREY]]
    line = {"color": [ranks[trial.number] for trial in real], "colorscale": colours, "cmin": 0, "cmax": len(real)}
    fonts: dict[str, Any] = {"labelfont": {"size": 12}, "tickfont": {"size": 12}}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelangle=-20, labelside="bottom", **fonts))
    figure.update_layout(height=440, margin={"l": 60, "r": 100, "t": 20, "b": 90})
    return figure


def _dimension(name: str, what: dict[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    if "choices" in what:
        choices = list(what["choices"])
        places = list(range(len(choices)))
        shown = {"tickvals": places, "ticktext": [str(choice) for choice in choices], "range": [0, max(places[-1], 1)]}
        return {"label": name, "values": [choices.index(value) for value in values], **shown}
    if what.get("log") and values:
        powers = [math.log10(value) for value in values]
        ticks = sorted({min(powers), max(powers), *range(math.ceil(min(powers)), math.floor(max(powers)) + 1)})
        return {"label": name, "values": powers, "tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    return {"label": name, "values": list(values)}


def timeline(trials: Iterable[FrozenTrial]) -> go.Figure:
    """Duration of each trial in seconds."""
    ended = [trial for trial in trials if trial.datetime_start and trial.datetime_complete]
    figure = go.Figure(
        go.Bar(
            x=[trial.number + 1 for trial in ended],
            y=[seconds_of(trial) for trial in ended],
            marker={"color": [_colour(trial) for trial in ended]},
            hovertemplate="trial %{x}: %{y:.0f} s<extra></extra>",
        )
    )
    axis = {"title": "trial", "dtick": 1 if len(ended) <= 20 else None}
    figure.update_layout(height=300, xaxis=axis, yaxis={"title": "seconds", "ticksuffix": " s"})
    return figure


def seconds_of(trial: FrozenTrial) -> float:
    start, end = trial.datetime_start, trial.datetime_complete
    return (end - start).total_seconds() if start is not None and end is not None else 0.0


def _colour(trial: FrozenTrial) -> str:
    if has_failed(trial):
        return RED
    return BLUE if is_real(trial) else GREY
