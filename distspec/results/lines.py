"""Lines of explained spectra, read back: what each suggests, and where all stand in the diagram of line ratios."""

from collections import Counter
from dataclasses import fields
from functools import cached_property
from typing import Any, Final

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, Whisker
from jaxtyping import Bool, Float64, Int64

from distspec.results.explanations import Explanation
from distspec.results.figures.kit import COLORS, panel
from distspec.spectra.lines.diagnosis import Diagnosis, cluster_sentence, sentence
from distspec.spectra.lines.ratios import Bpt, bpt, kauffmann, kewley, schawinski
from distspec.spectra.lines.tables import Indices, LineTable, Ratios, ratios
from distspec.store import Layer, SpectraStore

__all__ = ["Diagnosed"]

_CLASS_COLORS: Final = {
    "star-forming": "#2f6fb5",
    "composite": "#8a6d3b",
    "Seyfert": "#c8323c",
    "LINER": "#7a4fb3",
    "AGN": "#d9730d",
}

_MOST: Final = 5_000
"""Points of the diagram, those of highest score."""

_SEEN: Final = 5.0
"""A line counts as seen from so many errors on."""


class Diagnosed:
    """Lines and indices of the spectra that were explained.

    Arguments:
        store: the spectra.
        layer: of `stages.explain.measure_lines`.
    """

    def __init__(self, store: SpectraStore, layer: Layer) -> None:
        self._store = store
        self.rows: Int64[np.ndarray, "n"] = layer.read("row")
        self._places = {int(row): place for place, row in enumerate(self.rows)}
        self._table = LineTable(*(layer.read(one.name).astype(np.float64) for one in fields(LineTable)))
        self._indices = Indices(*(layer.read(one.name).astype(np.float64) for one in fields(Indices)))

    @cached_property
    def _ratios(self) -> Ratios:
        return ratios(self._table)

    @cached_property
    def _classes(self) -> Bpt:
        return bpt(self._ratios)

    def one(self, row: int, explanation: Explanation, good: Bool[np.ndarray, "pixels"], z: float) -> Diagnosis | None:
        """Say what an explanation points at and what the lines suggest; None of a spectrum that was not measured."""
        place = self._places.get(row)
        if place is None:
            return None
        grid, part = self._store.grid, slice(place, place + 1)
        region = np.clip(
            np.searchsorted(explanation.edges, grid.wave, side="right") - 1, 0, len(explanation.weights) - 1
        )
        # A region's weight is that of all its pixels together, so that shares are the regions' own.
        per_pixel = explanation.weights[region].astype(np.float64) / np.bincount(region)[region]
        redshift = None if self._store.frame == "rest" else z
        tables = (self._table[part], self._indices[part], self._ratios[part])
        return sentence(per_pixel, grid, redshift, z, *tables, good)

    def cluster(
        self,
        rows: Int64[np.ndarray, "m"],
        weights: Float64[np.ndarray, "pixels"],
        z: Float64[np.ndarray, "m"],
        peaks: Float64[np.ndarray, "m"],
    ) -> Diagnosis:
        """Say what members of a cluster have in common.

        Arguments:
            rows: of the members, which were measured.
            weights: mean of their explanations.
            z: their redshifts.
            peaks: where each explanation is heaviest, Å on the store's axis.
        """
        places = np.array([self._places[int(row)] for row in rows], dtype=np.int64)
        tables = self._table[places], self._indices[places], self._ratios[places]
        return cluster_sentence(weights, self._store.grid, *tables, z, peaks, self._store.frame == "rest")

    def classes(self, rows: Int64[np.ndarray, "m"]) -> dict[str, int]:
        """Count the classes by line ratios among some rows, the most frequent first; those without one are left out."""
        places = np.array([self._places[int(row)] for row in rows], dtype=np.int64)
        counts = Counter(str(name) for name in self._classes.names[places] if name)
        return dict(counts.most_common())

    def content(self) -> dict[str, Any]:
        """Give what the fragment section.html.jinja shows."""
        table = self._table
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
            "spectra": len(self.rows),
            "lines": lines,
            "seen": _SEEN,
            "classes": self.classes(self.rows),
            "classified": int((self._classes.names != "").sum()),
            "shown": min(_MOST, int((self._classes.names != "").sum())),
            "broad": int(np.isfinite(table.broad_sigma).sum()),
            "figure": "bpt" if (self._classes.names != "").any() else None,
        }

    def figures(self) -> dict[str, Any]:
        """Draw the diagram of line ratios, if any spectrum has a place in it."""
        chosen = np.flatnonzero(self._classes.names != "")[:_MOST]
        return {"bpt": self._diagram(chosen)} if len(chosen) else {}

    def _diagram(self, chosen: Int64[np.ndarray, "m"]) -> Any:
        (x, x_error), (y, y_error) = (self._ratios.of(name) for name in ("N2", "O3"))
        plot = panel(420, "log [N II] 6585 / Hα", "log [O III] 5008 / Hβ")
        names = [str(name) for name in self._classes.names[chosen]]
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
                "sure": [float(value) for value in self._classes.probability[chosen]],
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
