"""Tags by an ONNX model in the form of SmilingWolf's WD taggers: model.onnx and selected_tags.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from library.captioning.checks import MODEL, TAGS
from library.errors import UserError
from library.options.caption import CaptionModelOptions
from library.text_files import read_text

GENERAL, CHARACTER = 0, 4
"""Categories of tags as Danbooru numbers them; 9 are ratings, which are not written."""
_FACES_OF = 3
"""Tags of so few letters, and those without any letter, are faces such as >_<, whose underscore is part of them."""


@dataclass(frozen=True)
class Tag:
    name: str
    category: int


class Tagger:
    """Tags of pictures, the likeliest first. Raises UserError where its files do not belong together or cannot be read."""

    def __init__(self, options: CaptionModelOptions) -> None:
        assert options.tagger is not None
        model, tags = _files(options.tagger)
        import onnxruntime

        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(model), providers=onnxruntime.get_available_providers()
            )
        except Exception as error:  # onnxruntime's exceptions share no class
            raise UserError(
                f"{model} cannot be used: {(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error
        self.tags = read_tags(tags)
        self.options = options
        given, answered = self.session.get_inputs()[0], self.session.get_outputs()[0]
        self._input = given.name
        sides = given.shape  # [batch, H, W, 3]
        if len(sides) != 4 or sides[1] != sides[2] or not isinstance(sides[1], int) or sides[3] != 3:
            raise UserError(f"{model} takes {sides}. A WD tagger takes [batch, side, side, 3].")
        self.side = sides[1]
        if isinstance(answered.shape[-1], int) and answered.shape[-1] != len(self.tags):
            raise UserError(f"{tags} names {len(self.tags)} tags, and {model} answers with {answered.shape[-1]}.")

    def __call__(self, pictures: Sequence[Image.Image]) -> list[list[str]]:
        squares = np.stack([_square(picture, self.side) for picture in pictures])
        (answers,) = self.session.run(None, {self._input: squares})[:1]
        return [self._kept(row) for row in answers]

    def _kept(self, probabilities: npt.NDArray[np.float32]) -> list[str]:
        least = {GENERAL: self.options.threshold, CHARACTER: self.options.character_threshold}
        refused = {_plain(tag).casefold() for tag in self.options.blacklist}
        order = np.argsort(-probabilities, kind="stable")
        found = [
            self.tags[index] for index in order if probabilities[index] >= least.get(self.tags[index].category, 2.0)
        ]
        names = [_plain(tag.name) for tag in found]
        return [name for name in names if name.casefold() not in refused]


def read_tags(path: Path) -> list[Tag]:
    """Tags in the order of the model's answers. Raises UserError where the file has other columns than name and category."""
    rows = csv.DictReader(io.StringIO(read_text(path)))
    try:
        return [Tag(row["name"], int(row["category"])) for row in rows]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no list of tags: it needs the columns name and category ({error}).") from None


def _files(name: str) -> tuple[Path, Path]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / MODEL, folder / TAGS
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, MODEL)), Path(hf_hub_download(name, TAGS))
    except Exception as error:  # no network, no such repository, no such file
        raise UserError(
            f"tagger {name} could not be fetched: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error


def _plain(tag: str) -> str:
    """As captions write it: blanks for underscores, but in faces such as ^_^."""
    if len(tag) <= _FACES_OF or not any(sign.isalpha() for sign in tag):
        return tag
    return tag.replace("_", " ")


def _square(picture: Image.Image, side: int) -> npt.NDArray[np.float32]:
    """[side, side, 3] of 0 to 255 in the order blue, green, red, on white, as these taggers were trained."""
    longest = max(picture.size)
    canvas = Image.new("RGB", (longest, longest), (255, 255, 255))
    canvas.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(pixels[:, :, ::-1])
