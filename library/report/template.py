"""How every figure of a report looks: one plotly template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"

# Okabe and Ito's colours, told apart with any colour vision. Their yellow is left out, which white swallows, and their
# black, which a dark page does.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#808890")
HEIGHT = 380
"""Of a figure that names none, in pixels."""


def template() -> go.layout.Template:
    """Transparent, so that the page's own light or dark shows; texts and grid lines take their colours from its CSS."""
    import plotly.graph_objects as go

    axis = {
        "gridcolor": "rgba(128, 136, 144, 0.25)",
        "zerolinecolor": "rgba(128, 136, 144, 0.5)",
        "linecolor": "rgba(128, 136, 144, 0.5)",
        "automargin": True,
        "exponentformat": "power",
        "minexponent": 5,
        "title": {"standoff": 8},
    }
    sequential = [{"colorscale": "Cividis"}]
    return go.layout.Template(
        data={"heatmap": sequential, "contour": sequential, "surface": sequential},
        layout={
            "font": {"family": FONT, "size": 13, "color": "#60666d"},
            "colorway": COLOURS,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"font": {"family": FONT}},
            "xaxis": axis,
            "yaxis": axis,
        },
    )
