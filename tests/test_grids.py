"""Sheets of pictures: every picture in its place, texts that fit, and sheets that stay openable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.inference import grids
from library.inference.grids import LONGEST_SIDE, MOST_PIXELS, grid

COLOURS = [(200, 30, 40), (30, 160, 60), (40, 60, 210), (220, 180, 20), (150, 40, 190), (20, 170, 180)]


def _pictures(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[number % len(COLOURS)]) for number in range(count)]


def _refuse(note: str) -> None:
    raise AssertionError(note)


def _box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a colour, whose pixels have to fill that box."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(-1))
    left, top, right, bottom = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    assert len(rows) == (right - left) * (bottom - top)
    return left, top, right, bottom


def test_a_plain_sheet_is_nothing_but_pictures() -> None:
    sheet = grid(_pictures(4), say=_refuse)
    assert sheet.size == (128, 96)
    assert [_box(sheet, colour)[:2] for colour in COLOURS[:4]] == [(0, 0), (64, 0), (0, 48), (64, 48)]
    assert grid(_pictures(5)).size == (192, 96), "as square as it gets"
    assert grid(_pictures(3), 3, margin=10).size == (3 * 64 + 4 * 10, 48 + 2 * 10)


def test_every_picture_is_whole_and_in_its_row_and_column() -> None:
    sheet = grid(
        _pictures(6),
        column_headings=["a", "b", "c"],
        row_headings=["x", "y"],
        labels=list("uvwxyz"),
        title="t",
        say=_refuse,
    )
    boxes = [_box(sheet, colour) for colour in COLOURS]
    assert all((right - left, bottom - top) == (64, 48) for left, top, right, bottom in boxes)
    assert len({box[1] for box in boxes[:3]}) == len({box[1] for box in boxes[3:]}) == 1
    assert [box[0] for box in boxes[:3]] == [box[0] for box in boxes[3:]] == sorted({box[0] for box in boxes})


def _inked(sheet: Image.Image, left: int, top: int, right: int, bottom: int) -> bool:
    return bool((np.asarray(sheet.convert("L"))[top:bottom, left:right] < 128).any())


def test_texts_stand_where_they_belong_and_reach_into_no_picture() -> None:
    pictures = _pictures(4, (96, 96))
    plain = grid(pictures, 2, margin=8)
    for what, sheet in {
        "title": grid(pictures, 2, title="A title"),
        "column": grid(pictures, column_headings=["Euler", "DPM++ 2M"]),
        "row": grid(pictures, 2, row_headings=["CFG: 3", "CFG: 7"]),
        "label": grid(pictures, 2, ["one", "two", "three", "four"]),
    }.items():
        boxes = [_box(sheet, colour) for colour in COLOURS[:4]]  # whole, so no letter is on them
        first_left, first_top, _, first_bottom = boxes[0]
        above = _inked(sheet, 0, 0, sheet.width, first_top)
        beside = _inked(sheet, 0, first_top, first_left, first_bottom)
        below = _inked(sheet, first_left, first_bottom, sheet.width, boxes[2][1])
        assert (above, beside, below) == (what in ("title", "column"), what == "row", what == "label"), what
        assert sheet.width >= plain.width and sheet.height >= plain.height
        edges = [(0, 0, sheet.width, 2), (0, 0, 2, sheet.height), (sheet.width - 2, 0, sheet.width, sheet.height)]
        assert not any(_inked(sheet, *edge) for edge in edges), "nothing is cut off"


def test_long_texts_are_wrapped_and_the_longest_end_in_an_ellipsis() -> None:
    font = grids._font(None, 16)
    path = "outputs/character_sd15/mio-step-000012-with-a-very-long-name.safetensors"
    for text in ("a photo of a cat on a red sofa in the evening, sharp", path, "W" * 200, "a\nb\nc\nd\ne\nf"):
        wrapped = grids._wrapped(text, None, 16, 120, 4)
        assert all(grids._width(line, font) <= 120 for line in wrapped.lines) and 1 < len(wrapped.lines) <= 4
        said = "".join(wrapped.lines).removesuffix("…")
        assert "".join(text.split()).startswith("".join(said.split())), "nothing but the end is lost"
        assert wrapped.lines[-1].endswith("…") == (len("".join(said.split())) < len("".join(text.split())))
    assert grids._wrapped(path, None, 16, 200, 9).lines[0] == "outputs/character_sd15/", "paths break behind a mark"
    assert grids._wrapped("", None, 16, 120, 4).lines == ()


def test_headings_of_tiny_pictures_have_room() -> None:
    sheet = grid(_pictures(2, (16, 16)), column_headings=["DPM++ 2M SDE", "Euler"], say=_refuse)
    assert sheet.width >= 2 * 7 * 13, "columns are spread for their text"
    (left, _, right, _), (other, _, _, _) = _box(sheet, COLOURS[0]), _box(sheet, COLOURS[1])
    assert right - left == 16 and other - left >= 7 * 13


def test_pictures_of_several_sizes_are_centred() -> None:
    sheet = grid([Image.new("RGB", (80, 40), COLOURS[0]), Image.new("RGB", (20, 60), COLOURS[1])], 2)
    assert sheet.size == (160, 60)
    assert _box(sheet, COLOURS[0]) == (0, 10, 80, 50) and _box(sheet, COLOURS[1]) == (110, 0, 130, 60)


def test_a_missing_picture_leaves_its_place() -> None:
    sheet = grid([None, *_pictures(2), None])
    assert _box(sheet, COLOURS[0]) == (64, 0, 128, 48) and _box(sheet, COLOURS[1]) == (0, 48, 64, 96)
    assert sheet.getpixel((4, 20)) == (240, 240, 242)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_pictures_of_any_mode_are_taken(mode: str) -> None:
    assert grid([Image.new("RGB", (8, 8)).convert("L").convert(mode), *_pictures(1, (8, 8))]).mode == "RGB"


def test_what_is_transparent_shows_the_paper() -> None:
    sheet = grid([Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("RGBA", (8, 8), (255, 0, 0, 255))], 2)
    assert sheet.getpixel((4, 4)) == (255, 255, 255) and sheet.getpixel((12, 4)) == (255, 0, 0)


def test_a_giant_sheet_is_scaled_down_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "MOST_PIXELS", 300_000)
    said: list[str] = []
    sheet = grid(_pictures(16, (400, 200)), labels=[str(number) for number in range(16)], say=said.append)
    assert 200_000 < sheet.width * sheet.height <= 300_000 and len(said) == 1
    percent, width = int(said[0].split("%")[0].split()[-1]), int(said[0].split("(")[1].split()[0])
    assert width == round(400 * percent / 100) or abs(width - 4 * percent) <= 2
    boxes = np.asarray(sheet.crop((sheet.width // 2, 0, sheet.width, sheet.height)))
    assert (boxes == COLOURS[2]).all(-1).any(), "and the pictures are there"


def test_no_side_is_longer_than_can_be_shown() -> None:
    said: list[str] = []
    sheet = grid(_pictures(1, (20, 2)) * 1000, 1000, say=said.append)
    assert sheet.width <= LONGEST_SIDE < 20_000 and said
    with pytest.raises(UserError, match="20000 x 1 pictures are too many for one sheet"):
        grid(_pictures(1, (4, 4)) * 20_000, 20_000, say=said.append)
    assert Image.MAX_IMAGE_PIXELS is not None and MOST_PIXELS < Image.MAX_IMAGE_PIXELS, "it can be opened again"


def test_characters_that_no_font_has_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "_OTHER_FONTS", ("no such font.ttf",))
    said: list[str] = []
    grid(_pictures(2), labels=["plain", "猫 é"], say=said.append)
    assert len(said) == 1 and said[0].endswith("drawn as boxes: é猫")
    grid(_pictures(1), title='ASCII alone: (a:1.2) <lora:x:0.5> [b|c] "d" #100%\n…', say=_refuse)


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(UserError, match="A sheet needs at least one picture"):
        grid([])
    with pytest.raises(UserError, match="A sheet needs at least one picture"):
        grid([None])
    with pytest.raises(ValueError, match="2 row_headings are needed, got 1"):
        grid(_pictures(4), 2, row_headings=["a"])
    with pytest.raises(ValueError, match="4 labels are needed, got 1"):
        grid(_pictures(4), labels=["a"])


def test_a_sheet_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (grid(_pictures(4), labels=["a", "b", "c", "d"], title="t") for _ in range(2))
    assert first.tobytes() == second.tobytes()
