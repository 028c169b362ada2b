"""Figures of the report about all spectra: training curves and score distributions, as Bokeh models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, PrintfTickFormatter, Range1d, Span
from jaxtyping import Float64, Int64

from distspec.figures import COLORS, panel, stacked
from distspec.reduce import Histogram

__all__ = ["linear_figure", "score_figure", "training_figure"]


def training_figure(epochs: Sequence[Mapping[str, float]]) -> Any:
    """Draw the losses and the learning rate of each epoch; of a sliced flow log p and distances of each layer."""
    sliced = "train_log_prob" in epochs[0]
    measure, second = ("log_prob", "wasserstein_first") if sliced else ("loss", "learning_rate")
    source = ColumnDataSource(
        {
            "epoch": np.arange(1, len(epochs) + 1),
            "train": _numbers(epochs, f"train_{measure}"),
            "validation": _numbers(epochs, f"validation_{measure}"),
            "rate": _numbers(epochs, second),
        }
    )
    losses = np.concatenate([source.data["train"], source.data["validation"]])
    wide = 0 < 5 * np.nanmin(losses, initial=np.inf) < np.nanmax(losses, initial=1.0)
    step = "layer" if sliced else "epoch"
    label = "mean log p (nats)" if sliced else "loss"
    loss = panel(260, step, label, y_axis_type="log" if wide else "linear")
    for name, color in (("train", COLORS["count"]), ("validation", COLORS["reconstruction"])):
        line = loss.line("epoch", name, source=source, color=color, line_width=2, legend_label=name)
        loss.scatter("epoch", name, source=source, color=color, size=4)
    loss.add_tools(
        HoverTool(
            renderers=[line],
            mode="vline",
            tooltips=[(step, "@epoch"), ("train", "@train{0.0000}"), ("validation", "@validation{0.0000}")],
        )
    )
    loss.legend.location = "bottom_right" if sliced else "top_right"
    loss.legend.background_fill_alpha = 0.7
    loss.legend.border_line_alpha = 0
    loss.legend.label_text_font_size = "12px"
    tiny = np.nanmax(np.abs(losses), initial=0.0) < 0.05
    loss.yaxis[0].formatter = PrintfTickFormatter(format="%.2g") if tiny else NumeralTickFormatter(format="0.[000]")
    rate = panel(260, step, "largest distance to a Gaussian" if sliced else "learning rate", x_range=loss.x_range)
    rate.yaxis[0].formatter = PrintfTickFormatter(format="%.2g" if sliced else "%.1e")
    rate.line("epoch", "rate", source=source, color=COLORS["flux"], line_width=2)
    return stacked([[loss, rate]])


def _numbers(epochs: Sequence[Mapping[str, float]], key: str) -> Float64[np.ndarray, "n"]:
    return np.array([float(epoch.get(key, np.nan)) for epoch in epochs])


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
