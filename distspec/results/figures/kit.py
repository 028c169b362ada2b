"""What all figures of the page are made with: panels in one style, marks of spectral lines, colors; and how figures get
into a page, with Bokeh's own code, so that no network is needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.layouts import gridplot
from bokeh.plotting import figure
from bokeh.resources import Resources

from distspec.spectra.lines.wavelengths import ABSORPTION, EMISSION

__all__ = ["COLORS", "LineMark", "bokeh_script", "embed", "line_marks", "panel", "stacked"]

COLORS: Final[dict[str, str]] = {
    "flux": "#55606e",
    "reconstruction": "#d9730d",
    "raises": "#c8323c",
    "lowers": "#2f6fb5",
    "truth": "#12803c",
    "emission": "#7a4fb3",
    "absorption": "#8a6d3b",
    "threshold": "#c8323c",
    "count": "#7d93ad",
    "grows": "#0f8b8d",
    "fades": "#b5478a",
    "end": "#14466b",
}
"""Colors by meaning; the page's key uses them too."""

_GRID_COLOR = "#e7eaee"

TEXT_COLOR = "#4a5460"

_LABEL_SPACING = 0.016
"""Smallest distance of two line labels, as a share of the axis; nearer lines share a label."""

_SHORT = {" alpha": "α", " beta": "β", " gamma": "γ", " delta": "δ"}


@dataclass(frozen=True)
class LineMark:
    """Lines that share a label, and where the label stands."""

    label: str
    place: float
    waves: tuple[float, ...]
    emission: bool


def line_marks(low: float, high: float, redshift: float | None = None) -> list[LineMark]:
    """Choose the lines between two wavelengths; lines too close for two labels share one.

    Arguments:
        low: start of the axis, Å.
        high: its end, Å.
        redshift: of the lines on this axis; None for the rest frame. NaN gives no lines.

    Example:
        >>> [mark.label for mark in line_marks(6000.0, 8000.0)]
        ['[O I]', '[N II] Hα', '[S II]', '[Ar III]']
    """
    stretch = 1.0 if redshift is None else 1.0 + redshift
    absorbed = {name: wave for name, wave in ABSORPTION.items() if name not in EMISSION}
    known = [(wave * stretch, _short(name), True) for name, wave in EMISSION.items()]
    known += [(wave * stretch, _short(name), False) for name, wave in absorbed.items()]
    groups: list[list[tuple[float, str, bool]]] = []
    for line in sorted(line for line in known if low < line[0] < high):
        if groups and line[0] - groups[-1][-1][0] < _LABEL_SPACING * (high - low):
            groups[-1].append(line)
        else:
            groups.append([line])
    return [
        LineMark(
            " ".join(dict.fromkeys(name for _, name, _ in group)),
            float(np.mean([wave for wave, _, _ in group])),
            tuple(wave for wave, _, _ in group),
            any(emission for _, _, emission in group),
        )
        for group in groups
    ]


def _short(name: str) -> str:
    """Shorten a line's name to what astronomers say: Hα, [O III], Mg b."""
    for word, sign in _SHORT.items():
        name = name.replace(word, sign)
    return re.sub(r"(?<=[bD])\d$| \d+$", "", name)


def panel(height: int, x_label: str, y_label: str, **options: Any) -> Any:
    """Make an empty figure in the report's style."""
    options = {"tools": "xpan,box_zoom,reset,save", "active_drag": None, "toolbar_location": None} | options
    plot = figure(height=height, sizing_mode="stretch_width", min_width=220, output_backend="canvas", **options)
    plot.xaxis.axis_label, plot.yaxis.axis_label = x_label or None, y_label
    plot.background_fill_color = plot.border_fill_color = "#ffffff"
    plot.outline_line_color = None
    plot.grid.grid_line_color = _GRID_COLOR
    plot.min_border_left = 62
    plot.min_border_right = 12
    for axis in plot.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_color = axis.major_label_text_color = TEXT_COLOR
        axis.axis_line_color = axis.major_tick_line_color = "#aab2bc"
        axis.minor_tick_line_color = None
    if plot.title is not None:
        plot.title.text_font_size = "13px"
        plot.title.text_color = "#222b36"
    return plot


def stacked(rows: list[list[Any]]) -> Any:
    """Join panels under one toolbar."""
    options = {"logo": None, "autohide": False}
    return gridplot(rows, sizing_mode="stretch_width", toolbar_location="above", toolbar_options=options)


def embed(figures: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Turn figures into one script and a placeholder each."""
    if not figures:
        return "", {}
    # All in one document at once: Bokeh would go through all of them again for each that it adds.
    document = Document()
    with document.models.freeze():
        for each in figures.values():
            document.add_root(each)
    script, places = components(dict(figures), wrap_script=True)
    return str(script), dict(places)


def bokeh_script() -> str:
    """Give Bokeh's own code as a script to stand in the page, so that no network is needed."""
    return str(Resources(mode="inline", components=["bokeh"]).render_js())
