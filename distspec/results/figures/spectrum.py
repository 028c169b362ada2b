"""Figures of single spectra as Bokeh models: one with its reconstruction, residual and the weights that explain it; and
what is decoded along the ascent of its latents.

Figures hold numbers and the names of lines and scores only; no text of a survey's files enters them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    BoxAnnotation,
    ColumnDataSource,
    FactorRange,
    HoverTool,
    Range1d,
)
from jaxtyping import Float32, Float64

from distspec.results.figures.kit import COLORS, TEXT_COLOR, LineMark, line_marks, panel, stacked
from distspec.spectra import WaveGrid

__all__ = ["Shown", "spectrum_figure", "way_figure"]

_HEADROOM = 0.32
"""Height kept free above the spectrum for line labels, as a share of its own height."""


@dataclass(frozen=True)
class Shown:
    """One spectrum as the report shows it.

    Arguments:
        grid: wavelengths, Å vacuum.
        frame: "rest" or "observed".
        flux: in the store's unit.
        ivar: its inverse variance, 0 = masked.
        reconstruction: the model's.
        redshift: that moves the lines on an observed-frame grid; None leaves them where they are, NaN marks none.
        explanations: of each, what it is called, the edges of its regions (Å), and their weights; the first tints the
            spectrum.
        windows: pairs [low, high] that truth records, Å on this grid, NaN where unused; None without truth.
        way: spectra decoded along the way to higher probability; None without one.
        multiscale: of methods with several window sizes, what each is called, its widths in pixels, and the weights
            that each width gives.
    """

    grid: WaveGrid
    frame: str
    flux: Float32[np.ndarray, "pixels"]
    ivar: Float32[np.ndarray, "pixels"]
    reconstruction: Float32[np.ndarray, "pixels"]
    redshift: float | None = None
    explanations: tuple[tuple[str, Float64[np.ndarray, "regions+1"], Float32[np.ndarray, "regions"]], ...] = ()
    windows: Float64[np.ndarray, "k 2"] | None = None
    way: Float32[np.ndarray, "points pixels"] | None = None
    multiscale: tuple[tuple[str, list[int], Float32[np.ndarray, "windows pixels"]], ...] = ()


def spectrum_figure(shown: Shown) -> Any:
    """Draw one spectrum: flux with its reconstruction, residual in units of σ, and the weights that explain it."""
    wave = shown.grid.wave
    axis = Range1d(float(wave[0]), float(wave[-1]))
    good = shown.ivar > 0
    # A masked pixel may hold anything; as NaN it is a gap, whatever it holds.
    flux = np.where(good, shown.flux, np.nan).astype(np.float32)
    deviation = np.sqrt(np.where(good, shown.ivar, np.nan), dtype=np.float32)
    with np.errstate(over="ignore"):  # what no float32 can hold leaves the axis anyway
        residual = (flux - shown.reconstruction) * deviation
    source = ColumnDataSource(
        {
            "wave": wave.astype(np.float32),
            "flux": flux,
            "model": shown.reconstruction,
            "sigma": np.reciprocal(deviation),
            "residual": residual,
        }
    )
    top = _flux_panel(shown, source, axis)
    middle = _residual_panel(shown, source, axis)
    panels = [top, middle]
    panels += [_weight_panel(name, edges, weights, axis) for name, edges, weights in shown.explanations]
    panels += [_scale_panel(name, widths, values, shown.grid, axis) for name, widths, values in shown.multiscale]
    return _column(panels, _wavelength(shown))


def way_figure(shown: Shown) -> Any:
    """Draw what the model decodes at start, middle and end of the way, and what grows and fades from start to end."""
    wave = shown.grid.wave
    axis = Range1d(float(wave[0]), float(wave[-1]))
    if shown.way is None:
        raise ValueError("a spectrum without a way")
    start, middle, end = shown.way[0], shown.way[len(shown.way) // 2], shown.way[-1]
    source = ColumnDataSource(
        {
            "wave": wave.astype(np.float32),
            "start": start,
            "middle": middle,
            "end": end,
            "change": end - start,
            "upper": np.maximum(start, end),
            "lower": np.minimum(start, end),
            "grown": np.maximum(end - start, 0),
            "faded": np.minimum(end - start, 0),
        }
    )
    finite = shown.way[np.isfinite(shown.way)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    height = (high - low) or 1.0
    marks = line_marks(axis.start, axis.end, shown.redshift)
    roof = high + height * (_HEADROOM if marks else 0.05)
    top = panel(240, "", "decoded flux", x_range=axis, y_range=Range1d(low - 0.05 * height, roof))
    top.varea("wave", "start", "upper", source=source, fill_color=COLORS["grows"], fill_alpha=0.3)
    top.varea("wave", "lower", "start", source=source, fill_color=COLORS["fades"], fill_alpha=0.3)
    _mark_lines(top, marks, roof)
    drawn = top.line("wave", "start", source=source, color=COLORS["reconstruction"], line_width=1.6)
    top.line("wave", "middle", source=source, color=COLORS["flux"], line_width=1, line_dash="dashed")
    top.line("wave", "end", source=source, color=COLORS["end"], line_width=1.6)
    tips = [("wavelength", "@wave{0.0} Å"), *((name, f"@{name}{{0.000}}") for name in ("start", "middle", "end"))]
    top.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline", line_policy="nearest"))
    bottom = panel(120, "", "end − start", x_range=axis)
    bottom.varea("wave", 0, "grown", source=source, fill_color=COLORS["grows"], fill_alpha=0.45)
    bottom.varea("wave", "faded", 0, source=source, fill_color=COLORS["fades"], fill_alpha=0.45)
    drawn = bottom.line("wave", "change", source=source, color=TEXT_COLOR, line_width=1)
    tips = [("wavelength", "@wave{0.0} Å"), ("change", "@change{0.000}")]
    bottom.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline", line_policy="nearest"))
    return _column([top, bottom], _wavelength(shown))


def _wavelength(shown: Shown) -> str:
    return f"{'Rest-frame' if shown.frame == 'rest' else 'Observed'} wavelength in vacuum (Å)"


def _column(panels: list[Any], label: str) -> Any:
    """Stack panels of one wavelength axis, labelled at the last."""
    for each in panels[:-1]:
        each.xaxis.visible = False
    panels[-1].xaxis.axis_label = label
    panels[-1].height += 45
    return stacked([[each] for each in panels])


def _flux_panel(shown: Shown, source: ColumnDataSource, axis: Range1d) -> Any:
    flux, sigma = source.data["flux"], source.data["sigma"]
    both = np.concatenate([flux[np.isfinite(flux)], shown.reconstruction[np.isfinite(shown.reconstruction)]])
    low, high = (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)
    height = (high - low) or 1.0
    marks = line_marks(axis.start, axis.end, shown.redshift)
    roof = high + height * (_HEADROOM if marks else 0.05)
    plot = panel(300, "", "flux", x_range=axis, y_range=Range1d(low - 0.05 * height, roof))
    if shown.explanations:
        _shade(plot, *shown.explanations[0][1:])
    _outline(plot, shown.windows)
    plot.patch(*_band(source.data["wave"], flux, sigma), color=COLORS["flux"], fill_alpha=0.18, line_alpha=0)
    _mark_lines(plot, marks, roof)
    drawn = plot.line("wave", "flux", source=source, color=COLORS["flux"], line_width=1)
    plot.line("wave", "model", source=source, color=COLORS["reconstruction"], line_width=1.6)
    tips = [
        ("wavelength", "@wave{0.0} Å"),
        ("flux", "@flux{0.000} ± @sigma{0.000}"),
        ("reconstruction", "@model{0.000}"),
        ("residual", "@residual{0.0} σ"),
    ]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline", line_policy="nearest"))
    return plot


def _residual_panel(shown: Shown, source: ColumnDataSource, axis: Range1d) -> Any:
    plot = panel(130, "", "residual / σ", x_range=axis)
    plot.add_layout(BoxAnnotation(bottom=-3, top=3, fill_color=COLORS["count"], fill_alpha=0.12, level="underlay"))
    _outline(plot, shown.windows)
    drawn = plot.line("wave", "residual", source=source, color=COLORS["flux"], line_width=1)
    plot.line([axis.start, axis.end], [0, 0], color=COLORS["reconstruction"], line_width=1)
    tips = [("wavelength", "@wave{0.0} Å"), ("residual", "@residual{0.0} σ")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline", line_policy="nearest"))
    return plot


def _weight_panel(
    name: str, edges: Float64[np.ndarray, "segments+1"], weights: Float32[np.ndarray, "segments"], axis: Any
) -> Any:
    plot = panel(110, "", name, x_range=axis)
    source = ColumnDataSource(
        {
            "left": edges[:-1].astype(np.float32),
            "right": edges[1:].astype(np.float32),
            "weight": weights,
            "color": _weight_colors(weights),
        }
    )
    drawn = plot.quad("left", "right", "weight", 0, source=source, color="color", fill_alpha=0.45, line_alpha=0)
    plot.line(np.repeat(edges, 2)[1:-1], np.repeat(weights, 2), color=TEXT_COLOR, line_width=1)
    tips = [("segment", "@left{0.0} – @right{0.0} Å"), ("weight", "@weight{0.00000}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline"))
    return plot


def _scale_panel(
    name: str, widths: list[int], values: Float32[np.ndarray, "windows pixels"], grid: WaveGrid, axis: Any
) -> Any:
    """Draw what each window size says, a row each; the strongest color is the largest |weight| of its own row."""
    names = [f"{width} px" for width in widths]
    plot = panel(30 + 17 * len(widths), "", name, x_range=axis, y_range=FactorRange(*names[::-1]))
    for own, weights in zip(names, values, strict=True):
        starts = np.flatnonzero(np.diff(weights, prepend=np.nan) != 0)
        edges = grid.edges[np.append(starts, grid.pixels)].astype(np.float32)
        shown, largest = weights[starts], float(np.abs(weights).max()) or 1.0
        source = ColumnDataSource(
            {
                "left": edges[:-1],
                "right": edges[1:],
                "window": [own] * len(starts),
                "weight": shown,
                "color": _weight_colors(shown),
                "alpha": (np.abs(shown) / largest).astype(np.float32),
            }
        )
        drawn = plot.hbar(
            "window", 0.86, "right", "left", source=source, color="color", fill_alpha="alpha", line_alpha=0
        )
        tips = [("window", "@window"), ("place", "@left{0.0} – @right{0.0} Å"), ("weight", "@weight{0.00000}")]
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    return plot


def _weight_colors(weights: Float32[np.ndarray, "segments"]) -> list[str]:
    return [COLORS["raises"] if weight > 0 else COLORS["lowers"] for weight in weights]


def _shade(plot: Any, edges: Float64[np.ndarray, "segments+1"], weights: Float32[np.ndarray, "segments"]) -> None:
    """Tint the background: red where a segment raises the score, blue where it lowers it."""
    largest = float(np.abs(weights).max()) or 1.0
    plot.vstrip(
        x0=edges[:-1],
        x1=edges[1:],
        fill_color=_weight_colors(weights),
        fill_alpha=0.45 * np.abs(weights) / largest,
        line_alpha=0,
        level="underlay",
    )


def _outline(plot: Any, windows: Float64[np.ndarray, "k 2"] | None) -> None:
    """Frame the windows in which the planted anomaly lies."""
    known = np.zeros((0, 2)) if windows is None else windows[np.isfinite(windows).all(axis=1)]
    if len(known):
        plot.vstrip(
            x0=known[:, 0], x1=known[:, 1], fill_alpha=0, line_color=COLORS["truth"], line_dash="dashed", line_width=1.5
        )


def _mark_lines(plot: Any, marks: list[LineMark], roof: float) -> None:
    for emission, dash in ((True, "solid"), (False, "dotted")):
        chosen = [mark for mark in marks if mark.emission == emission]
        if not chosen:
            continue
        color = COLORS["emission"] if emission else COLORS["absorption"]
        waves = [wave for mark in chosen for wave in mark.waves]
        plot.vspan(x=waves, line_color=color, line_alpha=0.35, line_dash=dash)
        plot.text(
            x=[mark.place for mark in chosen],
            y=[roof] * len(chosen),
            text=[mark.label for mark in chosen],
            angle=np.pi / 2,
            text_align="right",
            text_baseline="middle",
            text_font_size="10px",
            text_color=color,
            x_offset=0,
            y_offset=5,
            background_fill_color="white",
            background_fill_alpha=0.8,
        )


def _band(
    wave: Float32[np.ndarray, "pixels"], flux: Float32[np.ndarray, "pixels"], sigma: Float32[np.ndarray, "pixels"]
) -> tuple[Float32[np.ndarray, "m"], Float32[np.ndarray, "m"]]:
    """Outline flux ± σ as polygons, one for each run of good pixels, parted by NaN as Bokeh's patches are."""
    good = np.isfinite(flux) & np.isfinite(sigma)
    turns = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(np.int8)))
    gap = np.full(1, np.nan, np.float32)
    x, y = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for start, stop in turns.reshape(-1, 2):
        run = slice(start, stop)
        x += [wave[run], wave[run][::-1], gap]
        y += [flux[run] + sigma[run], (flux[run] - sigma[run])[::-1], gap]
    return np.concatenate(x), np.concatenate(y)
