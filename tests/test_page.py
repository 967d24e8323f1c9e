"""library.report: one HTML file that opens without a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.report.curves import Chart, Curve
from library.report.page import Page, Quiet, picture_uri

UNCLOSED = {"meta", "img", "br", "link", "wbr"}


class Outline(HTMLParser):
    """Tags that were opened, texts outside scripts, and whether every tag was closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags if tag != "wbr"]


def full_page() -> Page:
    page = Page("Title", "lead")
    page.heading("One")
    page.paragraph("words")
    page.table(["a", "b"], [["x", 1.23456], ["y", None]], caption="numbers")
    page.figure(go.Figure(go.Scatter(x=[1, 2], y=[3, 4]), layout={"width": 2000}), caption="curve")
    page.figure(go.Figure(go.Heatmap(z=[[1, 2], [3, 4]])), least_width=600)
    page.figures([go.Figure(go.Bar(x=[1], y=[2]), layout={"title": name}) for name in "xy"], caption="small ones")
    page.charts(
        [Chart("Loss", [Curve("a", [(1, 2), (2, 3)], [(1, 3), (2, 4)])], "step", {"base": 2.5}, marked=1.5)], columns=2
    )
    page.strip("strip", [(Image.new("RGB", (8, 8), colour), colour) for colour in ("red", "blue")])
    page.verdict("use it")
    page.pictures([(Image.new("RGB", (8, 8), "red"), "a red square")], columns=3)
    page.pictures([(Image.new("RGB", (200, 8), "red"), "a flat one")], quality=70, even=True)
    page.bars([("512 x 512", 30, "30 pictures"), ("<b>", 15, "15")], caption="buckets")
    page.code("seed = 1", caption="configuration")
    page.notice("left out")
    return page


def test_a_page_is_well_formed_and_fetches_nothing(tmp_path):
    full_page().write(tmp_path / "new" / "report.html")
    outline = Outline((tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
    assert outline.open == []
    for tag, attributes in outline.tags:
        assert tag != "link"
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    policies = [a["content"] for tag, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in policies[0]
    assert "http" not in policies[0]


def test_plotly_js_goes_in_once_and_only_with_a_figure():
    with_figures = full_page().html()
    assert with_figures.count("plotly.js v") == 1
    assert len(Page("Words").html()) < 10_000


def test_a_figure_is_as_wide_as_the_page_and_the_given_one_is_left_as_it_was():
    figure = go.Figure(go.Scatter(x=[1], y=[2]), layout={"width": 2000, "title": "Loss<br>of <a> & b < c"})
    page = Page("Title")
    page.figure(figure)
    assert '<p class="title">Loss of &amp; b &lt; c</p>' in page.html()
    assert figure.layout.width == 2000
    assert '"width":2000' not in page.html()
    assert '"responsive": true' in page.html()


@given(st.text(max_size=60))
def test_no_text_becomes_markup(text):
    plain = Outline(marked("words").html())
    hostile = Outline(marked(text).html())
    assert hostile.names() == plain.names()
    assert hostile.open == []


def marked(text: str) -> Page:
    page = Page(text, "lead" + text)
    page.heading(text)
    page.paragraph(text)
    page.notice(text)
    page.code(text)
    page.code(text, caption="c" + text)
    page.verdict(text)
    page.table(["c" + text], [[text], [Quiet(text)]], caption="c" + text)
    page.charts(
        [
            Chart(
                "c" + text,
                [Curve("c" + text, [(1, 1)]), Curve("d", [])],
                "c" + text,
                {"c" + text: 1},
                ticks={1: "c" + text},
            )
        ]
    )
    page.pictures([(Image.new("RGB", (2, 2)), "c" + text)])
    page.bars([("c" + text, 1.0, "c" + text)], caption="c" + text)
    page.strip("c" + text, [(Image.new("RGB", (2, 2)), "c" + text)])
    return page


def test_markup_in_texts_is_shown_as_text():
    text = "</code></table><script>alert('1')</script>\"&amp;"
    outline = Outline(marked(text).html())
    assert outline.names().count("script") == 1, "the page's own, of the strip"
    assert outline.text.count("<script>alert('1')") >= 15
    assert [a["alt"] for tag, a in outline.tags if tag == "img"] == ["c" + text] * 2


def test_a_closing_script_tag_in_a_figure_does_not_end_its_script():
    page = Page("Title")
    page.figure(go.Figure(go.Scatter(x=["</script><b>"], y=[1])))
    assert "b" not in Outline(page.html()).names()


def test_numbers_are_set_to_the_right_and_nothing_is_a_dash():
    page = Page("Title")
    page.table(["name", "value", "spread"], [["a", 0.123456, "0.1 ± 0.02"], ["b 1", None, "–"], ["c", True, "–"]][:2])
    html = page.html()
    assert '<td class="number">0.1235</td>' in html
    assert '<td class="number">–</td>' in html
    assert '<td class="number">0.1 ± 0.02</td>' in html
    assert "<td>b 1</td>" in html


def test_a_row_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        Page("Title").table(["a", "b"], [["x"]])


def test_headings_break_at_underscores_alone_and_empty_ones_are_no_line():
    page = Page("Title")
    page.table(["learning_rate", "<b>_x"], [["1e-4", "a_b"]])
    page.table(["", ""], [["a", "b"]])
    html = page.html()
    assert "learning_<wbr>rate</th>" in html and "&lt;b&gt;_<wbr>x</th>" in html and "<td>a_b</td>" in html
    assert html.count("<thead>") == 1


def test_small_figures_stand_side_by_side_with_ids_and_titles_of_their_own():
    html = full_page().html()
    assert [html.count(f'id="figure-{number}"') for number in range(1, 6)] == [1, 1, 1, 1, 0]
    assert '<p class="title">x</p>' in html and '<p class="title">y</p>' in html and 'class="plots"' in html
    assert '<div style="min-width:600px">' in html


def test_chapters_are_listed_when_there_are_many():
    page = Page("Title")
    for name in ("one", "two", "three"):
        page.heading(name)
    assert "<nav" not in page.html()
    page.heading("four & five")
    html = page.html()
    links = re.findall(r'<a href="#(part-\d)">', html)
    assert links == ["part-1", "part-2", "part-3", "part-4"]
    assert all(f'id="{link}"' in html for link in links)


def test_large_pictures_are_embedded_smaller_and_small_ones_as_they_are():
    import base64
    import io

    def opened(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    small = Image.effect_noise((64, 48), 60).convert("RGB")
    assert opened(picture_uri(small)).convert("RGB").tobytes() == small.tobytes()
    large = Image.effect_noise((900, 300), 60).convert("RGB")
    assert opened(picture_uri(large)).size == (512, 171)
    assert large.size == (900, 300)


def test_the_same_parts_make_the_same_bytes():
    assert full_page().html() == full_page().html()


def drawn(chart: Chart) -> str:
    page = Page("Title")
    page.charts([chart])
    return page.html()


def test_curves_leave_out_what_is_no_number_and_a_chart_without_any_says_so():
    html = drawn(
        Chart(
            "x",
            [
                Curve(
                    "a",
                    [(0, 1.0), (1, float("nan")), (2, 3.0), (3, float("inf"))],
                    [(0, 2), (0, 0), (2, float("nan")), (0, 0)],
                )
            ],
        )
    )
    assert (
        html.count("<circle") == 2 and "nan" not in html.split("</style>")[1] and "inf" not in html.split("</style>")[1]
    )
    assert "no values yet" in drawn(Chart("x", [])) and "no values yet" in drawn(
        Chart("x", [Curve("a", [(1, -1.0)])], log=True)
    )


@pytest.mark.parametrize("values", [[0.0], [1e-9], [5.0, 5.0], [-3e7, 2e7], [1e-5, 2e-5], [0.1, 0.3], [1e300, -1e300]])
@pytest.mark.parametrize("log", [False, True])
def test_every_range_of_values_has_a_few_ticks_within_the_drawing(values: list[float], log: bool):
    html = drawn(Chart("x", [Curve("a", [(float(x), abs(y) if log else y) for x, y in enumerate(values)])], log=log))
    if log and not any(values):
        assert "no values yet" in html
        return
    ticks = re.findall(r'class="grid" d="M[\d.]+ ([\d.]+)H', html)
    assert 1 <= len(ticks) <= 6 and all(-1 <= float(y) <= 151 for y in ticks)


def test_what_is_noise_is_grey():
    page = Page("Title")
    page.table(["", "a"], [["x", "0.3 ± 0.1"], ["y", Quiet("2.113 ± 5.738")]])
    html = page.html()
    assert '<td class="number quiet">2.113 ± 5.738</td>' in html and '<td class="number">0.3 ± 0.1</td>' in html


def test_pictures_become_smaller_until_the_page_is_small_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("library.report.page.MOST_BYTES", 150_000)
    page = Page("Title")
    page.pictures([(Image.effect_noise((300, 200), 60).convert("RGB"), str(number)) for number in range(8)])
    page.pictures([(Image.effect_noise((200, 200), 60).convert("RGB"), "small and kept exactly otherwise")])
    html = page.html()
    assert len(html) <= 150_000 and html.count("<img") == 9 and "image/png" not in html
    few = Page("Title")
    few.pictures([(Image.new("RGB", (8, 8)), "x")])
    assert "image/png" in few.html()


def test_a_page_that_is_still_written_says_when_and_loads_itself_again():
    html = Page("Title", reload=20).html()
    assert 'data-reload="20"' in html and "location.reload()" in html
    assert "data-reload=" not in full_page().html()


def test_bars_are_as_long_as_their_numbers_and_their_names_are_text() -> None:
    page = Page("t")
    page.bars([("<b>bold</b>", 4, "four"), ("half", 2, "two"), ("none", 0, "none")])
    outline = Outline(page.html())
    widths = [dict(attributes)["style"] for tag, attributes in outline.tags if tag == "span"]
    assert widths == ["width:100.0%", "width:50.0%", "width:0.0%"]
    assert "b" not in outline.names() and "<b>bold</b>" in outline.text


def test_many_pictures_are_small_where_a_quality_is_given() -> None:
    noise = Image.effect_noise((160, 120), 60).convert("RGB")
    small, exact = picture_uri(noise, quality=70), picture_uri(noise)
    assert small.startswith("data:image/webp") and exact.startswith("data:image/png") and len(small) < len(exact) / 3
