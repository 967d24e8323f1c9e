"""Pictures that are alike: near duplicates, also mirrored ones, and backgrounds that most of a data set shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from library.doctor.measures import LAYOUT, Measures

HASHES_DIFFER = 10
"""Bits of 64 in which the hashes of two copies differ at most: a re-encoded, scaled or slightly cropped one stays below 8. Of the
44,850 pairs of 300 photographs one is as near, and that has other colours."""
COLOURS_DIFFER = 12.0
"""Root mean square, of 255, by which the colours of copies differ at most. Frames of one scene lie above it."""
BACKGROUNDS_DIFFER = 12.0
"""The same for the rim of two pictures with one background."""


def duplicate_pairs(measures: Sequence[Measures]) -> list[tuple[int, int]]:
    """Pairs (i < j) of pictures that look the same, or as in a mirror."""
    if len(measures) < 2:
        return []
    hashes = np.stack([one.hashed for one in measures]).astype(np.float32)
    mirrored = np.stack([one.mirrored for one in measures]).astype(np.float32)
    colours = np.stack([one.colours for one in measures])  # [n, 8, 8, 3]
    pairs: set[tuple[int, int]] = set()
    for other, seen in ((hashes, colours), (mirrored, colours[:, :, ::-1])):
        # Signs: the product of two hashes is 64 - 2 x the number of bits in which they differ.
        near = np.argwhere(np.triu(hashes @ other.T >= 64 - 2 * HASHES_DIFFER, 1))
        pairs |= {(int(i), int(j)) for i, j in near if _rms(colours[i] - seen[j]) <= COLOURS_DIFFER}
    return sorted(pairs)


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
    rim[2:-2, 2:-2] = False
    rims = np.stack([one.colours[rim].ravel() for one in measures])  # [n, 48 x 3]
    squares = np.square(rims).sum(axis=1)
    means = (squares[:, None] + squares[None] - 2 * rims @ rims.T) / rims.shape[1]
    near = means <= BACKGROUNDS_DIFFER**2
    return np.flatnonzero(near[near.sum(axis=1).argmax()]).tolist()


def _rms(differences: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(differences).mean()))
