"""The page and the JSON of an examination."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from library.doctor.examine import Examination
from library.doctor.findings import IN_WORDS, Finding
from library.doctor.measures import Measures
from library.doctor.words import are_tags, counted, token_count
from library.files import write_json
from library.report.page import Page
from library.words import plural

FORMAT_VERSION = 1
NAMED_PLACES = 3
SHOWN = 12
"""Pictures of a finding that the page shows; the JSON names all."""
SHEET = 240
"""Pictures of the contact sheet: some 6 KB each."""
QUALITY = 72
LONGEST = 300
"""Characters of a caption under a picture."""
_ENLARGEMENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def write_report(examination: Examination, path: Path) -> Path:
    """Write the page and, beside it, the findings as JSON, whose path is returned."""
    beside = path.with_suffix(".json")
    write_json(beside, findings_json(examination))
    report(examination).write(path)
    return beside


def findings_json(examination: Examination) -> dict[str, Any]:
    data = examination.data
    return {
        "format_version": FORMAT_VERSION,
        "base": examination.base,
        "family": examination.family.title,
        "pictures": len({one.image.path for one in data.every}),
        "held_out": len(data.validation),
        "looked_at": len(examination.measured),
        "trigger": examination.trigger,
        "tokens_read": examination.room,
        "findings": [finding.as_json() for finding in examination.findings],
        "notes": examination.notes,
        "buckets": [
            {"dataset": dataset.name, **table.info()} for dataset, table in zip(data.datasets, data.tables, strict=True)
        ],
    }


def verdict(examination: Examination) -> str:
    """All of it in one sentence."""
    counts = {name: sum(one.severity == name for one in examination.findings) for name in IN_WORDS}
    if not examination.findings:
        return "Nothing was found that would harm a training."
    said = [
        (counts["spoils"], "thing spoils the training", "things spoil the training"),
        (counts["mend"], "thing is worth mending", "things are worth mending"),
        (counts["know"], "thing is good to know", "things are good to know"),
    ]
    return f"{', '.join(plural(count, one, many) for count, one, many in said if count)}."


def report(examination: Examination) -> Page:
    data, family = examination.data, examination.family
    total = len({one.image.path for one in data.every})
    places = list(dict.fromkeys(_places(examination)))
    place = places[0] if len(places) == 1 else _together(places)
    page = Page(
        "What the training will see",
        f"{plural(total, 'picture')} from {place}, as a training of {family.title} takes them. {verdict(examination)}",
    )
    pictures = {one.path: one.measures for one in examination.measured}
    page.heading("Findings")
    for finding in examination.findings:
        _add_finding(page, examination, finding, pictures)
    if not examination.findings:
        page.paragraph("None. Look at the contact sheet all the same: no program knows what the pictures are for.")
    for note in examination.notes:
        (page.notice if note.startswith("warning: ") else page.paragraph)(note.removeprefix("warning: "))
    _add_buckets(page, examination)
    _add_captions(page, examination)
    if examination.teacher_maps:
        _add_teacher(page, examination)
    _add_sheet(page, examination)
    return page


def _places(examination: Examination) -> list[str]:
    data = examination.data
    if data.classes is not None:
        return [os.path.abspath(one.source.location) for one in data.classes.sets]
    subsets = [subset for dataset in data.datasets for subset in dataset.subsets]
    return [os.path.abspath(subset.image_dir or subset.metadata_file or "") for subset in subsets]


def _together(places: Sequence[str]) -> str:
    """ "train.csv and val.csv in /data/demo", or of more "12 folders in /data"."""
    root = os.path.commonpath(places)
    if len(places) > NAMED_PLACES:
        return f"{plural(len(places), 'folder or file', 'folders or files')} in {root}"
    *first, last = (os.path.relpath(place, root) for place in places)
    return f"{', '.join(first)} and {last} in {root}"


def _add_finding(page: Page, examination: Examination, finding: Finding, pictures: Mapping[str, Measures]) -> None:
    page.heading(f"{IN_WORDS[finding.severity]}: {finding.title}", level=3)
    page.paragraph(finding.advice)
    details = dict(zip(finding.pictures, finding.details, strict=False))
    shown = [path for path in finding.pictures if path in pictures][:SHOWN]
    if shown:
        cards = [
            (_thumbnail(pictures[path]), _joined(examination.named(path), details.get(path, ""))) for path in shown
        ]
        page.pictures(cards, quality=QUALITY, even=True)
    rest = [path for path in finding.pictures if path not in shown]
    if rest:
        lines = [_joined(path, details.get(path, "")) for path in rest[:200]]
        more = [f"and {len(rest) - 200:,} more; the .json beside this page names them all"] if len(rest) > 200 else []
        page.code("\n".join([*lines, *more]), caption=f"{plural(len(rest), 'picture')}{' more' if shown else ''}")


def _add_buckets(page: Page, examination: Examination) -> None:
    data = examination.data
    page.heading("Sizes")
    if data.classes is None:
        for dataset, table in zip(data.datasets, data.tables, strict=True):
            page.bars(
                [
                    (f"{width} x {height}", images, f"{plural(images, 'picture')}, {cut:.0%} cut off")
                    for (width, height), images, _, cut in table.rows
                ],
                f"Buckets of {dataset.name}, batch size {dataset.batch_size}",
            )
        enlarged = [one.fitted.resized[0] / one.fitted.original[0] for one in data.training]
    else:
        enlarged = [one.measures.enlarged for one in examination.measured]
    rows = []
    for low, high in zip(_ENLARGEMENTS, [*_ENLARGEMENTS[1:], None], strict=True):
        count = sum(low < factor and (high is None or factor <= high) for factor in enlarged)
        name = f"above x {low:g}" if high is None else f"x {low:g} to {high:g}"
        rows.append((name, count, f"{count:,}"))
    first = next((place for place, row in enumerate(rows) if row[1]), 0)
    last = max((place for place, row in enumerate(rows) if row[1]), default=0)
    page.bars(
        rows[first : last + 1],
        "Pixels in training for each pixel of the file, along a side: above 1 a picture is enlarged",
    )


def _add_captions(page: Page, examination: Examination) -> None:
    own = [caption for caption in examination.captions if caption.has_own]
    if examination.data.classes is not None or not own:
        return
    page.heading("Captions")
    lengths = [token_count(caption.text, examination.tokenizer) for caption in own]
    span = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
    tags = are_tags(own)
    trigger = f" The trigger word seems to be {examination.trigger!r}." if examination.trigger else ""
    page.paragraph(f"{plural(len(own), 'caption')} of {span} tokens; {examination.room} are read.{trigger}")
    counts = counted(own, tags=tags)
    what = "tag" if tags else "word"
    often = [(unit, count) for unit, count in counts.most_common(20) if count > 1]
    if often:
        page.bars(
            [(unit, count, f"{count}") for unit, count in often], f"{what.capitalize()}s by captions that have them"
        )
    once = sorted(unit for unit, count in counts.items() if count == 1)
    if once:
        page.code(", ".join(once[:400]), caption=f"{plural(len(once), what)} that only one caption names")


def _add_teacher(page: Page, examination: Examination) -> None:
    page.heading("What the teacher sees")
    page.paragraph(
        "Beside each picture the first three principal components of the teacher's tokens, as red, green and blue; all pictures "
        "share the colours, so that one colour is one kind of thing. What is one colour with its background cannot be told from it "
        "by the teacher's tokens."
    )
    pictures = []
    for one in examination.measured:
        if (colours := examination.teacher_maps.get(one.path)) is not None:
            pictures.append((_beside(_crop(one.measures), colours), examination.named(one.path)))
    page.pictures(pictures, quality=QUALITY)


def _add_sheet(page: Page, examination: Examination) -> None:
    page.heading("Contact sheet")
    texts = {caption.path: caption.text for caption in examination.captions}
    held = examination.held_out
    named = {path for finding in examination.findings for path in finding.pictures}
    shown = sorted(examination.measured, key=lambda one: one.path not in named)[:SHEET]
    less = f" {SHEET} of {len(examination.measured):,} are here, those with findings first."
    page.paragraph(
        "What is dark at the sides is cut off by the bucket, whose size stands under the picture."
        f"{less if len(shown) < len(examination.measured) else ''}"
    )
    cards = []
    for one in shown:
        width, height = one.measures.fitted.bucket
        facts = f"{examination.named(one.path)} · {width} x {height}"
        if one.path in held:
            facts += " · held out"
        cards.append((_thumbnail(one.measures), _joined(facts, texts.get(one.path, one.picture.image.caption))))
    page.pictures(cards, quality=QUALITY, even=True)


def _joined(first: str, second: str) -> str:
    second = " ".join(second.split())
    return f"{first}: {second[:LONGEST]}{'…' if len(second) > LONGEST else ''}" if second else first


def _box(measures: Measures) -> tuple[int, int, int, int]:
    """The part of the thumbnail that is trained, in its pixels."""
    across, down = (
        small / whole for small, whole in zip(measures.thumbnail.size, measures.fitted.resized, strict=True)
    )
    left, top, right, bottom = measures.fitted.crop
    return round(left * across), round(top * down), max(round(right * across), 1), max(round(bottom * down), 1)


def _crop(measures: Measures) -> Image.Image:
    return measures.thumbnail.crop(_box(measures))


def _thumbnail(measures: Measures) -> Image.Image:
    """The picture, darkened where its bucket cuts it off."""
    box = _box(measures)
    if box == (0, 0, *measures.thumbnail.size):
        return measures.thumbnail
    shown = Image.blend(measures.thumbnail, Image.new("RGB", measures.thumbnail.size), 0.7)
    shown.paste(measures.thumbnail.crop(box), box[:2])
    ImageDraw.Draw(shown).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=(255, 255, 255))
    return shown


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (2 * left.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right.resize(left.size, Image.Resampling.NEAREST), (left.width, 0))
    return both


def lines(examination: Examination) -> list[str]:
    """For a terminal: each finding in a line, with its first pictures."""
    found = []
    for finding in examination.findings:
        names = [examination.named(path) for path in finding.pictures[:3]]
        more = f", and {len(finding.pictures) - 3} more" if len(finding.pictures) > 3 else ""
        which = f" ({', '.join(names)}{more})" if names else ""
        found.append(f"{IN_WORDS[finding.severity].lower()}: {finding.title}{which}")
    return found
