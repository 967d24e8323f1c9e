"""Pictures that are alike: near duplicates, also mirrored ones, and backgrounds that most of a data set shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from library.doctor.measures import LAYOUT, Measures

HASHES_DIFFER = 10
"""Bits of 64 in which the hashes of two copies differ at most."""
COLOURS_ALIKE = 0.95
"""Correlation of the colours, cell by cell, of two copies. Of copies of 41 photographs (JPEG of quality 60, half the size, 2 % cut
off all around, 10 % brighter) all but one cut one reach it."""
DETAIL_ALIKE = 0.7
"""Correlation of the details of two copies, shifted and cut as fits best. Of 20 photographs: at least 0.98 for JPEG of quality
60, half the size, 2 % cut off all around and 10 % brighter, 0.80 for 4 % cut off one side; 0.47 for two photographs of one dog that
sat still, 0.50 for two drawn shapes on one ground."""
DETAIL, CUTS = 64, (0.0, 0.02, 0.04)
"""Cells a side of what is compared, and what is cut off all around of either."""
COLOURS_DIFFER = 25.0
"""Root mean square of their differences, of 255: what brightening does."""
BACKGROUNDS_DIFFER = 12.0
"""The same for the rims of two pictures with one background."""


def duplicate_pairs(measures: Sequence[Measures]) -> list[tuple[int, int]]:
    """Pairs (i < j) of pictures that look the same, or as in a mirror."""
    if len(measures) < 2:
        return []
    hashes = np.stack([one.hashed for one in measures]).astype(np.float32)
    mirrored = np.stack([one.mirrored for one in measures]).astype(np.float32)
    colours = np.stack([one.colours for one in measures])  # [n, 16, 16, 3]
    pairs: set[tuple[int, int]] = set()
    for other, seen in ((hashes, colours), (mirrored, colours[:, :, ::-1])):
        # Signs: the product of two hashes is 64 - 2 x the number of bits in which they differ.
        near = np.argwhere(np.triu(hashes @ other.T >= 64 - 2 * HASHES_DIFFER, 1))
        alike = ((int(i), int(j)) for i, j in near if _same_colours(colours[i], seen[j]))
        pairs |= {(i, j) for i, j in alike if _same_details(measures[i], measures[j], is_mirrored=other is mirrored)}
    return sorted(pairs)


def _same_details(one: Measures, other: Measures, is_mirrored: bool) -> bool:
    """Looks closer, at what two pictures on one ground differ in: hashes and colours are of the coarsest forms."""
    first, second = (
        _details(one.thumbnail),
        _details(ImageOps.mirror(other.thumbnail) if is_mirrored else other.thumbnail),
    )
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    pairs = [(first[0], cut) for cut in second] + [(cut, second[0]) for cut in first[1:]]
    found = (_correlation(a, np.roll(b, shift, (0, 1))) for a, b in pairs for shift in shifts)
    return any(value >= DETAIL_ALIKE for value in found)


def _details(picture: Image.Image) -> list[npt.NDArray[np.float32]]:
    """[DETAIL, DETAIL] grey without its coarse forms, once for each of CUTS."""
    from scipy import ndimage

    width, height = picture.size
    details = []
    for cut in CUTS:
        box = (width * cut, height * cut, width * (1 - cut), height * (1 - cut))
        grey = np.asarray(picture.convert("L").resize((DETAIL, DETAIL), Image.Resampling.BOX, box=box), np.float32)
        details.append(grey - ndimage.gaussian_filter(grey, DETAIL / 16))
    return details


def _correlation(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """1 for two that have no details at all. Cells that a shift carries around the rim do not count."""
    a, b = one[1:-1, 1:-1], other[1:-1, 1:-1]
    lengths = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / lengths if lengths else 1.0


def _same_colours(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> bool:
    if _rms(one - other) > COLOURS_DIFFER:
        return False
    spread = one.std() * other.std()
    return spread == 0 or float(((one - one.mean()) * (other - other.mean())).mean() / spread) >= COLOURS_ALIKE


def group_captions(found: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Of each member of each group, in order, which group it is of."""
    return tuple(f"group {number}" for number, group in enumerate(found, start=1) for _ in group)


def groups(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Indices that are joined by pairs, each group sorted, the largest group first."""
    leader: dict[int, int] = {}

    def first(index: int) -> int:
        while leader.setdefault(index, index) != index:
            index = leader[index]
        return index

    for one, other in pairs:
        low, high = sorted((first(one), first(other)))
        leader[high] = low
    found: dict[int, list[int]] = {}
    for index in sorted(leader):
        found.setdefault(first(index), []).append(index)
    return sorted(found.values(), key=len, reverse=True)


def common_background(measures: Sequence[Measures]) -> list[int]:
    """The largest set of pictures whose rim has the colours of one of them, each cell by itself."""
    if not measures:
        return []
    rim = np.ones((LAYOUT, LAYOUT), bool)
    rim[3:-3, 3:-3] = False
    rims = np.stack([one.colours[rim].ravel() for one in measures])  # [n, cells x 3]
    squares = np.square(rims).sum(axis=1)
    means = (squares[:, None] + squares[None] - 2 * rims @ rims.T) / rims.shape[1]
    near = means <= BACKGROUNDS_DIFFER**2
    return np.flatnonzero(near[near.sum(axis=1).argmax()]).tolist()


def _rms(differences: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(differences).mean()))
