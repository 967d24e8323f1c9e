"""Counts with their nouns."""

from __future__ import annotations

import pytest

from library.words import plural


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0, "picture"), "0 pictures"),
        ((1, "picture"), "1 picture"),
        ((1562, "step"), "1,562 steps"),
        ((2, "batch", "batches"), "2 batches"),
        ((1, "trial is", "trials are"), "1 trial is"),
        ((-1, "epoch"), "-1 epochs"),
    ],
)
def test_a_count_has_its_noun_in_the_right_number(given: tuple[int, str], text: str) -> None:
    assert plural(*given) == text
