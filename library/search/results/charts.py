"""Figures of a study's report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from library.quiet import let_scikit_learn_in
from library.report.template import COLOURS
from library.search.messages import SLOTS
from library.search.study.trial_values import FAILURE, IMPUTED, breaks, is_real, may_win, value_of
from library.search.study.verdict import SIGMAS, Verdict

BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = COLOURS
LEAST_FOR_IMPORTANCE = 6
STABLE_IMPORTANCE = 30


def history(trials: Sequence[FrozenTrial], verdict: Verdict) -> go.Figure:
    """Values over trials, the best so far, and the band of the default configuration's noise."""
    figure = go.Figure()
    kinds: tuple[tuple[str, Any, str, str], ...] = (
        ("to the end", may_win, BLUE, "circle"),
        ("follows prompts less", lambda one: is_real(one) and breaks(one), PINK, "diamond-open"),
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
    real = sorted(filter(may_win, ended), key=lambda one: one.number)
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


def importances(trials: Iterable[FrozenTrial]) -> dict[str, float] | None:
    """Share of the values' variance that each parameter explains by itself, the largest first; None for too few trials, or where
    parameters or values do not differ.

    Functional ANOVA of a random forest: Hutter, Hoos and Leyton-Brown, ICML 2014.
    """
    study = filtered(trials)
    if len(study.trials) < LEAST_FOR_IMPORTANCE:
        return None
    let_scikit_learn_in()
    try:
        found = optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(study)
    except RuntimeError:  # no tree of its forest has a branch
        return None
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def importance(found: dict[str, float]) -> go.Figure:
    names = list(reversed(found))
    figure = go.Figure(go.Bar(x=[found[name] for name in names], y=names, orientation="h", marker={"color": BLUE}))
    axis = {"tickformat": ".0%", "rangemode": "tozero", "nticks": 6}
    figure.update_layout(title="Importance by fANOVA", height=50 + 32 * len(names), xaxis=axis, margin={"t": 8})
    return figure


def slices(trials: Iterable[FrozenTrial], space: dict[str, dict[str, Any]], order: Sequence[str]) -> list[go.Figure]:
    """Value over each parameter by itself; all over one range of values."""
    real = list(filter(is_real, trials))
    values = [value_of(one) for one in real]
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
        text=[_hover(trial) for _, trial in points],
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
    """A line through the value and the parameters of each trial, the better the more orange."""
    real = [one for one in trials if is_real(one) and set(order) <= one.params.keys()]
    ranks = {one.number: rank for rank, one in enumerate(sorted(real, key=value_of))}
    dimensions = [{"label": "value", "values": [value_of(one) for one in real]}]
    dimensions += [_dimension(name, space[name], [one.params[name] for one in real]) for name in order]
    colours = [[0, ORANGE], [0.4, GREY], [1, GREY]]
    line = {"color": [ranks[one.number] for one in real], "colorscale": colours, "cmin": 0, "cmax": len(real)}
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
    axis = {"title": "trial", "dtick": 1 if len(ended) <= 20 else None}
    figure.update_layout(height=300, xaxis=axis, yaxis={"title": "seconds", "ticksuffix": " s"})
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
