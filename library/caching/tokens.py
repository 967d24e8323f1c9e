"""Teacher tokens of bucketed pictures, by bucket: the teacher sees what the bucket keeps of each, in the bucket's aspect.

A value is float16 [N, D], or int8 with a scale for each token: N = rows x columns of about token_grid², row by row. Its key
is the sample id and `_mid`. Another teacher, resolution, grid or precision has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from library.caching.by_bucket import (
    BucketCaches,
    BucketedPicture,
    BucketKind,
    FlippingEncoder,
    fill_stores,
    plan_stores,
)
from library.caching.fill import Say
from library.caching.producers import Wanted
from library.caching.teacher import Teacher
from library.data.buckets import Size
from library.data.pixels import PIXELS_VERSION
from library.models.encoders import grid_in_aspect
from library.processes import Processes

KIND = "tokens"
LABEL = "tokens"
# As train_repa.py's cache_batch_size: the teacher is larger than the VAE and its pictures are smaller.
BATCH_SIZE = 16


def prepare_tokens(
    pictures: Sequence[BucketedPicture],
    teacher: Teacher,
    *,
    cache_dir: Path,
    workers: int,
    processes: Processes,
    say: Say,
) -> BucketCaches:
    """Make the tokens of all pictures of a run complete, encoding what is missing or no longer fits; say what was done.

    Raises UserError: no picture can be read, a store in use, no space.
    """
    with processes.main_first():
        facts, size = teacher.facts(cache_dir), teacher.size
    producer = facts | {"dtype": teacher.dtype, "pixels": PIXELS_VERSION, "precision": teacher.precision}

    def wanted(bucket: Size) -> Wanted:
        rows, columns = grid_in_aspect(teacher.grid, *bucket)
        seen = [side * size.patch for side in grid_in_aspect(teacher.resolution // size.patch, *bucket)]
        own = producer | {"grid": [rows, columns], "input_pixels": seen}
        return Wanted(KIND, teacher.dtype, (rows * columns, size.width), own, remedy="--mixed_precision no may help")

    kind = BucketKind(LABEL, KIND, cache_dir, producer, "teacher, resolution, grid or precision", wanted)
    plan = plan_stores(pictures, kind)
    encoder = FlippingEncoder(partial(teacher.encoder, processes.device))
    return fill_stores(plan, kind, encoder, batch_size=BATCH_SIZE, workers=workers, processes=processes, say=say)
