"""Which pictures a study judges its trials by where nobody has chosen: the share that train_network.py would hold out.

A configuration with the same validation_split and validation_seed holds out the same pictures. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from library.data.training_images import TrainingImage, split_place
from library.errors import UserError
from library.words import plural

EVALUATION_SEED = 1234
"""Seed of the evaluation's noise and timesteps and of the choice of pictures, whatever seed a trial is trained with."""

FEWEST = 3
"""Pictures that a study needs: one to train on, two to judge its trials by."""


def held_out_count(pictures: int) -> int:
    """How many of so many pictures are held out where nobody has chosen: a tenth, and at least two."""
    return max(2, math.ceil(pictures / 10))


def require_enough_pictures(count: int, advice: str = "Add pictures.") -> None:
    """Raises UserError where so few pictures leave none to judge trials by."""
    if count < FEWEST:
        raise UserError(
            f"A study needs at least {plural(FEWEST, 'picture')}, because it judges trials by two that they are not trained on; "
            f"found {count}. {advice}"
        )


def share_to_hold_out(images: Iterable[TrainingImage], seed: int = EVALUATION_SEED) -> float:
    """The validation_split that holds out exactly `held_out_count` of the images, with as few digits as possible.

    Regularisation images do not count. Raises UserError for fewer than three images.
    """
    names = {image.identity for image in images if not image.subset.is_reg}
    require_enough_pictures(len(names))
    places = sorted(split_place(name, seed) for name in names)
    count = held_out_count(len(names))
    last, first_kept = places[count - 1], places[count]
    for digits in range(2, 18):
        share = (math.floor(last / 2**64 * 10**digits) + 1) / 10**digits
        if last < share * 2**64 <= first_kept:
            return share
    raise AssertionError("two pictures have one hash")
