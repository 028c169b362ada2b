"""Its part of the page: the lines of what is explained, and where they stand in the diagram of line ratios."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, Whisker
from jaxtyping import Int64

from distspec.results.figures.kit import COLORS, panel
from distspec.results.lines import LineResults
from distspec.spectra.lines.ratios import kauffmann, kewley, schawinski

__all__ = ["content", "figures"]

_CLASS_COLORS: Final = {
    "star-forming": "#2f6fb5",
    "composite": "#8a6d3b",
    "Seyfert": "#c8323c",
    "LINER": "#7a4fb3",
    "AGN": "#d9730d",
}

_MOST: Final = 5_000
"""Points of the diagram, those of highest score."""

_NAMED: Final = 10
"""Spectra without explanations that are named."""

_SEEN: Final = 5.0
"""A line counts as seen from so many errors on."""


def content(results: LineResults, given_up: Mapping[int, str]) -> dict[str, Any]:
    """Give what the fragment section.html.jinja shows.

    Arguments:
        results: the lines.
        given_up: rows that lack explanations, lines or ascents, and why.
    """
    table = results.table
    with np.errstate(invalid="ignore"):
        seen = table.flux > _SEEN * table.flux_error
    lines = []
    for place, name in enumerate(table.names):
        mine = seen[:, place]
        if mine.any():
            width = table.width[mine, place]
            known = width[np.isfinite(width)]
            lines.append(
                {
                    "name": name,
                    "measured": int(np.isfinite(table.flux[:, place]).sum()),
                    "seen": int(mine.sum()),
                    "width": float(np.median(known)) if len(known) else float("nan"),
                }
            )
    return {
        "spectra": len(results.rows),
        "given_up": len(given_up),
        "first_given_up": list(given_up.items())[:_NAMED],
        "lines": lines,
        "seen": _SEEN,
        "classes": results.classes(results.rows),
        "classified": int((results.bpt.names != "").sum()),
        "shown": min(_MOST, int((results.bpt.names != "").sum())),
        "broad": int(np.isfinite(table.broad_sigma).sum()),
        "figure": "bpt" if (results.bpt.names != "").any() else None,
    }


def figures(results: LineResults) -> dict[str, Any]:
    """Draw the diagram of line ratios, if any spectrum has a place in it."""
    chosen = np.flatnonzero(results.bpt.names != "")[:_MOST]
    return {"bpt": _diagram(results, chosen)} if len(chosen) else {}


def _diagram(results: LineResults, chosen: Int64[np.ndarray, "m"]) -> Any:
    (x, x_error), (y, y_error) = (results.ratios.of(name) for name in ("N2", "O3"))
    plot = panel(420, "log [N II] 6585 / Hα", "log [O III] 5008 / Hβ")
    names = [str(name) for name in results.bpt.names[chosen]]
    source = ColumnDataSource(
        {
            "x": x[chosen],
            "y": y[chosen],
            "low": (y - y_error)[chosen],
            "high": (y + y_error)[chosen],
            "left": (x - x_error)[chosen],
            "right": (x + x_error)[chosen],
            "kind": names,
            "color": [_CLASS_COLORS[name] for name in names],
            "sure": [float(value) for value in results.bpt.probability[chosen]],
            "place": (chosen + 1).astype(np.int32),
        }
    )
    if len(chosen) <= 300:
        # Of many, errors hide the points.
        for ends, axis in ((("x", "low", "high"), "height"), (("y", "left", "right"), "width")):
            base, lower, upper = ends
            bars = Whisker(source=source, base=base, lower=lower, upper=upper, dimension=axis, line_alpha=0.25)
            bars.upper_head = bars.lower_head = None
            plot.add_layout(bars)
    drawn = plot.scatter("x", "y", source=source, size=6, color="color", alpha=0.7, legend_group="kind")
    low, high = float(np.nanmin(x[chosen])) - 0.3, float(np.nanmax(x[chosen])) + 0.3
    along = np.linspace(min(low, -1.5), max(high, 0.6), 200)
    for curve, dash in ((kauffmann, "dashed"), (kewley, "solid"), (schawinski, "dotted")):
        values = curve(along)
        if curve is schawinski:
            values = np.where(values > np.nan_to_num(kewley(along), nan=-np.inf), values, np.nan)
        values[(values < -2.0) | (values > 2.0)] = np.nan
        plot.line(along, values, color=COLORS["flux"], line_dash=dash)
    tips = [("class", "@kind (@sure{0%})"), ("ratios", "@x{0.00}, @y{0.00}"), ("explained as number", "@place")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    plot.legend.location = "bottom_left"
    return plot
