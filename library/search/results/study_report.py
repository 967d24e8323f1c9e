"""report.html of a study: what to take from it, how sure that is, and what it was made of."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from PIL import Image

from library.report.page import Page
from library.search.results import charts
from library.search.results.contact_sheet import sheet_pictures
from library.search.results.status import Look, broke_words, seed_of
from library.search.study.trial_values import FAILURE, IMPUTED, breaks, is_real, value_of
from library.search.study.verdict import SIGMAS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from library.report.page import Cell

WORDS_OF_LOSS = (
    "The value is the mean logarithm of the loss on held-out pictures over the untouched base's: 0 is the base, -0.05 is 5 % "
    "less loss, and lower is better. Pictures, timesteps and noise are the same in every trial."
)
WORDS_OF_IMAGE = (
    "The value is drift on unrelated prompts, weighted, minus what likeness to held-out photos has gained on the base: 0 is the "
    "base, and lower is better. Prompts, seeds and sampler are the same in every trial."
)


def build_report(look: Look, folder: Path) -> Page:
    """The page, of a study under way too. folder: of the study; what is not there is left out."""
    progress, terms = look.progress, look.terms
    page = Page(
        f"Search: {look.name}",
        f"{progress.done} of {look.n_trials} trials of {terms['script']}.py, objective {terms['objective']}.",
    )
    _recommendation(page, look)
    _best(page, look, folder)
    if any(is_real(trial) for trial in look.trials):
        _search(page, look)
        _parameters(page, look)
    _cost(page, look)
    _all(page, look)
    return page


def _recommendation(page: Page, look: Look) -> None:
    verdict = look.verdict
    page.heading("Recommendation")
    (page.paragraph if verdict.is_winner else page.notice)(verdict.words)
    if verdict.best is not None and not verdict.best.again:
        page.paragraph(
            "The best of many noisy values is lower than it deserves. It has not been trained again with other seeds, so expect "
            "less of it."
        )
    elif verdict.best is not None and verdict.best.fresh_mean is not None:
        page.paragraph(
            f"In the search it had {verdict.best.value:.4f}; with {len(verdict.best.again)} new seeds, which nobody chose, "
            f"{verdict.best.fresh_mean:.4f} on average. The latter is what to expect."
        )
    if verdict.sigma is not None:
        page.paragraph(
            f"Noise: trainings that differ by their seeds alone differ by a sigma of {verdict.sigma:.4f}, from "
            f"{len(_baselines(look))} of the default configuration and those of the best with new seeds. No difference below "
            f"{SIGMAS:g} sigma, {SIGMAS * verdict.sigma:.4f}, is called one; a sigma of so few values may itself be off by half."
        )
    page.paragraph(WORDS_OF_LOSS if look.terms["objective"] == "loss" else WORDS_OF_IMAGE)
    if verdict.broke:
        page.paragraph(f"{broke_words(verdict.broke)}.")
    for level, one in look.alerts.items():
        page.notice(f"{level}: {one['words']}")


def _best(page: Page, look: Look, folder: Path) -> None:
    verdict = look.verdict
    if not verdict.candidates:
        return
    page.heading("The best")
    names = list(look.terms["space"])
    rows: list[list[Cell]] = [
        [
            one.trial,
            f"{one.value:.4f}",
            ", ".join(f"{value:.4f}" for value in one.again.values()) or None,
            f"{one.mean:.4f}" if one.again else None,
            *(_cell(one.params.get(name)) for name in names),
        ]
        for one in verdict.candidates
    ]
    page.table(
        ["trial", "value", "again, new seeds", "mean", *names],
        rows,
        caption=f"Those trained again come first, by the mean. The default configuration: {_number(verdict.default)} on average.",
    )
    pictures = sheet_pictures(folder)
    if pictures:
        page.heading("Contact sheet", level=3)
        page.paragraph(
            "The same prompts and seeds for everyone. Numbers do not see everything: optimize.py pick N makes trial N the study's "
            "choice."
        )
        columns = len({caption.partition(",")[0] for _, caption in pictures})
        opened = []
        for path, caption in pictures:
            with Image.open(path) as picture:
                opened.append((picture.convert("RGB"), caption))
        page.pictures(opened, columns=columns, max_side=384)


def _search(page: Page, look: Look) -> None:
    verdict = look.verdict
    page.heading("The search")
    page.figure(
        charts.history(look.trials, verdict),
        f"The dashed line is the default configuration, the band {SIGMAS:g} sigma of its noise. What lies within it is not better.",
    )
    page.heading("Curves", level=3)
    page.figure(
        charts.curves(look.trials, [one.trial for one in verdict.candidates[:5]]),
        "Each trial at tenths of its own length; it counts with its best. In colour the best five. A curve that rises again has "
        "learned its pictures by heart.",
    )


def _parameters(page: Page, look: Look) -> None:
    page.heading("What the parameters do")
    space: dict[str, dict[str, Any]] = dict(look.terms["space"])
    order = list(space)
    found = charts.importances(look.trials)
    real = sum(map(is_real, look.trials))
    if found is None:
        page.paragraph(_no_importance_words(real))
    else:
        order = [*found, *(name for name in order if name not in found)]
        page.figure(charts.importance(found), _importance_words(real))
    page.heading("Slices", level=3)
    page.figures(
        charts.slices(look.trials, space, order),
        "Each point is a trial, the later the lighter. Trials differ in all parameters at once, so a slope here may be another's.",
    )
    if real > 1:
        page.heading("Together", level=3)
        page.figure(
            charts.parallel(look.trials, space, order[:6]),
            "A line is a trial, the better the more orange. Drag along an axis to keep some of them."
            + (" The six that matter most." if found and len(order) > 6 else ""),
            least_width=860,
        )


def _importance_words(real: int) -> str:
    few = f" Of {real} trials it is unstable; take it as a hint." if real < charts.STABLE_IMPORTANCE else ""
    return (
        "The share of the variance of the values that each parameter explains by itself, by fANOVA; what is missing from 100 % "
        f"belongs to several together.{few}"
    )


def _no_importance_words(real: int) -> str:
    if real < charts.LEAST_FOR_IMPORTANCE:
        one = "1 trial that went to its end is" if real == 1 else f"{real} trials that went to their end are"
        return f"{one} too few to tell what matters; {charts.LEAST_FOR_IMPORTANCE} are needed."
    return (
        f"The {real} trials that went to their end do not differ in their parameters, or not in their values: nothing can be told "
        "of what matters."
    )


def _cost(page: Page, look: Look) -> None:
    ended = [one for one in (*look.trials, *look.confirmed) if one.datetime_start and one.datetime_complete]
    if not ended:
        return
    page.heading("Cost")
    groups = (
        ("to the end", [one for one in look.trials if is_real(one)]),
        ("pruned", [one for one in look.trials if IMPUTED in one.user_attrs or one.state == TrialState.PRUNED]),
        ("diverged or out of memory", [one for one in look.trials if FAILURE in one.user_attrs]),
        ("failed", [one for one in look.trials if one.state == TrialState.FAIL]),
        ("the best again", [one for one in look.confirmed if one.state.is_finished()]),
    )
    rows: list[list[Cell]] = [
        [name, len(some), _time(sum(map(charts.seconds_of, some))), _time(fmean(map(charts.seconds_of, some)))]
        for name, some in groups
        if some
    ]
    rows.append(["together", len(ended), _time(sum(map(charts.seconds_of, ended))), None])
    page.table(["", "trainings", "time", "each"], rows, caption=_time_words(look, ended))
    page.figure(charts.timeline(look.trials))


def _time_words(look: Look, ended: list[FrozenTrial]) -> str:
    starts = [one.datetime_start for one in ended if one.datetime_start is not None]
    ends = [one.datetime_complete for one in ended if one.datetime_complete is not None]
    span = (max(ends) - min(starts)).total_seconds()
    left = look.progress.seconds_left
    rest = f", and about {_time(left)} left" if left else ""
    return f"Time of trainings, added up over workers. From the first to the last it took {_time(span)}{rest}."


def _all(page: Page, look: Look) -> None:
    page.heading("All trials")
    names = list(look.terms["space"])
    rows: list[list[Cell]] = []
    for trial in look.trials:
        rows.append(
            [
                trial.number + 1,
                _number(value_of(trial)) if trial.value is not None and is_real(trial) else None,
                _how(trial),
                seed_of(trial),
                _time(charts.seconds_of(trial)) if trial.datetime_complete else None,
                *(_cell(trial.params.get(name)) for name in names),
            ]
        )
    page.table(["trial", "value", "", "seed", "time", *names], rows)
    options = look.terms["options"]
    page.code("\n".join(f"{name} = {value!r}" for name, value in options.items()), "Options fixed for all trials")
    page.code(
        "\n".join(f"{name}: {value}" for name, value in look.terms["space"].items()),
        f"The search space {look.terms['space_hash']}",
    )


def _how(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    if FAILURE in attrs:
        return f"{attrs[FAILURE]}: told as {trial.value:.4f}"
    if "pruned_at" in attrs:
        return f"pruned at {10 * attrs['pruned_at']} % with {attrs.get('observed', float('nan')):.4f}"
    if trial.state == TrialState.FAIL:
        return str(attrs.get("withdrawn") or attrs.get("message") or "failed")
    of = "the default" if "baseline" in attrs else "as given to begin with" if "initial" in attrs else ""
    if is_real(trial) and breaks(trial):
        return f"{of}{', ' if of else ''}left out: it follows prompts less than the base does"
    if of:
        return of
    return "" if trial.state == TrialState.COMPLETE else trial.state.name.lower()


def _baselines(look: Look) -> list[FrozenTrial]:
    return [one for one in look.trials if "baseline" in one.user_attrs and is_real(one)]


def _cell(value: Any) -> Cell:
    return f"{value:.3g}" if isinstance(value, float) else value


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
