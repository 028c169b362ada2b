"""Its part of the page: every spectrum accounted for, and how scores are distributed."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d, Span
from jaxtyping import Float64, Int64

from distspec.config import METRICS, RECONSTRUCTION, Simulate, metric_scores
from distspec.detectors.neural.scores import DENSITY
from distspec.results.figures.kit import COLORS, panel
from distspec.results.scores import Fold, Scores, linear_histogram, list_length, overlap, top_lists
from distspec.stages.score.census import take_census
from distspec.stages.stage import Job, Section
from distspec.statistics.summaries import Histogram

__all__ = ["linear_figure", "score_figure", "sections"]


_TOP: Final = 0.01
"""Share of the scored spectra in the lists whose threshold and overlap are shown."""

_NAMED: Final = 100
"""Spectra set aside that are listed by name; all are counted."""

_BARS: Final = 60
"""Of the distribution of a score on a linear axis."""

_LOGARITHMIC: Final = {*RECONSTRUCTION, *(name for metric in METRICS for name in metric_scores(metric))}
"""Scores that are positive and spread over decades."""


def sections(job: Job) -> Iterator[Section]:
    """Count what is scored and what is set aside; show how each score is distributed.

    Raises:
        ShardError: a spectrum is neither scored nor set aside, or both.
    """
    scores = job.all_scores
    fold = job.fold("report")
    census = take_census(job.store, scores, _NAMED, fold)
    piece = "block" if isinstance(job.experiment.ingest.source, Simulate) else "file"
    yield Section("counts", "Counts", "score/counts.html.jinja", {"census": census, "piece": piece})
    distribution, figures = _distribution(scores, job.distributions, census.scored, fold)
    shown = {"distribution": distribution, "names": scores.names}
    yield Section("scores", "Scores", "score/section.html.jinja", shown, figures)


def _distribution(
    scores: Scores, histograms: dict[str, Histogram], scored: int, fold: Fold
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the top lists' thresholds and overlap, and the figures of the distributions."""
    size = list_length(scored, _TOP)
    tops = top_lists(scores, dict.fromkeys(histograms, size), histograms, fold)
    limits = {name: float(top.scores[-1]) if size else float("nan") for name, top in tops.items()}
    figures = {}
    for name, histogram in histograms.items():
        if name in _LOGARITHMIC:
            figures[f"score-{name}"] = score_figure(name, histogram, limits[name])
        else:
            title = f"{name} (−log p, nats)" if name == DENSITY else name
            counted = linear_histogram(scores, name, _BARS, fold)
            figures[f"score-{name}"] = linear_figure(title, *counted, limits[name])
    return {"fraction": _TOP, "size": size, "overlap": overlap(tops).tolist()}, figures


def score_figure(name: str, histogram: Histogram, threshold: float) -> Any:
    """Draw the distribution of one score on logarithmic axes, with the threshold of the top list."""
    filled = np.flatnonzero(histogram.counts)
    plot = panel(190, "", "spectra", x_axis_type="log", y_axis_type="log", title=name, tools="")
    plot.toolbar_location = None
    if not filled.size:
        return plot
    first, last = int(filled[0]), int(filled[-1]) + 1
    # Whole bins are joined, so that a wide distribution does not become a comb.
    width = max(1, (last - first) // 48)
    starts = np.arange(first, last, width)
    counts = np.add.reduceat(histogram.counts[: starts[-1] + width], starts)
    edges = Histogram.edges()
    left, right = edges[starts], edges[np.minimum(starts + width, Histogram.BINS)]
    _bars(plot, left, right, counts, threshold, "0.000a")
    plot.x_range = Range1d(left[0] / 1.1, right[-1] * 1.1)
    plot.xaxis[0].ticker = _decimal_ticks(left[0], right[-1])
    plot.xaxis[0].formatter = NumeralTickFormatter(format="0.[0000]a")
    plot.yaxis[0].formatter = NumeralTickFormatter(format="0,0")
    return plot


def linear_figure(
    title: str, counts: Int64[np.ndarray, "bins"], edges: Float64[np.ndarray, "bins+1"], threshold: float
) -> Any:
    """Draw the distribution of a score that may be negative or spans less than a decade: the axis is linear."""
    plot = panel(190, "", "spectra", y_axis_type="log", title=title, tools="")
    plot.toolbar_location = None
    if counts.any():
        _bars(plot, edges[:-1], edges[1:], counts, threshold, "0.0")
        margin = 0.03 * float(edges[-1] - edges[0])
        plot.x_range = Range1d(float(edges[0]) - margin, float(edges[-1]) + margin)
        plot.yaxis[0].formatter = NumeralTickFormatter(format="0,0")
    return plot


def _bars(
    plot: Any,
    left: Float64[np.ndarray, "bins"],
    right: Float64[np.ndarray, "bins"],
    counts: Int64[np.ndarray, "bins"],
    threshold: float,
    digits: str,
) -> None:
    """Draw bars with the threshold of the top list."""
    source = ColumnDataSource({"left": left, "right": right, "top": counts, "bottom": np.full(len(counts), 0.5)})
    shown = plot.quad("left", "right", "top", "bottom", source=source, color=COLORS["count"], line_color="white")
    tips = [("score", f"@left{{{digits}}} – @right{{{digits}}}"), ("spectra", "@top{0,0}")]
    plot.add_tools(HoverTool(renderers=[shown], tooltips=tips))
    plot.y_range = Range1d(0.5, float(counts.max()) * 2)
    if np.isfinite(threshold):
        plot.add_layout(
            Span(location=float(threshold), dimension="height", line_color=COLORS["threshold"], line_width=2)
        )


def _decimal_ticks(low: float, high: float) -> list[float]:
    """Choose 1-2-5 ticks, or powers of ten where these are too many."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for mantissas in ((1, 2, 5), (1,)):
        ticks = [float(f"{mantissa}e{power}") for power in powers for mantissa in mantissas]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= 7:
            break
    return inside[:: -(-len(inside) // 7)] if inside else []
