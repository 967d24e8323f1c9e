"""The results as Markdown: a part of docs/does_alignment_help.md between two marks, or a page of their own. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from library.errors import UserError
from library.files import read_json, write_text
from library.words import plural
from tools.alignment_study.arms import WITHOUT, Arm
from tools.alignment_study.compare import MEASURES, findings, mean_of_seeds, overview, signed, table, with_numbers
from tools.alignment_study.settings import CLASSES, CONCEPT, PLAIN, SCRATCH, STUDIES

PAGE, IMAGES = "does_alignment_help.md", "images/does_alignment_help"
RESULTS = "results.json"
PARTS = ("control", "gradients", "plain", "first", "recipes", "seeds", "scope")
"""Of the project's page: each has a command of its own."""
GLOSSARY = "glossary"
"""Between marks of its own; every command writes it."""
TITLES = {
    SCRATCH: "A U-Net from nothing (train_repa.py)",
    PLAIN: "A LoRA on the pictures of the control (train_repa.py)",
    CLASSES: "New classes (train_repa.py)",
    CONCEPT: "One new thing (train_network.py)",
}
CAPTIONS = {
    "pictures": "Held-out pictures, and what base and arms draw from the same noise: the first seeds, nothing chosen.",
    "numbers": "A line for each seed, from without to with; dashed, the untouched base.",
    "course": "What is drawn on the way, read by the classifier: mean of the seeds, lowest to highest.",
    "gradients": "Cosine between the gradients of both losses on what is trained: a line for each seed, until alignment ended.",
    "loss": "Loss on held-out pictures while training, by train_repa.py's own validation; differences seed by seed: mean, lowest "
    "to highest. Below 0, alignment has the lower loss. Quarter 1 is the least noise.",
    "features": "What can be read off the trunk's map at the tap, by timestep of the noise: mean of the seeds, lowest to highest.",
}
FIRST_SHOWN = ("pictures", "numbers")
"""Figures that are seen at once; the others are opened."""
TIMES = 3
"""How often its spread a likeness must lie beyond the base's to count as learned."""


@dataclass(frozen=True)
class Place:
    """Where results are written. part: of the page in `folder`; "" for a page of their own in `folder`."""

    folder: Path
    part: str

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    @property
    def images(self) -> Path:
        return self.folder / IMAGES / self.part

    def read(self) -> str:
        """The page that the results go into. Raises UserError where it is not there or its marks are lost."""
        if not self.part:
            marks = "".join(f"\n{begin(part)}\n{end(part)}\n" for part in ("", GLOSSARY))
            return f"# Does alignment help?\n{marks}"
        if not self.page.is_file():
            raise UserError(f"{self.page} is not there, so no part of it can be written. Leave --part out.")
        page = self.page.read_text(encoding="utf-8")
        put_between_marks(page, "", self.part)
        return page

    def write(self) -> None:
        """The page anew, from the results and the figures that lie in `images`. Raises UserError as `written` does."""
        write_text(self.page, self.written())

    def written(self) -> str:
        """The page's text. Raises UserError where the results, the page or its marks are not there."""
        if not (self.images / RESULTS).is_file():
            raise UserError(
                f"{self.images / RESULTS} is not there. Leave --from_results out, to measure the runs first."
            )
        results = read_json(self.images / RESULTS)
        text = results_text(results, self.images, self.images.relative_to(self.folder).as_posix())
        page = put_between_marks(self.read(), text, self.part)
        return put_between_marks(page, glossary(None if self.part else names_in(results)), GLOSSARY)


def begin(part: str) -> str:
    named = f", part {part}" if part else ""
    return f"<!-- Results{named}, from here to the next mark: written by tools/does_alignment_help.py, changes are lost. -->"


def end(part: str) -> str:
    return f"<!-- End of the results{f', part {part}' if part else ''}. -->"


def put_between_marks(page: str, text: str, part: str) -> str:
    """`page` with `text` between a part's marks. Raises UserError where they are not there once each, in their order."""
    first, last = begin(part), end(part)
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise UserError(
            f"The page has lost the marks that the results stand between. Restore these lines: {first} {last}"
        )
    before, after = page[: page.index(first)], page[page.index(last) :]
    return f"{before}{first}\n\n{text.strip()}\n\n{after}"


def results_text(results: Mapping[str, Any], images: Path, folder: str) -> str:
    """Markdown of everything that was found. images: folder of the figures; folder: the same, as the page names it."""
    facts = {**results["facts"], "all numbers, seed by seed": f"[{RESULTS}]({folder}/{RESULTS})"}
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    lines = folded("Made with", ["| | |", "|---|---|", *rows, ""])
    for study in STUDIES:
        if study in results["studies"]:
            lines += _study(study, results["studies"][study])
            lines += _figures(study, images, folder)
    return "\n".join(lines)


def names_in(results: Mapping[str, Any]) -> set[str]:
    """The measures that the results have."""
    arms = [arm for one in results["studies"].values() for arm in one["arms"].values()]
    return {name for arm in arms for run in arm.values() for name in run}


def glossary(names: Collection[str] | None = None) -> str:
    """What each number is; once on a page. names: those that the page has, by default all."""
    rows = [f"| {one.title} | {one.meaning} |" for name, one in MEASURES.items() if names is None or name in names]
    return "\n".join(["### What the numbers are", "", "| | |", "|---|---|", *rows])


def folded(title: str, lines: list[str]) -> list[str]:
    """Lines that a reader opens."""
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "</details>", ""]


def _study(study: str, found: Mapping[str, Any]) -> list[str]:
    arms = {arm: with_numbers(runs) for arm, runs in found["arms"].items()}
    lines = [f"### {TITLES[study]}", ""]
    others = [arm for arm in arms if arm != WITHOUT]
    if len(others) > 1:
        lines += [*overview(arms[WITHOUT], {Arm.parse(arm).label: arms[arm] for arm in others}), ""]
    each: list[str] = []
    for arm in others:
        title, said = Arm.parse(arm).title, findings(arms[WITHOUT], arms[arm])
        if len(others) > 1:
            each += [f"#### {title[0].upper() + title[1:] if Arm.parse(arm).recipe else title}", ""]
        each += [*said[:1], "", *(f"- {one}" for one in said[1:]), ""]
        each += [*table(found["base"], arms[WITHOUT], arms[arm], title), ""]
    lines += folded("Each arm: in words, and with its numbers", each) if len(others) > 1 else each
    note = "Arms: mean (lowest to highest of the seeds). ± is half of the 95 % interval of the mean difference."
    if (alike := found["photos_among_themselves"]) is not None:
        note += f" Held-out pictures are like others of their kind by {alike:.3f}."
    lines += [note, ""]
    for arm, seeds in found.get("gradients", {}).items():
        lines += [_cosine(arm, [[*one.values()] for one in seeds.values() if one]), ""]
    if study == CONCEPT:
        lines += [*_learned(found["gains"]), ""]
    return lines


def _cosine(arm: str, measured: Sequence[Sequence[float]]) -> str:
    """measured: of each seed, the cosines on the way."""
    counts, mean = [len(one) for one in measured], mean_of_seeds([fmean(one) for one in measured])
    among = f"{min(counts)} to " if min(counts) < max(counts) else ""
    return (
        f"Cosine between the gradients of both losses, {Arm.parse(arm).label}: {signed(mean)} (mean of the seeds; each is the mean "
        f"of {among}{plural(max(counts), 'measurement')}, until alignment ended)."
    )


def _figures(study: str, images: Path, folder: str) -> list[str]:
    shown: dict[bool, list[str]] = {True: [], False: []}
    for kind, caption in CAPTIONS.items():
        for file in images.glob(f"{study}_{kind}.*"):
            shown[kind in FIRST_SHOWN] += [f"![{caption}]({folder}/{file.name})", "", f"*{caption}*", ""]
    return [*shown[True], *(folded("More figures", shown[False]) if shown[False] else [])]


def _learned(gains: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[str]:
    """Whether a LoRA of few pictures draws the thing: likeness beyond the base's, in units of its own spread."""
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
