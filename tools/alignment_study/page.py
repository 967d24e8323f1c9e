"""The results in docs/does_alignment_help.md: the part of the page between two marks is written anew from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from library.errors import UserError
from tools.alignment_study.arms import WITHOUT, Arm
from tools.alignment_study.compare import MEASURES, findings, overview, table
from tools.alignment_study.settings import CLASSES, STUDIES

BEGIN = "<!-- Results, from here to the next mark: written by tools/does_alignment_help.py, changes are lost. -->"
END = "<!-- End of the results. -->"
TITLES = {
    CLASSES: "Nine new classes (train_repa.py)",
    "concept": "One new thing from twelve pictures (train_network.py)",
}
CAPTIONS = {
    "numbers": "A line for each seed, from without to with; dashed, the untouched base.",
    "loss": "Loss on held-out pictures while training, by train_repa.py's own validation; differences seed by seed: mean, lowest "
    "to highest. Below 0, alignment has the lower loss. Quarter 1 is the least noise.",
    "features": "What can be read off the trunk's map at mid, by timestep of the noise: mean of the seeds, lowest to highest.",
    "pictures": "Held-out pictures, and what base and arms draw from the same noise: the first seeds, nothing chosen.",
}
TIMES = 3
"""How often its spread a likeness must lie beyond the base's to count as learned."""


def put_between_marks(page: str, text: str) -> str:
    """`page` with `text` between its marks. Raises UserError where they are not there once each, in their order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(
            f"The page has lost the marks that the results stand between. Restore these lines: {BEGIN} {END}"
        )
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{after}"


def results_text(results: Mapping[str, Any], figures: Mapping[str, Sequence[str]], folder: str) -> str:
    """Markdown of everything that was found. folder: of the figures, as the page names it."""
    lines = [_made(results["facts"]), ""]
    for study in STUDIES:
        if study in results["studies"]:
            lines += _study(study, results["studies"][study], figures[study], folder)
    lines += ["### What the numbers are", "", "| | |", "|---|---|"]
    there = {
        name
        for one in results["studies"].values()
        for arm in one["arms"].values()
        for run in arm.values()
        for name in run
    }
    lines += [f"| {one.title} | {one.meaning} |" for name, one in MEASURES.items() if name in there]
    return "\n".join(lines)


def _made(facts: Mapping[str, str]) -> str:
    return "\n".join(["| made with | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _study(study: str, found: Mapping[str, Any], figures: Sequence[str], folder: str) -> list[str]:
    arms = {arm: {int(seed): one for seed, one in runs.items()} for arm, runs in found["arms"].items()}
    lines = [f"### {TITLES[study]}", ""]
    others = [arm for arm in arms if arm != WITHOUT]
    if len(others) > 1:
        lines += [*overview(arms[WITHOUT], {Arm.parse(arm).label: arms[arm] for arm in others}), ""]
    for arm in others:
        title = Arm.parse(arm).title
        said = findings(arms[WITHOUT], arms[arm])
        lines += [
            *(
                [f"#### {title[0].upper() + title[1:] if Arm.parse(arm).recipe else title}", ""]
                if len(others) > 1
                else []
            ),
            *said[:1],
            "",
            *(f"- {one}" for one in said[1:]),
            "",
            *table(found["base"], arms[WITHOUT], arms[arm], title),
            "",
        ]
    lines += [
        f"Arms: mean (lowest to highest of the seeds). ± is half of the 95 % interval of the mean difference. Held-out pictures "
        f"are like others of their kind by {found['photos_among_themselves']:.3f}.",
        "",
    ]
    if study != CLASSES:
        lines += [*_learned(found["gains"]), ""]
    for name in figures:
        kind = name.removeprefix(f"{study}_").partition(".")[0]
        lines += [f"![{CAPTIONS[kind]}]({folder}/{name})", "", f"*{CAPTIONS[kind]}*", ""]
    return lines


def _learned(gains: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[str]:
    """Whether a LoRA of twelve pictures draws the thing: likeness beyond the base's, in units of its own spread."""
    lines = [
        "Likeness beyond the base's, picture by picture (same prompt, same noise), with half of its 95 % interval over the noise:",
        "",
        "| arm | seed | beyond the base | times its spread |",
        "|---|---|---|---|",
    ]
    ratios = {}
    for arm, runs in gains.items():
        for seed, gain in runs.items():
            value, margin = gain["value"], gain["margin"]
            ratios[arm, seed] = value / margin if value is not None and margin else 0.0
            shown = "–" if value is None else f"{value:+.3f}".replace("-", "−") + (f" ± {margin:.3f}" if margin else "")
            lines.append(f"| {Arm.parse(arm).title} | {seed} | {shown} | {ratios[arm, seed]:.1f} |".replace("-", "−"))
    enough = sum(ratio > TIMES for ratio in ratios.values())
    lines += ["", f"Beyond {TIMES} times its spread: {enough} of {len(ratios)} runs."]
    return lines
