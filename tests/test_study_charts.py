"""The small charts of the comparison's page: every panel, one legend, labels that can be read, round ticks."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tools.alignment_study.figures import gradients
from tools.alignment_study.svg import Panel, Series, chart, ticks_between


def test_a_chart_is_an_svg_with_every_panel_and_one_legend() -> None:
    flat = Series("a < b", "#000000", [(0, 1.0), (1, 1.0)], band=[(0, 1.0, 1.0), (1, 1.0, 1.0)])
    panels = [Panel(title, [(0, "x"), (1, "y")], [flat]) for title in ("one", "two", "three")]
    root = ElementTree.fromstring(chart(panels, 2))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"one", "two", "three"} <= set(texts)
    assert texts.count("a < b") == 1


def test_a_long_legend_goes_on_in_the_next_line_and_crowded_labels_slant() -> None:
    names = [f"arm number {number}" for number in range(9)]
    ticks = [(float(place), name) for place, name in enumerate(names)]
    panel = Panel("all", ticks, [Series(name, "#000000", [(0, 1.0), (8, 2.0)]) for name in names])
    root = ElementTree.fromstring(chart([panel], 2))
    width = float(root.get("width", 0))
    texts = [one for one in root.iter() if one.tag.endswith("text")]
    legend = [one for one in texts if one.text in names and one.get("transform") is None]
    assert len(legend) == 9 and all(float(one.get("x", 0)) + 6 * len(one.text or "") < width for one in legend)
    assert len({one.get("y") for one in legend}) > 1
    assert sum(one.get("transform", "").startswith("rotate") for one in texts) == 9


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.37, 0.0021), (5.0, 5.0), (0.0, 0.0), (1e-6, 2e-6)])
def test_ticks_are_round_and_hold_all_values(low: float, high: float) -> None:
    levels = ticks_between(low, high)
    assert levels[0] <= low and high <= levels[-1]
    assert 2 <= len(levels) <= 7


def test_cosines_of_gradients_end_where_they_were_last_measured() -> None:
    drawn = gradients({"conflict": {"1": {"20": 0.1, "40": -0.2}, "2": {"20": 0.0, "40": 0.1, "60": -0.1}}})
    assert drawn.count("<polyline") == 3 and ">60<" in drawn and ">30<" in drawn
