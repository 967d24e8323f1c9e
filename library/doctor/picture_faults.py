"""Findings about pictures by themselves: unreadable, blurred, badly exposed, with borders or writing, enlarged or cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from library.data.trained_image import TrainedImage
from library.doctor.findings import Finding, Severity
from library.doctor.likeness import common_background, duplicate_pairs, group_captions, groups
from library.doctor.measures import Measures
from library.words import plural

# Of 300 ImageNet photographs 2 are above it, of 106 careful ones none; of 40 blurred by a radius of 3 pixels nine in ten.
BLURRED = 0.57
DARK, BRIGHT, FLAT = 80, 200, 30
"""Of 255: the brightest hundredth of a dark picture, the darkest of a bright one, and what lies between them in a flat one."""
LONE_BORDER = 0.08
"""Share of the side that a border on one side alone has at least."""
WRITTEN = 0.003
"""Share of the area."""
ENLARGED = 1.25
CUT, CUT_OF_CLASS = 0.25, 0.5
"""Share of a picture that its bucket cuts off, and that the square of class pictures does, where no option could keep it."""
LEAST_TRANSPARENT = 0.005
LEAST_ALIKE = 6
"""So many pictures of one background at least, and half of all."""


class Measured(NamedTuple):
    picture: TrainedImage
    path: str
    measures: Measures


class _Fault(NamedTuple):
    """A finding about each picture by itself."""

    kind: str
    severity: Severity
    title: tuple[str, str]
    """One and many, after the number."""
    advice: str
    found: Callable[[Measured], str | None]
    """What to say under a picture that has it, which may be nothing; None where it has not."""


def _when(holds: bool, text: str = "") -> str | None:
    return text if holds else None


def _exposure(one: Measured) -> str | None:
    dark, bright = one.measures.dark, one.measures.bright
    if bright < DARK:
        return "too dark"
    if dark > BRIGHT:
        return "too bright"
    return "hardly any contrast" if bright - dark < FLAT else None


def _borders(one: Measured) -> str | None:
    borders = one.measures.borders
    found = {side: share for side, share in borders._asdict().items() if share > 0}
    # A box on a plain ground ends in a straight line too, seldom on two opposite sides and seldom far from the rim.
    opposite = (borders.left and borders.right) or (borders.top and borders.bottom)
    if not opposite and max(borders) < LONE_BORDER:
        return None
    return ", ".join(f"{side} {share:.0%}" for side, share in found.items()) or None


_FAULTS = (
    _Fault(
        "blurred",
        "mend",
        ("picture is blurred", "pictures are blurred"),
        "Blur is learned like anything else. Take sharper ones, or leave them out; a shallow depth of field is meant so.",
        lambda one: _when(one.measures.blur > BLURRED, f"blur {one.measures.blur:.2f}"),
    ),
    _Fault(
        "exposure",
        "mend",
        ("picture is badly exposed", "pictures are badly exposed"),
        "Correct them, or leave them out where it is not meant so.",
        _exposure,
    ),
    _Fault(
        "borders",
        "mend",
        ("picture has a border of one colour", "pictures have a border of one colour"),
        "Frames and letterboxes are learned with the subject. Cut them off.",
        _borders,
    ),
    _Fault(
        "writing",
        "know",
        ("picture may have writing on it", "pictures may have writing on them"),
        "Watermarks and dates are learned with the subject: cut or paint them out. Where writing belongs there, name it in the "
        "caption. (A guess from edges, which misses large letters.)",
        lambda one: _when(one.measures.writing > WRITTEN),
    ),
    _Fault(
        "enlarged",
        "mend",
        ("picture is enlarged for training", "pictures are enlarged for training"),
        "What is not in the file cannot be learned from it. Find larger files, train at a lower resolution, or leave the pictures "
        "as they are with --bucket_no_upscale.",
        lambda one: _when(one.measures.enlarged > ENLARGED, f"x {one.measures.enlarged:.2f}"),
    ),
    _Fault(
        "cut",
        "know",
        ("picture loses much to its crop", "pictures lose much to their crop"),
        "See whether the subject is still whole. Of captioned pictures --enable_bucket keeps the aspect; an own crop is better.",
        lambda one: _when(
            one.measures.fitted.cut > (CUT if one.picture.class_id is None else CUT_OF_CLASS),
            f"{one.measures.fitted.cut:.0%} cut off",
        ),
    ),
    _Fault(
        "transparent",
        "know",
        ("picture is partly transparent", "pictures are partly transparent"),
        "Training lays them on white. With --alpha_mask and --masked_loss what is transparent does not count; or give them a "
        "background each.",
        lambda one: _when(
            one.measures.transparent > LEAST_TRANSPARENT and not one.picture.has_mask, f"{one.measures.transparent:.0%}"
        ),
    ),
    _Fault(
        "turned",
        "know",
        ("picture is stored turned or mirrored", "pictures are stored turned or mirrored"),
        "Training turns them as their EXIF says, as they stand here. Programs that do not look at EXIF see them lying: turn them "
        "for good where such a program cropped or captioned them.",
        lambda one: _when(one.measures.turned),
    ),
)


def picture_findings(measured: Sequence[Measured]) -> Iterator[Finding]:
    for fault in _FAULTS:
        found = [(one.path, text) for one in measured if (text := fault.found(one)) is not None]
        if found:
            yield Finding(
                fault.kind,
                fault.severity,
                f"{plural(len(found), *fault.title)}.",
                fault.advice,
                tuple(path for path, _ in found),
                tuple(text for _, text in found) if any(text for _, text in found) else (),
            )


def unreadable_finding(unreadable: Mapping[str, str]) -> Iterator[Finding]:
    """unreadable: path -> why."""
    if unreadable:
        yield Finding(
            "unreadable",
            "spoils",
            f"{plural(len(unreadable), 'picture', 'pictures')} cannot be read.",
            "A training leaves them out. Save them again from where they came, or take them away.",
            tuple(unreadable),
            tuple(unreadable.values()),
        )


def likeness_findings(training: Sequence[Measured], validation: Sequence[Measured]) -> Iterator[Finding]:
    """Copies among the training pictures, copies of held-out ones, and a background that half of them share."""
    every = [*training, *validation]
    pairs = duplicate_pairs([one.measures for one in every])
    by_path = [(i, j) for i, j in pairs if every[i].path != every[j].path]  # not one file at two resolutions
    within = [(i, j) for i, j in by_path if j < len(training)]
    if within:
        joined = groups(within)
        yield Finding(
            "duplicates",
            "mend",
            f"{sum(map(len, joined)):,} pictures are copies of each other, or mirror images, in {plural(len(joined), 'group')}.",
            "A picture that is there twice counts twice, and is what a LoRA learns by heart first. Keep the best of each group.",
            tuple(every[index].path for group in joined for index in group),
            group_captions(joined),
        )
    across = [(i, j) for i, j in by_path if i < len(training) <= j]
    if across:
        held = sorted({j for _, j in across})
        twin = {j: every[i].path for i, j in across}
        yield Finding(
            "held out and trained",
            "mend",
            f"{plural(len(held), 'held-out picture is', 'held-out pictures are')} trained on as well, as a copy.",
            "The validation loss then says how well it is known by heart. Keep one of the two.",
            tuple(every[index].path for index in held),
            tuple(f"as {os.path.basename(twin[index])}" for index in held),
        )
    copies = {j for _, j in within}
    yield from _backgrounds(
        [one for i, one in enumerate(training) if i not in copies and not one.picture.image.subset.is_reg]
    )


def _backgrounds(single: Sequence[Measured]) -> Iterator[Finding]:
    """single: training pictures, each once."""
    alike = [single[index] for index in common_background([one.measures for one in single])]
    if len(alike) >= LEAST_ALIKE and len(alike) >= len(single) / 2:
        yield Finding(
            "backgrounds",
            "know",
            f"{len(alike)} of {len(single)} pictures have nearly the same background.",
            "It is learned with the subject. Take other backgrounds too, or name this one in the captions.",
            tuple(one.path for one in alike),
        )
