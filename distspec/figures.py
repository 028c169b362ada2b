"""Figures of the report as Bokeh models: spectra with their explanation and with the way up the density.

Figures hold numbers and the names of lines and scores only; no text of a survey's files enters them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.layouts import gridplot
from bokeh.models import (
    BoxAnnotation,
    ColumnDataSource,
    FactorRange,
    HoverTool,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.resources import Resources
from jaxtyping import Float32, Float64

from distspec.lines import ABSORPTION, EMISSION
from distspec.spectra import WaveGrid

__all__ = [
    "COLORS",
    "LineMark",
    "Shown",
    "bokeh_script",
    "embed",
    "line_marks",
    "panel",
    "spectrum_figure",
    "stacked",
    "way_figure",
]

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
_TEXT_COLOR = "#4a5460"

_LABEL_SPACING = 0.016
"""Smallest distance of two line labels, as a share of the axis; nearer lines share a label."""

_HEADROOM = 0.32
"""Height kept free above the spectrum for line labels, as a share of its own height."""

_SHORT = {" alpha": "α", " beta": "β", " gamma": "γ", " delta": "δ"}


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
    drawn = bottom.line("wave", "change", source=source, color=_TEXT_COLOR, line_width=1)
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
    plot.line(np.repeat(edges, 2)[1:-1], np.repeat(weights, 2), color=_TEXT_COLOR, line_width=1)
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
        axis.axis_label_text_color = axis.major_label_text_color = _TEXT_COLOR
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
