"""Sheets of pictures in rows and columns, with captions, headings of rows and columns, and a title."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from library.errors import UserError

# Pillow warns of a decompression bomb when it opens a picture of more than 89.5 million pixels.
MOST_PIXELS = 89_000_000
# The longest side that browsers and GPUs can show as one picture.
LONGEST_SIDE = 16_384

_PAPER, _INK, _MISSING, _CROSS = (255, 255, 255), (24, 24, 27), (240, 240, 242), (205, 205, 210)
# Text size relative to the shorter side of a picture, and its bounds in pixels.
_TEXT_SHARE, _SMALLEST_TEXT, _LARGEST_TEXT = 1 / 16, 13, 40
_HEADING, _TITLE = 1.15, 1.3  # times the size of captions
_MOST_LINES, _MOST_TITLE_LINES = 4, 3
_LINE_HEIGHT = 1.3  # times the size of the text
# The largest width of the row headings, relative to a picture's.
_ROW_HEADING_SHARE = 0.7
# The smallest width of a column with text; narrower columns would break words.
_NARROWEST = 7  # times the size of the text
# Pillow's own font has Latin letters only. For others, the fonts of operating systems, which Pillow finds by name.
_OTHER_FONTS = (
    *(
        "DejaVuSans.ttf",
        "NotoSans-Regular.ttf",
        "LiberationSans-Regular.ttf",
        "segoeui.ttf",
        "arial.ttf",
        "Helvetica.ttc",
    ),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
    *("PingFang.ttc", "STHeiti Light.ttc", "Hiragino Sans GB.ttc", "Arial Unicode.ttf", "DroidSansFallbackFull.ttf"),
)
_BLANKS = frozenset("\n\r\t")
_NO_CHARACTER = "\U0010ffff"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Text:
    """Text in lines that fit its place."""

    lines: tuple[str, ...]
    size: int
    font: _Font

    @property
    def width(self) -> int:
        return max((_width(line, self.font) for line in self.lines), default=0)

    @property
    def height(self) -> int:
        return math.ceil(len(self.lines) * self.size * _LINE_HEIGHT)


def grid(
    images: Sequence[Image.Image | None],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    *,
    column_headings: Sequence[str] | None = None,
    row_headings: Sequence[str] | None = None,
    title: str | None = None,
    margin: int | None = None,
    say: Callable[[str], None] = lambda note: print(note, file=sys.stderr),
) -> Image.Image:
    """A sheet of pictures, row by row, RGB on white; a place without a picture (None) is crossed out.

    columns: default as many as column_headings, else as square as possible. labels: a caption under each picture. margin: pixels
    between pictures; default from their size, and 0 on a sheet without text. Pictures of different sizes are centred in places of
    the largest. Above MOST_PIXELS or LONGEST_SIDE, pictures are scaled down; `say` gets a sentence on it.

    Raises UserError without any picture, ValueError where counts do not match.
    """
    drawn = [image for image in images if image is not None]
    if not drawn:
        raise UserError("A sheet needs at least one picture.")
    columns = columns or (len(column_headings) if column_headings else math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    for name, given, count in (
        ("labels", labels, len(images)),
        ("column_headings", column_headings, columns),
        ("row_headings", row_headings, rows),
    ):
        if given is not None and len(given) != count:
            raise ValueError(f"{count} {name} are needed, got {len(given)}")
    texts = _Texts(tuple(labels or ()), tuple(column_headings or ()), tuple(row_headings or ()), title or "")
    width, height = max(image.width for image in drawn), max(image.height for image in drawn)
    layout, scale = _largest_that_fits(texts, columns, rows, (width, height), margin)
    if scale < 1:
        say(
            f"The pictures of the sheet are scaled to {scale:.0%} ({layout.cell[0]} x {layout.cell[1]}): it would be too large."
        )
    if missing := _without_glyph(_face_for(texts.everything), frozenset(texts.everything) - _BLANKS):
        say(
            f"No installed font has these characters of the sheet, which are drawn as boxes: {''.join(sorted(missing))}"
        )
    sheet = Image.new("RGB", layout.size, _PAPER)
    _paste(sheet, layout, images, scale)
    _write(sheet, layout)
    return sheet


@dataclass(frozen=True)
class _Texts:
    labels: tuple[str, ...]
    column_headings: tuple[str, ...]
    row_headings: tuple[str, ...]
    title: str

    @property
    def everything(self) -> str:
        return "".join((*self.labels, *self.column_headings, *self.row_headings, self.title))


class _Layout:
    """The positions of everything on the sheet, in pixels, for pictures of one size."""

    def __init__(self, texts: _Texts, columns: int, rows: int, cell: tuple[int, int], margin: int | None) -> None:
        self.columns, self.rows, self.cell = columns, rows, cell
        size = round(min(max(min(cell) * _TEXT_SHARE, _SMALLEST_TEXT), _LARGEST_TEXT))
        heading, large = round(size * _HEADING), round(size * _TITLE)
        face = _face_for(texts.everything)
        self.gap = margin if margin is not None else (max(4, size // 2) if texts.everything else 0)
        self.edge = self.gap if margin is not None or not texts.everything else size
        self.column = max(cell[0], _NARROWEST * size if texts.labels or texts.column_headings else 0)

        self.labels = [_wrapped(label, face, size, self.column, _MOST_LINES) for label in texts.labels]
        label_space = max((text.height for text in self.labels), default=0)
        self.row = cell[1] + (label_space + size if label_space else 0)
        widest = max(round(cell[0] * _ROW_HEADING_SHARE), _NARROWEST * heading)
        fitting = max(1, int(self.row / (heading * _LINE_HEIGHT)))
        self.row_headings = [_wrapped(text, face, heading, widest, fitting) for text in texts.row_headings]
        self.column_headings = [
            _wrapped(text, face, heading, self.column, _MOST_LINES) for text in texts.column_headings
        ]

        left = max((text.width for text in self.row_headings), default=0)
        self.left = self.edge + (left + size if left else 0)
        pictures = columns * self.column + (columns - 1) * self.gap
        width = self.left + pictures + self.edge
        self.title = _wrapped(texts.title, face, large, width - 2 * self.edge, _MOST_TITLE_LINES)
        self.headings_top = self.edge + (self.title.height + size if self.title.lines else 0)
        self.headings_space = max((text.height for text in self.column_headings), default=0)
        self.top = self.headings_top + (self.headings_space + size // 2 if self.headings_space else 0)
        self.size = (width, self.top + rows * self.row + (rows - 1) * self.gap + self.edge)

    def place(self, number: int) -> tuple[int, int]:
        """Left and top of a picture's place, which is `column` wide and as high as a picture."""
        return (
            self.left + number % self.columns * (self.column + self.gap),
            self.top + number // self.columns * (self.row + self.gap),
        )

    @property
    def fits(self) -> bool:
        return max(self.size) <= LONGEST_SIDE and self.size[0] * self.size[1] <= MOST_PIXELS


def _largest_that_fits(
    texts: _Texts, columns: int, rows: int, cell: tuple[int, int], margin: int | None
) -> tuple[_Layout, float]:
    """The layout, and the scale of its pictures. Text shrinks less than pictures, so that scales are tried in turn."""
    scale = 1.0
    while True:
        scaled = (max(1, round(cell[0] * scale)), max(1, round(cell[1] * scale)))
        layout = _Layout(texts, columns, rows, scaled, margin)
        if layout.fits:
            return layout, scale
        if max(scaled) == 1:
            raise UserError(f"{columns} x {rows} pictures are too many for one sheet. Draw fewer, or several sheets.")
        scale *= 0.95


def _paste(sheet: Image.Image, layout: _Layout, images: Sequence[Image.Image | None], scale: float) -> None:
    width, height = layout.cell
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        left, top = layout.place(number)
        left += (layout.column - width) // 2
        if image is None:
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_MISSING)
            draw.line((left, top, left + width - 1, top + height - 1), fill=_CROSS)
            draw.line((left, top + height - 1, left + width - 1, top), fill=_CROSS)
            continue
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.convert("RGBA" if image.has_transparency_data else "RGB").resize(
                size, Image.Resampling.LANCZOS
            )
        corner = (left + (width - image.width) // 2, top + (height - image.height) // 2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            sheet.paste(image, corner, image)
        else:
            sheet.paste(image.convert("RGB"), corner)


def _write(sheet: Image.Image, layout: _Layout) -> None:
    draw = ImageDraw.Draw(sheet)
    _write_centred(draw, layout.title, sheet.width // 2, layout.edge)
    for number, text in enumerate(layout.column_headings):
        left, _ = layout.place(number)
        lowest = layout.headings_top + layout.headings_space - text.height  # headings end just above the pictures
        _write_centred(draw, text, left + layout.column // 2, lowest)
    for number, text in enumerate(layout.row_headings):
        _, top = layout.place(number * layout.columns)
        middle = (layout.edge + layout.left) // 2 - text.size // 3
        _write_centred(draw, text, middle, top + (layout.cell[1] - text.height) // 2)
    for number, text in enumerate(layout.labels):
        left, top = layout.place(number)
        _write_centred(draw, text, left + layout.column // 2, top + layout.cell[1] + text.size // 3)


def _write_centred(draw: ImageDraw.ImageDraw, text: _Text, middle: int, top: int) -> None:
    for number, line in enumerate(text.lines):
        height = top + (number + 0.5) * text.size * _LINE_HEIGHT
        draw.text((middle, height), line, fill=_INK, font=text.font, anchor="mm")


def _wrapped(text: str, face: str | None, size: int, width: int, most_lines: int) -> _Text:
    """Text broken at spaces, and inside words that are wider than a line; an ellipsis replaces what exceeds the last line."""
    font = _font(face, size)
    lines: list[str] = []
    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if _width(longer, font) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *full, line = _broken(word, font, width)
            lines += full
        lines.append(line)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], _shortened(lines[most_lines - 1], font, width)]
    return _Text(tuple(lines), size, font)


def _broken(word: str, font: _Font, width: int) -> list[str]:
    """Pieces of a word that fit, broken after a punctuation mark (as in paths) where there is one."""
    pieces = []
    while _width(word, font) > width and len(word) > 1:
        count = next((n for n in range(len(word) - 1, 1, -1) if _width(word[:n], font) <= width), 1)
        mark = max(word.rfind(mark, 0, count) for mark in "/\\_-.,:;|")
        count = mark + 1 if mark >= count // 2 else count
        pieces.append(word[:count])
        word = word[count:]
    return [*pieces, word]


def _shortened(line: str, font: _Font, width: int) -> str:
    while line and _width(f"{line}…", font) > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


def _width(text: str, font: _Font) -> int:
    return math.ceil(font.getlength(text))


def _face_for(text: str) -> str | None:
    """The font with the most of a text's characters; None is Pillow's own, which is used where it has all of them."""
    characters = frozenset(text) - _BLANKS
    faces = [None, *_OTHER_FONTS] if _without_glyph(None, characters) else [None]
    return min((face for face in faces if _exists(face)), key=lambda face: len(_without_glyph(face, characters)))


@lru_cache(maxsize=64)
def _without_glyph(face: str | None, characters: frozenset[str]) -> frozenset[str]:
    font = _font(face, _SMALLEST_TEXT)
    missing = bytes(font.getmask(_NO_CHARACTER))
    return frozenset(character for character in characters if bytes(font.getmask(character)) == missing)


@lru_cache(maxsize=64)
def _exists(face: str | None) -> bool:
    try:
        _font(face, _SMALLEST_TEXT)
    except OSError:
        return False
    return True


@lru_cache(maxsize=64)
def _font(face: str | None, size: int) -> _Font:
    return ImageFont.load_default(size) if face is None else ImageFont.truetype(face, size)
