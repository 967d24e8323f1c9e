"""Captions without their pictures: of a text file, of data sets, or of the generated pictures."""

from __future__ import annotations

import random
from pathlib import Path

from library.data.captions import cacheable_captions
from library.data.dataset_config import read_dataset_config
from library.data.demo_pictures import CLASSES, caption_of, imagine
from library.data.training_images import collect_images
from library.errors import UserError
from library.options.run import RunOptions
from library.text_files import read_text

DEMO_CAPTIONS = 2000


def captions_of_file(path: Path) -> list[str]:
    """The lines of a text file that are not blank, each once, in order. Raises UserError."""
    if not path.is_file():
        raise UserError(f"captions {path} does not exist, or is no file.")
    lines = list(dict.fromkeys(line for text in read_text(path).splitlines() if (line := text.strip())))
    if not lines:
        raise UserError(f"captions {path} has no caption in it: one a line is wanted.")
    return lines


def captions_of_datasets(path: Path) -> list[str]:
    """The captions of a data set TOML's pictures, each once, in order, as they are trained: of those that vary (shuffled tags,
    wildcards), as they lie on the disk. Raises UserError where there are none."""
    given = RunOptions().dataset_defaults() | {"resolution": (512, 512)}
    found: dict[str, None] = {}
    for dataset in read_dataset_config(path, given, beside_options=True):
        for image in collect_images(dataset, missing_caption="skip").images:
            found |= dict.fromkeys(cacheable_captions(image.caption, image.subset) or [image.caption])
    captions = [caption for caption in found if caption]
    if not captions:
        raise UserError(f"The pictures of {path} have no captions.")
    return captions


def demo_captions(count: int = DEMO_CAPTIONS) -> list[str]:
    """Captions of pictures like the demo set's, each once: those that the trained tiny base knows."""
    found: dict[str, None] = {}
    for index in range(count):
        choose = random.Random(f"captions {index}")
        found[caption_of(imagine(CLASSES[index % len(CLASSES)], choose), choose)] = None
    return list(found)
