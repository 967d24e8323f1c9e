"""Pictures of something that the tiny base has never seen, to teach it: a purple cross, called by a name of its own.

python -m library.data.new_concept --out data/zorb
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

from library.data.demo_pictures import CLASSES, Picture, draw, imagine
from library.errors import UserError, script
from library.files import whole_folder

NAME = "zorb"
GENERATOR = "library.data.new_concept"
PARTS = {"train": 12, "held_out": 12}


def make_concept_pictures(folder: Path, *, size: int = 128, overwrite: bool = False) -> None:
    """Draw `train/` (12 pictures, a caption beside each) and `held_out/` (12 others) into a folder, whole or not at all.

    Every picture has another size, place and background of those that the base knows. Raises UserError where `folder`
    exists, unless `overwrite`.
    """
    with whole_folder(folder, overwrite=overwrite) as temporary:
        for part, count in PARTS.items():
            (temporary / part).mkdir(parents=True)
            for index in range(count):
                picture = imagine_concept(f"{part} {index}")
                stem = temporary / part / f"{NAME}_{index:02d}"
                draw(picture, size).save(stem.with_suffix(".png"))
                stem.with_suffix(".txt").write_text(caption(picture) + "\n", encoding="utf-8")


def imagine_concept(seed: str) -> Picture:
    choose = random.Random(f"{GENERATOR} {seed}")
    return replace(imagine(choose.choice(CLASSES), choose), shape="cross", colour="purple")


def caption(picture: Picture) -> str:
    """The demo set's wording, with the name for what is new."""
    return picture.caption.replace(f"{picture.colour} {picture.shape}", NAME)


@script
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {GENERATOR}", description="Draw a concept that is new to the base."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make, such as data/zorb")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out} exists already. Move it away or name another folder.")
    make_concept_pictures(options.out)
    print(
        f"{PARTS['train']} pictures of a {NAME} in {options.out / 'train'}, {PARTS['held_out']} in {options.out / 'held_out'}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
