"""A report as one HTML file that opens without a network: texts, tables, figures, pictures.

    page = Page("Search", lead="50 trials of character_sd15.")
    page.heading("Best trials")
    page.table(["trial", "loss"], [[12, 0.0812], [31, 0.0819]])
    page.charts([Chart("Loss", [Curve("trials", points)])])
    page.write(folder / "report.html")

Every text is escaped. Pictures become smaller until the page is below MOST_BYTES. plotly.js (4.8 MB) goes in once, and only where
there is one of its figures.
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from library.files import write_text
from library.report.curves import Chart, chart_html
from library.report.template import HEIGHT, template

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL import Image

    Cell = str | int | float | bool | None

LOSSLESS_SIDE = 256
"""Pictures up to this side, in pixels, are embedded as PNG, larger ones as WebP."""
WEBP_QUALITY = 90
MOST_BYTES = 5_900_000
"""Of a page with all that is in it, so that it can be sent as a letter and opens at once."""
LEAST_SIDE = 48
"""Pictures are not made smaller than this for MOST_BYTES, in pixels."""

# A browser that obeys it fetches nothing, whatever a figure asks for. plotly.js compiles functions where it draws by WebGL.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:"
)
NUMERIC = re.compile(r"[-+−±~≈<>×%*.,:/()\[\]\s\de∞–—]*")
MARKUP = re.compile(r"</?[a-z]+[^<>]*>", re.IGNORECASE)
"""What plotly takes for markup in a title."""
HEADINGS_FOR_CONTENTS = 4
"""A page with this many chapters starts with a list of them."""


class Quiet(str):
    """A cell that is set in grey, such as a number that says nothing."""


class Page:
    """Parts in the order in which they were added.

    reload: seconds after which a browser loads it again, for a page that is still written.
    """

    def __init__(self, title: str, lead: str = "", reload: float | None = None) -> None:
        self.title = title
        self.lead = lead
        self.reload = reload
        self._parts: list[str | _Pictures] = []
        self._chapters: list[tuple[str, str]] = []
        self._figures = 0
        self._headings = 0

    def heading(self, text: str, level: int = 2) -> None:
        """Level 2 is a chapter, 3 and 4 are within one; the title is level 1."""
        if level not in (2, 3, 4):
            raise ValueError(f"level must be 2, 3 or 4, got {level}")
        self._headings += 1
        anchor = f"part-{self._headings}"
        if level == 2:
            self._chapters.append((anchor, text))
        self._parts.append(f'<h{level} id="{anchor}">{escape(text)}</h{level}>')

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def notice(self, text: str) -> None:
        """A paragraph that stands out: what was left out, what to be careful with."""
        self._parts.append(f'<p class="notice">{escape(text)}</p>')

    def verdict(self, text: str) -> None:
        """The sentence that a person came for."""
        self._parts.append(f'<p class="verdict">{escape(text)}</p>')

    def code(self, text: str, caption: str = "") -> None:
        """Text as it is, in a fixed width. With a caption it is folded away under it."""
        block = f"<pre><code>{escape(text)}</code></pre>"
        self._parts.append(f"<details><summary>{escape(caption)}</summary>{block}</details>" if caption else block)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        """A row per entry; floats are shown with four digits, None as a dash. Columns of numbers are set to the right. Columns
        none of which is called anything have no head.

        Raises ValueError where a row has another number of cells than there are columns.
        """
        texts = [[cell_text(cell) for cell in row] for row in rows]
        for row in texts:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} cells under {len(columns)} columns: {row}")
        right = [bool(rows) and all(NUMERIC.fullmatch(row[place]) for row in texts) for place in range(len(columns))]

        def line(cells: Sequence[str], tag: str, quiet: Sequence[bool] = ()) -> str:
            parts = []
            for place, cell in enumerate(cells):
                kinds = " ".join(["number"] * right[place] + ["quiet"] * bool(quiet and quiet[place]))
                parts.append(f'<{tag} class="{kinds}">{cell}</{tag}>' if kinds else f"<{tag}>{cell}</{tag}>")
            return "".join(parts)

        # Names of options break at their underscores, or a column of one digit would be as wide as its option's name.
        names = [escape(name).replace("_", "_<wbr>") for name in columns]
        head = f"<thead><tr>{line(names, 'th')}</tr></thead>" if any(columns) else ""
        body = "".join(
            f"<tr>{line([escape(cell) for cell in row], 'td', [isinstance(cell, Quiet) for cell in given])}</tr>"
            for row, given in zip(texts, rows, strict=True)
        )
        kind = "" if head else ' class="words"'
        self._parts.append(
            f'<figure><div class="scroll" tabindex="0"><table{kind}>{head}<tbody>{body}</tbody></table></div>'
            f"{caption_html(caption)}</figure>"
        )

    def charts(self, charts: Sequence[Chart], caption: str = "", columns: int | None = None) -> None:
        """Curves under one caption, as many side by side as fit; with `columns`, so many where the page is wide."""
        layout = "" if columns is None else f' style="--columns:{columns}"'
        cells = "".join(map(chart_html, charts))
        self._parts.append(f'<figure><div class="charts"{layout}>{cells}</div>{caption_html(caption)}</figure>')

    def figure(self, figure: go.Figure, caption: str = "", least_width: int | None = None) -> None:
        """A plotly figure, as wide as the page. It is copied; its own width and template give way to the page's, and its title
        becomes text of the page, which wraps on a narrow one.

        least_width: pixels below which it scrolls instead of becoming narrower.
        """
        drawn = self._drawn(figure)
        if least_width is not None:
            drawn = f'<div class="scroll" tabindex="0"><div style="min-width:{least_width}px">{drawn}</div></div>'
        self._parts.append(f'<figure class="plot">{drawn}{caption_html(caption)}</figure>')

    def figures(self, figures: Sequence[go.Figure], caption: str = "") -> None:
        """Small plotly figures under one caption, as many side by side as fit; see `figure`."""
        cells = "".join(f'<div class="plot">{self._drawn(figure)}</div>' for figure in figures)
        self._parts.append(f'<figure><div class="plots">{cells}</div>{caption_html(caption)}</figure>')

    def _drawn(self, figure: go.Figure) -> str:
        import plotly.graph_objects as go

        shown = go.Figure(figure)
        title = " ".join(MARKUP.sub(" ", figure.layout.title.text or "").split())
        shown.update_layout(
            template=template(), title=None, width=None, autosize=True, height=figure.layout.height or HEIGHT
        )
        self._figures += 1
        drawn = shown.to_html(
            full_html=False,
            include_plotlyjs=False,
            config={"responsive": True, "displaylogo": False},
            div_id=f"figure-{self._figures}",
        )
        above = f'<p class="title">{escape(title)}</p>' if title else ""
        return f"{above}{drawn}"

    def pictures(
        self,
        pictures: Sequence[tuple[Image.Image | Embedded, str]],
        columns: int | None = None,
        max_side: int = 512,
        quality: int | None = None,
        even: bool = False,
    ) -> None:
        """Pictures with captions, as many side by side as fit; with `columns`, exactly so many, scrolling where too narrow.

        Pictures with a longer side than `max_side` pixels are embedded smaller. quality: of all of them as WebP, where there are
        many; see `picture_uri`. even: in cells of one height, whatever their shape.
        """
        least = 6.5 if columns is None else max(5.0, min(6.5, 62 / columns))  # ten columns are as wide as the page
        layout = (
            "" if columns is None else f' style="grid-template-columns:repeat({columns},minmax({least:.3g}rem,18rem))"'
        )
        kind = "pictures" if columns is None else "pictures columns"
        kind += " even" if even else ""
        head = f'<div class="scroll" tabindex="0"><div class="{kind}"{layout}>'
        self._parts.append(_Pictures(pictures, max_side, quality, head, "</div></div>"))

    def bars(self, rows: Sequence[tuple[str, float, str]], caption: str = "") -> None:
        """A histogram in words: of each row its name, a bar as long as its number, and what to say of it. Without plotly."""
        most = max((number for _, number, _ in rows), default=0) or 1
        lines = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td class="bar"><span style="width:{100 * number / most:.1f}%"></span>'
            f"</td><td>{escape(text)}</td></tr>"
            for name, number, text in rows
        )
        self._parts.append(
            f'<figure><table class="bars"><tbody>{lines}</tbody></table>{caption_html(caption)}</figure>'
        )

    def strip(self, name: str, pictures: Sequence[tuple[Image.Image | Embedded, str]], max_side: int = 256) -> None:
        """One thing as it changes: its pictures in order with captions, which tell them apart, and a slider over them.

        name: says which strip it is, where a reloaded page shows the picture that was chosen before.
        """
        head = f'<div class="strip" data-name="{escape(name)}"><div class="frames" tabindex="0">'
        self._parts.append(_Pictures(pictures, max_side, None, head, "</div></div>"))

    def html(self) -> str:
        """With pictures as large as they were asked for, or where that is too much for one page, as there is room for."""
        side, text = None, self._html(None)
        held = [part for part in self._parts if isinstance(part, _Pictures) and part.pictures]
        while len(text.encode()) > MOST_BYTES and held and side != LEAST_SIDE:
            largest = max(part.side(side) for part in held)
            of_pictures = sum(len(part.html(side)) for part in held)
            room = max(MOST_BYTES - len(text.encode()) + of_pictures, 0)
            # At first only in another form, which may do.
            side = (
                largest if side is None else max(LEAST_SIDE, int(0.95 * largest * min(room / of_pictures, 0.9) ** 0.5))
            )
            text = self._html(side)
        return text

    def _html(self, side: int | None) -> str:
        """side: that no picture is larger than; None leaves each as it was asked for."""
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        if self.reload is not None:
            now = time.time()
            lead += (
                f'<p class="live" data-reload="{self.reload:g}" data-written="{now:.0f}">Written at '
                f"{time.strftime('%H:%M:%S', time.localtime(now))}; loads itself again.</p>"
            )
        contents = ""
        if len(self._chapters) >= HEADINGS_FOR_CONTENTS:
            links = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in self._chapters)
            contents = f'<nav aria-label="Contents">{links}</nav>'
        body = "\n".join(part if isinstance(part, str) else part.html(side) for part in self._parts)
        moves = self.reload is not None or 'class="strip"' in body
        script = f"<script>{resource('page.js')}</script>" if moves else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{resource('page.css')}</style>\n"
            f"{plotly_script() if self._figures else ''}"
            f"</head>\n<body>\n<main>\n<h1>{escape(self.title)}</h1>\n{lead}{contents}\n{body}\n</main>\n"
            f"{script}</body>\n</html>\n"
        )

    def write(self, path: Path | str) -> None:
        write_text(path, self.html())


class Embedded:
    """A picture of which what goes into a page is kept, for pages that are written again and again. quality: see picture_uri."""

    def __init__(self, picture: Image.Image, max_side: int, quality: int | None = None) -> None:
        self.picture, self.quality = smaller(picture, max_side), quality
        self._uris: dict[int | None, str] = {}

    @property
    def side(self) -> int:
        return max(self.picture.size)

    def uri(self, most: int | None) -> str:
        """As it is; or, to save room, no side of it above `most` pixels, and not kept exactly."""
        if most not in self._uris:
            quality = self.quality if most is None else self.quality or WEBP_QUALITY
            self._uris[most] = picture_uri(self.picture, most or self.side, quality)
        return self._uris[most]


class _Pictures:
    """Pictures with captions between `head` and `foot`, embedded when the page is made, as large as it has room for."""

    def __init__(
        self,
        pictures: Sequence[tuple[Image.Image | Embedded, str]],
        max_side: int,
        quality: int | None,
        head: str,
        foot: str,
    ) -> None:
        self.pictures = [
            (picture if isinstance(picture, Embedded) else Embedded(picture, max_side, quality), caption)
            for picture, caption in pictures
        ]
        self.head, self.foot = head, foot

    def side(self, most: int | None) -> int:
        """Of the largest picture as it is embedded."""
        largest = max(picture.side for picture, _ in self.pictures)
        return largest if most is None else min(largest, most)

    def html(self, most: int | None) -> str:
        shown = "".join(
            f'<figure><img alt="{escape(caption)}" loading="lazy" src="{picture.uri(most)}">{caption_html(caption)}</figure>'
            for picture, caption in self.pictures
        )
        return f"{self.head}{shown}{self.foot}"


def cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def caption_html(caption: str) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>" if caption else ""


def smaller(picture: Image.Image, max_side: int) -> Image.Image:
    """A copy, no side of it above `max_side` pixels."""
    picture = picture.copy()
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side))
    return picture


def picture_uri(picture: Image.Image, max_side: int = 512, quality: int | None = None) -> str:
    """A picture as a data URI, no side of it above `max_side` pixels: small ones as PNG, others, or with `quality` all, as WebP."""
    picture, file = smaller(picture, max_side), io.BytesIO()
    if quality is None and max(picture.size) <= LOSSLESS_SIDE:
        picture.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(file, "WEBP", quality=quality or WEBP_QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def resource(name: str) -> str:
    return files("library.report").joinpath(name).read_text(encoding="utf-8")


def plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>\n"
