"""A report as one HTML file that opens without a network: texts, tables, figures, pictures.

    page = Page("Search", lead="50 trials of character_sd15.")
    page.heading("Best trials")
    page.table(["trial", "loss"], [[12, 0.0812], [31, 0.0819]])
    page.figure(plotly_figure, caption="Loss over trials")
    page.write(folder / "report.html")

Every text is escaped. plotly.js (4.8 MB) goes in once, and only where there is a figure.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from library.files import write_text
from library.report.template import HEIGHT, template

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL import Image

    Cell = str | int | float | bool | None

LOSSLESS_SIDE = 256
"""Pictures up to this side, in pixels, are embedded as PNG, larger ones as WebP."""
WEBP_QUALITY = 90

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


class Page:
    """Parts in the order in which they were added."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self._parts: list[str] = []
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

        def line(cells: Sequence[str], tag: str) -> str:
            return "".join(
                f'<{tag} class="number">{cell}</{tag}>' if is_right else f"<{tag}>{cell}</{tag}>"
                for cell, is_right in zip(cells, right, strict=True)
            )

        # Names of options break at their underscores, or a column of one digit would be as wide as its option's name.
        names = [escape(name).replace("_", "_<wbr>") for name in columns]
        head = f"<thead><tr>{line(names, 'th')}</tr></thead>" if any(columns) else ""
        body = "".join(f"<tr>{line([escape(cell) for cell in row], 'td')}</tr>" for row in texts)
        self._parts.append(
            f'<figure><div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'
            f"{caption_html(caption)}</figure>"
        )

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
        pictures: Sequence[tuple[Image.Image, str]],
        columns: int | None = None,
        max_side: int = 512,
        quality: int | None = None,
        even: bool = False,
    ) -> None:
        """Pictures with captions, as many side by side as fit; with `columns`, exactly so many, scrolling where too narrow.

        Pictures with a longer side than `max_side` pixels are embedded smaller. quality: of all of them as WebP, where there are
        many; see `picture_uri`. even: in cells of one height, whatever their shape.
        """
        layout = "" if columns is None else f' style="grid-template-columns:repeat({columns},minmax(6.5rem,18rem))"'
        shown = "".join(
            f'<figure><img alt="{escape(caption)}" loading="lazy" src="{picture_uri(picture, max_side, quality)}">'
            f"{caption_html(caption)}</figure>"
            for picture, caption in pictures
        )
        kind = "pictures" if columns is None else "pictures columns"
        kind += " even" if even else ""
        self._parts.append(f'<div class="scroll" tabindex="0"><div class="{kind}"{layout}>{shown}</div></div>')

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

    def html(self) -> str:
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        contents = ""
        if len(self._chapters) >= HEADINGS_FOR_CONTENTS:
            links = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in self._chapters)
            contents = f'<nav aria-label="Contents">{links}</nav>'
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style()}</style>\n{plotly_script() if self._figures else ''}"
            f"</head>\n<body>\n<main>\n<h1>{escape(self.title)}</h1>\n{lead}{contents}\n{body}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: Path | str) -> None:
        write_text(path, self.html())


def cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def caption_html(caption: str) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>" if caption else ""


def picture_uri(picture: Image.Image, max_side: int = 512, quality: int | None = None) -> str:
    """A picture as a data URI, no side of it above `max_side` pixels: small ones as PNG, others, or with `quality` all, as WebP."""
    if max(picture.size) > max_side:
        picture = picture.copy()
        picture.thumbnail((max_side, max_side))
    file = io.BytesIO()
    if quality is None and max(picture.size) <= LOSSLESS_SIDE:
        picture.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(file, "WEBP", quality=quality or WEBP_QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def style() -> str:
    return files("library.report").joinpath("page.css").read_text(encoding="utf-8")


def plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>\n"
