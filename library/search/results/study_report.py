"""report.html of a study: what to conclude from it, how certain that is, and all of its trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from PIL import Image

from library.report.page import Page
from library.search.results import charts
from library.search.results.contact_sheet import sheet_pictures
from library.search.results.recipe import recipe_command, recipe_words
from library.search.results.status import StudyView, broke_words
from library.search.study.ledger import PRUNED_AT, SEED, WITHDRAWN
from library.search.study.running import BASELINE, INITIAL
from library.search.study.trial_values import FAILURE, IMPUTED, INTERRUPTED, breaks, has_failed, is_real, value_of
from library.search.study.verdict import SIGMAS
from library.words import plural

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from library.report.page import Cell

OBJECTIVE_WORDS = {
    "loss": "The value is the mean logarithm of the ratio of the loss on held-out pictures to the untouched base's: 0 is the base, "
    "-0.05 is 5 % less loss, and lower is better. Pictures, timesteps and noise are the same in every trial.",
    "image": "The value is the weighted drift on unrelated prompts minus the gain in likeness to held-out photos, both relative to "
    "the base: 0 is the base, and lower is better. Prompts, seeds and sampler are the same in every trial.",
}


RELOAD = 60.0
"""Seconds after which a browser loads the page of a running study again."""
SHEET_TRIALS = 3
"""Of the contact sheet, beside the recommendation: the base and so many of the best."""


def build_report(view: StudyView, folder: Path, *, is_running: bool = False) -> Page:
    """The report of a study. folder: of the study; pictures that are not there are left out. is_running: the page loads itself
    again."""
    progress, terms = view.progress, view.terms
    page = Page(
        f"Search: {view.name}",
        f"{progress.done} of {view.n_trials} trials of {terms['script']}.py, objective {terms['objective']}.",
        RELOAD if is_running else None,
    )
    _recommendation(page, view, folder)
    _certainty(page, view)
    _best(page, view, folder)
    if any(is_real(trial) for trial in view.trials):
        _search(page, view)
        _parameters(page, view)
    _cost(page, view)
    _all(page, view)
    return page


def _recommendation(page: Page, view: StudyView, folder: Path) -> None:
    """The recipe in words, the command, the best pictures."""
    verdict = view.verdict
    page.heading("Recommendation")
    if recipe := recipe_words(view):
        page.verdict(recipe)
    (page.paragraph if verdict.is_winner else page.notice)(verdict.words)
    if command := recipe_command(folder, view.name):
        page.code(command)
    pictures = sheet_pictures(folder)
    columns = list(dict.fromkeys(caption.partition(",")[0] for _, caption in pictures))[: SHEET_TRIALS + 1]
    _sheet(page, [(path, caption) for path, caption in pictures if caption.partition(",")[0] in columns], len(columns))
    for level, alert in view.alerts.items():
        page.notice(f"{level}: {alert['words']}")


def _certainty(page: Page, view: StudyView) -> None:
    verdict = view.verdict
    page.heading("How certain it is")
    if verdict.best is not None and not verdict.best.again:
        page.paragraph(
            "The lowest of many noisy values is too low by chance. This trial has not been trained again with other seeds, so "
            "expect a worse value of it."
        )
    elif verdict.best is not None and verdict.best.fresh_mean is not None:
        page.paragraph(
            f"In the search its value was {verdict.best.value:.4f}; with {plural(len(verdict.best.again), 'new seed')} it was "
            f"{verdict.best.fresh_mean:.4f} on average, which is the value to expect, because it was not selected for being low."
        )
    if verdict.sigma is not None:
        page.paragraph(
            f"Noise: the values of trainings that differ by their seeds alone have a standard deviation (sigma) of "
            f"{verdict.sigma:.4f}, measured on {plural(len(_baselines(view)), 'training')} of the default configuration and on the "
            f"trainings of the best with new seeds. Differences below {SIGMAS:g} sigma ({SIGMAS * verdict.sigma:.4f}) may be "
            "chance. Estimated from so few values, sigma itself may be wrong by half."
        )
    page.paragraph(OBJECTIVE_WORDS[view.terms["objective"]])
    if verdict.broke:
        page.paragraph(f"{broke_words(verdict.broke)}.")


def _best(page: Page, view: StudyView, folder: Path) -> None:
    verdict = view.verdict
    if not verdict.candidates:
        return
    page.heading("The best")
    names = list(view.terms["space"])
    rows: list[list[Cell]] = [
        [
            candidate.trial,
            f"{candidate.value:.4f}",
            ", ".join(f"{value:.4f}" for value in candidate.again.values()) or None,
            f"{candidate.mean:.4f}" if candidate.again else None,
            *(_cell(candidate.params.get(name)) for name in names),
        ]
        for candidate in verdict.candidates
    ]
    page.table(
        ["trial", "value", "values with new seeds", "mean", *names],
        rows,
        caption="Trials that were trained again come first, by their mean. The default configuration has "
        f"{_number(verdict.default)} on average.",
    )
    pictures = sheet_pictures(folder)
    columns = len({caption.partition(",")[0] for _, caption in pictures})
    if columns > SHEET_TRIALS + 1:  # else all of it is above
        page.heading("Contact sheet", level=3)
        page.paragraph(
            "All have the same prompts and seeds. The value does not measure everything that you see: optimize.py pick N makes "
            "trial N the study's choice."
        )
        _sheet(page, pictures, columns)


def _sheet(page: Page, pictures: Sequence[tuple[Path, str]], columns: int) -> None:
    opened = []
    for path, caption in pictures:
        with Image.open(path) as picture:
            opened.append((picture.convert("RGB"), caption))
    if opened:
        page.pictures(opened, columns=columns, max_side=384)


def _search(page: Page, view: StudyView) -> None:
    verdict = view.verdict
    page.heading("The search")
    page.figure(
        charts.history(view.trials, verdict),
        f"The dashed line is the default configuration, the band {SIGMAS:g} sigma of its noise. A trial within the band is not "
        "better than the default beyond chance.",
    )
    page.heading("Curves", level=3)
    page.figure(
        charts.curves(view.trials, [candidate.trial for candidate in verdict.candidates[:5]]),
        "Each trial is measured at each tenth of its length, and its best tenth counts. The five best are in colour. Where a curve "
        "rises again, the training memorises its pictures.",
    )


def _parameters(page: Page, view: StudyView) -> None:
    page.heading("What the parameters do")
    space: dict[str, dict[str, Any]] = dict(view.terms["space"])
    order = list(space)
    found = charts.importances(view.trials)
    real = sum(map(is_real, view.trials))
    if found is None:
        page.paragraph(_no_importance_words(real))
    else:
        order = [*found, *(name for name in order if name not in found)]
        page.figure(charts.importance(found), _importance_words(real))
    page.heading("Slices", level=3)
    page.figures(
        charts.slices(view.trials, space, order),
        "Each point is a trial; later ones are lighter. Trials differ in all parameters at once, so a slope may come from another "
        "parameter.",
    )
    if real > 1:
        page.heading("Together", level=3)
        page.figure(
            charts.parallel(view.trials, space, order[:6]),
            "Each line is a trial; better ones are more orange. Drag along an axis to select trials."
            + (" Shown are the six most important parameters." if found and len(order) > 6 else ""),
            least_width=860,
        )


def _importance_words(real: int) -> str:
    few = (
        f" From {plural(real, 'trial')} it is unstable, so take it as a hint."
        if real < charts.STABLE_IMPORTANCE
        else ""
    )
    return (
        "The share of the values' variance that each parameter explains by itself, by fANOVA; the rest, up to 100 %, is due to "
        f"several parameters together.{few}"
    )


def _no_importance_words(real: int) -> str:
    if real < charts.LEAST_FOR_IMPORTANCE:
        trials = plural(real, "complete trial is", "complete trials are")
        return f"{trials} too few to estimate which parameters matter; that takes {charts.LEAST_FOR_IMPORTANCE}."
    return (
        f"The {real} complete trials do not differ in their parameters, or not in their values, so their importance cannot be "
        "estimated."
    )


def _cost(page: Page, view: StudyView) -> None:
    ended = [trial for trial in (*view.trials, *view.confirmed) if trial.datetime_start and trial.datetime_complete]
    if not ended:
        return
    page.heading("Cost")
    groups = (
        ("complete", [trial for trial in view.trials if is_real(trial)]),
        ("pruned", [trial for trial in view.trials if IMPUTED in trial.user_attrs or trial.state == TrialState.PRUNED]),
        ("diverged or out of memory", [trial for trial in view.trials if FAILURE in trial.user_attrs]),
        ("failed", [trial for trial in view.trials if has_failed(trial) and FAILURE not in trial.user_attrs]),
        ("interrupted", [trial for trial in view.trials if INTERRUPTED in trial.user_attrs]),
        ("the best with new seeds", [trial for trial in view.confirmed if trial.state.is_finished()]),
    )
    rows: list[list[Cell]] = [
        [name, len(some), _time(sum(map(charts.seconds_of, some))), _time(fmean(map(charts.seconds_of, some)))]
        for name, some in groups
        if some
    ]
    rows.append(["all", len(ended), _time(sum(map(charts.seconds_of, ended))), None])
    page.table(["", "trainings", "time", "each"], rows, caption=_time_words(view, ended))
    page.figure(charts.timeline(view.trials))


def _time_words(view: StudyView, ended: list[FrozenTrial]) -> str:
    starts = [trial.datetime_start for trial in ended if trial.datetime_start is not None]
    ends = [trial.datetime_complete for trial in ended if trial.datetime_complete is not None]
    span = (max(ends) - min(starts)).total_seconds()
    left = view.progress.seconds_left
    rest = f", and about {_time(left)} left" if left else ""
    return (
        f"Times of trainings, added up over workers. From the first start to the last end it took {_time(span)}{rest}."
    )


def _all(page: Page, view: StudyView) -> None:
    page.heading("All trials")
    names = list(view.terms["space"])
    rows: list[list[Cell]] = [
        [
            trial.number + 1,
            _number(value_of(trial)) if is_real(trial) else None,
            _result_words(trial),
            trial.user_attrs.get(SEED),
            _time(charts.seconds_of(trial)) if trial.datetime_complete else None,
            *(_cell(trial.params.get(name)) for name in names),
        ]
        for trial in view.trials
    ]
    page.table(["trial", "value", "", "seed", "time", *names], rows)
    options = view.terms["options"]
    page.code("\n".join(f"{name} = {value!r}" for name, value in options.items()), "Options fixed for all trials")
    page.code(
        "\n".join(f"{name}: {value}" for name, value in view.terms["space"].items()),
        f"The search space {view.terms['space_hash']}",
    )


def _result_words(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    if FAILURE in attrs:
        return f"{attrs[FAILURE]}: counts as {trial.value:.4f}"
    if PRUNED_AT in attrs:
        return f"pruned at {10 * attrs[PRUNED_AT]} % with {attrs.get('observed', math.nan):.4f}"
    if INTERRUPTED in attrs:
        return "interrupted, and trained again under another number"
    if trial.state == TrialState.FAIL:
        return str(attrs.get(WITHDRAWN) or attrs.get("message") or "failed")
    kind = "the default" if BASELINE in attrs else "initial parameters" if INITIAL in attrs else ""
    if is_real(trial) and breaks(trial):
        return f"{kind}{', ' if kind else ''}left out: it follows prompts less than the base does"
    if kind:
        return kind
    return "" if trial.state == TrialState.COMPLETE else trial.state.name.lower()


def _baselines(view: StudyView) -> list[FrozenTrial]:
    return [trial for trial in view.trials if BASELINE in trial.user_attrs and is_real(trial)]


def _cell(value: Any) -> Cell:
    return f"{value:.3g}" if isinstance(value, float) else value


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
