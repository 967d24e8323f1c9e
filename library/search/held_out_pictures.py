"""Which pictures a study judges its trials by, where nobody has said: a share of them, held out as train_network.py does.

So a configuration with the same validation_split and validation_seed holds out the same pictures. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from library.data.training_images import TrainingImage, split_place
from library.errors import UserError

EVALUATION_SEED = 1234
"""Of noise, timesteps and the choice of pictures, whatever seed a trial is trained with."""

FEWEST = 3


def held_out_count(pictures: int) -> int:
    """How many of so many pictures are held out where nobody said: a tenth, and two at least."""
    return max(2, math.ceil(pictures / 10))


def share_to_hold_out(images: Iterable[TrainingImage], seed: int = EVALUATION_SEED) -> float:
    """The validation_split that holds out just `held_out_count` of the images, with as few digits as tell them apart.

    Raises UserError for fewer than three; regularisation images do not count.
    """
    names = {image.identity for image in images if not image.subset.is_reg}
    if len(names) < FEWEST:
        raise UserError(
            f"A study judges its trials by pictures that they do not see: two at least, and there are {len(names)} pictures in "
            "all. Add pictures."
        )
    places = sorted(split_place(name, seed) for name in names)
    count = held_out_count(len(names))
    last, first_kept = places[count - 1], places[count]
    for digits in range(2, 18):
        share = (math.floor(last / 2**64 * 10**digits) + 1) / 10**digits
        if last < share * 2**64 <= first_kept:
            return share
    raise AssertionError("two pictures have one hash")
