"""--deep: what the teacher sees in each picture, and which pictures it takes for alike or for strangers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from library.data.pixels import glance
from library.device import choose_device
from library.diffusion.alignment_losses import normalize
from library.diffusion.dense_maps import colour_picture, pca_colours
from library.doctor.findings import Finding
from library.doctor.likeness import group_captions, groups
from library.doctor.measures import Asked, seen_part
from library.doctor.picture_faults import Measured
from library.models.embedded import SHAPES_DINOV2
from library.models.encoders import TeacherEncoder
from library.models.teachers import load_teacher
from library.options.run import RunOptions
from library.progress import doing
from library.words import plural

SIDE, GRID = 224, 16
"""Pixels a side of what the teacher is shown, and at most so many tokens a side that are kept of it."""
MAPS = 240
"""Pictures whose components are shown."""
ALIKE = 0.95
"""Cosine of two pictures' mean tokens from which they are said to be alike. A guess; it depends on the teacher."""
STRANGE = 4.0
"""Median deviations from the median at which a regularisation picture is said to be another thing. A guess."""


@dataclass
class Answer:
    maps: dict[str, Image.Image] = field(default_factory=dict)
    """Path -> the first three principal components of its tokens, as colours."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ask_teacher(measured: Sequence[Measured], asked: Sequence[Asked], options: RunOptions) -> Answer:
    """asked: how the pictures of `measured` are read, in their order. Raises UserError where the teacher cannot be used."""
    name = options.model.dino_model[0]
    with doing("loading the teacher"):
        teacher = load_teacher(name, device=choose_device(options.model.device))
        grid = min(GRID, SIDE // teacher.size.patch)
        encoder = TeacherEncoder(teacher, SIDE, grid)
    maps: list[Tensor] = []
    means: list[Tensor] = []
    with doing("asking the teacher", len(asked)) as activity:
        for picture, one in zip(asked, measured, strict=True):
            seen = seen_part(glance(picture.read(), name=picture.name, least=SIDE), one.measures.fitted, 2 * SIDE)
            pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None]
            tokens = encoder.patch_tokens(pixels)[0].cpu()  # [D, h, w]
            means.append(normalize(tokens.flatten(1).T).mean(dim=0))
            if len(maps) < MAPS:
                maps.append(normalize(F.adaptive_avg_pool2d(tokens, grid).permute(1, 2, 0)))  # [grid, grid, D]
            activity.advance()
    answer = Answer()
    if not maps:
        return answer
    every = torch.stack(maps)
    colours = pca_colours(every, like=every)
    answer.maps = {
        one.path: colour_picture(colour, one.measures.thumbnail.size)
        for one, colour in zip(measured, colours, strict=False)
    }
    directions = normalize(torch.stack(means))
    likeness = directions @ directions.T  # [n, n]
    answer.findings = [*_alike(measured, likeness), *_strangers(measured, likeness)]
    if name == SHAPES_DINOV2:
        answer.notes.append(
            f"warning: {name} was trained on coloured shapes alone and knows nothing of photographs. Give --dino_model "
            "facebook/dinov2-large, or the teacher of the training."
        )
    return answer


def _alike(measured: Sequence[Measured], likeness: Tensor) -> Iterator[Finding]:
    pairs = [
        (i, j) for i, j in torch.argwhere(likeness.triu(1) >= ALIKE).tolist() if measured[i].path != measured[j].path
    ]
    joined = [group for group in groups(pairs) if len(group) < max(3, len(measured) / 2)]
    if joined:
        yield Finding(
            "alike to the teacher",
            "know",
            f"{sum(map(len, joined)):,} pictures are alike to the teacher, in {plural(len(joined), 'group')}.",
            "They may be frames of one scene, which teach little more than one of them. Keep the best, or caption what differs.",
            tuple(measured[index].path for group in joined for index in group),
            group_captions(joined),
        )


def _strangers(measured: Sequence[Measured], likeness: Tensor) -> Iterator[Finding]:
    """Regularisation pictures that are less like the training pictures than the others are."""
    prior = [i for i, one in enumerate(measured) if one.picture.image.subset.is_reg]
    own = [i for i, one in enumerate(measured) if not one.picture.image.subset.is_reg]
    if len(prior) < 5 or not own:
        return
    nearness = likeness[prior][:, own].mean(dim=1)
    median = nearness.median()
    spread = (nearness - median).abs().median().clamp_min(1e-3)
    far = [index for index, near in zip(prior, nearness, strict=True) if near < median - STRANGE * spread]
    if far:
        yield Finding(
            "regularisation strange",
            "know",
            f"{plural(len(far), 'regularisation picture is', 'regularisation pictures are')} unlike the class to the teacher.",
            "Regularisation pictures keep what the base knows of the class. See whether they show it.",
            tuple(measured[index].path for index in far),
        )
