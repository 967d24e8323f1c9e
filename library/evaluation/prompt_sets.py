"""The prompts of an evaluation: those with the subject, and unrelated ones. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.inference.lora_tags import cut_out_tags
from library.inference.picture_request import PictureRequest, request_of
from library.inference.prompt_file import PromptLine, read_prompt_file
from library.inference.prompt_syntax import parse_prompt
from library.models.embedded import TINY_BASES
from library.options.evaluate import EvaluateOptions

MOST_CAPTIONS = 4
"""Captions that are used as prompts where no prompt is given."""
FEWEST_SEEDS = 2
"""Seeds of each prompt: a single one has no variance."""

UNRELATED = (
    "a photo of a dog in a park",
    "a bowl of fruit on a wooden table",
    "a mountain lake at dawn",
    "a portrait of an old man",
    "a red car parked in a narrow street",
    "an oil painting of a ship in a storm",
    "a living room with a green sofa",
    "a close-up of a sunflower",
)
UNRELATED_SHAPES = (
    "a large red circle in the middle on a plain white background",
    "a medium blue square on the left on a striped grey background",
    "a small yellow star at the top on a dotted black background",
    "a large green triangle at the bottom on a plain turquoise background",
    "a medium red square at the top right on a checked white background",
    "a large blue star in the middle on a pink gradient background",
    "a medium yellow circle on the right on a plain brown background",
    "a large green circle at the bottom left on a dotted white background",
)
"""For the bases that come with the project, which draw nothing else."""


_SPECIAL = re.compile(r"[\\()\[\]|<>]")


@dataclass(frozen=True)
class PromptSet:
    """Requests, each of which is drawn with every seed."""

    requests: tuple[PictureRequest, ...]
    seeds: tuple[int, ...]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(request, seed) of each picture, in drawing order."""
        return [(number, seed) for number in range(len(self.requests)) for seed in self.seeds]

    @property
    def groups(self) -> list[int]:
        """The request of each picture."""
        return [number for number, _ in self.places]


@dataclass(frozen=True)
class Subject:
    """The prompts of the subject. source: where they come from, for the plan."""

    lines: list[PromptLine]
    source: str


def subject_prompts(
    options: EvaluateOptions, captions: Sequence[str | None], metadata: Mapping[str, str]
) -> Subject | None:
    """The prompts of the options, else captions of the photos, else of the training by the adapter's metadata; else None."""
    pictures = options.pictures
    if pictures.prompts is not None:
        return Subject(read_prompt_file(pictures.prompts), f"from {pictures.prompts}")
    if pictures.prompt:
        return Subject([PromptLine(text) for text in pictures.prompt], "as given")
    if known := list(dict.fromkeys(caption for caption in captions if caption)):
        chosen = [known[i * len(known) // MOST_CAPTIONS] for i in range(MOST_CAPTIONS)]
        return Subject(
            [PromptLine(plain_text(text)) for text in dict.fromkeys(chosen)], "captions of the held-out photos"
        )
    if trained := trained_captions(metadata):
        return Subject(
            [PromptLine(plain_text(text)) for text in trained], "captions of the training, from the adapter's metadata"
        )
    return None


def unrelated_prompts(file: Path | None, base: str, count: int) -> list[PromptLine]:
    """The prompts of the file, else of ours: at most so many that `count` pictures are FEWEST_SEEDS per prompt."""
    if file is not None:
        return read_prompt_file(file)
    texts = UNRELATED_SHAPES if is_ours(base) else UNRELATED
    return [PromptLine(text) for text in texts[: max(1, count // FEWEST_SEEDS)]]


def is_ours(base: str) -> bool:
    """Whether the base comes with the project."""
    return base in TINY_BASES or Path(base).name in TINY_BASES


def trained_captions(metadata: Mapping[str, str]) -> list[str]:
    """From kohya's ss_tag_frequency: the commonest tag, or some of the captions where no tag is repeated."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, TypeError, AttributeError):
        return []
    counts.pop("", None)
    if not counts:
        return []
    most = max(counts.values())
    common = [tag for tag, count in counts.items() if count == most]
    return common[:1] if most > 1 else common[:MOST_CAPTIONS]


def make_prompt_set(options: EvaluateOptions, lines: Sequence[PromptLine], size: int) -> PromptSet:
    """Requests of these prompts, with seeds for num_samples pictures, at least FEWEST_SEEDS per prompt."""
    pictures, sampling = options.pictures, options.sampling
    seeds = max(FEWEST_SEEDS, math.ceil(pictures.num_samples / len(lines)))
    requests = tuple(
        request_of(line, sampling, width=size, height=size, negative_prompt=pictures.negative_prompt) for line in lines
    )
    for request in requests:
        if tags := cut_out_tags(request.prompt)[1]:
            raise UserError(
                f"{tags[0]} of the prompt names an adapter. Evaluated adapters are named with --checkpoint instead."
            )
    return PromptSet(requests, tuple(range(pictures.seed, pictures.seed + seeds)))


def words_of(request: PictureRequest) -> str:
    """The plain words of a request's prompt at the last step, without its syntax: for CLIP."""
    parts = parse_prompt(request.prompt, request.steps, dialect=request.dialect).parts
    spans = (span for part in parts for span in part.schedule[-1].spans)
    return " ".join(" ".join(span.text for span in spans if not span.closes_chunk).split())


def plain_text(caption: str) -> str:
    """A caption as a literal prompt: brackets and bars are escaped, < and > removed."""
    return _SPECIAL.sub(lambda found: "" if found[0] in "<>" else "\\" + found[0], caption)
