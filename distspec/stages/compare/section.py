"""What the report tells of a comparison of scores: tables in words, and figures, from comparison.json alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
    Span,
)
from jaxtyping import Float64

from distspec.results.figures.kit import COLORS, panel
from distspec.stages.compare.errors import MEASURES
from distspec.statistics.overlap import overlap_moments
from distspec.statistics.summaries import TABLE_ROWS

__all__ = ["Cell", "Content", "content", "figures"]

_SIGNIFICANT: Final = 0.01
"""Corrected p below which a list leans towards something."""

_PANELS: Final = 6
"""Properties whose histograms are drawn, those of smallest p."""

_DRAWN: Final = 6
"""Lists drawn in color in a histogram, those of smallest p; others are grey."""

_TOLD: Final = 30
"""Groups that are told of on the page."""

_PALETTE: Final = ("#1f5f8b", "#c8323c", "#12803c", "#d9730d", "#7a4fb3", "#0f8b8d")

_NAMES: Final = {"mse": "MSE", "rmse": "RMSE", "difference": "mean difference"}


@dataclass(frozen=True)
class Cell:
    """How a list lies in a property.

    Arguments:
        mean: share of the survey below a member, on average; None where it was not tested.
        corrected: p by Kolmogorov and Smirnov, corrected for all tests.
        significant: whether the list leans towards something.
        low, high: strength of the shade for small and for large values, 0 to 1.
    """

    mean: float | None = None
    corrected: float | None = None
    significant: bool = False
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Content:
    """What the fragment of the report shows, beside figures.

    Arguments:
        facts: of comparison.json.
        names: of the scores.
        n: most likely number of anomalies, in words, from all pairs; None where no pair shares a spectrum.
        within: its intervals: from overlaps, and from how far it depends on the choice of scores; None where unknown.
        implied: n that the mean overlap alone gives, where it is less than the distinct spectra listed: the scores then
            do not draw from one pool; None where it is not.
        random: whether n may be all scored spectra: nothing shows that the lists hold the same anomalies.
        extremes: pairs that share most and least.
        properties: that lists were tested for.
        leaning: a cell for each property, by score.
        tests, leans: tests made, and significant ones.
        groups: first groups that share an exposure or a part of the instrument.
        more: further ones.
        panels: names of the figures of properties, of errors.
    """

    facts: Mapping[str, Any]
    names: Sequence[str]
    n: str | None
    within: tuple[str, str | None]
    implied: str | None
    random: bool
    extremes: tuple[Mapping[str, Any], Mapping[str, Any]]
    properties: Sequence[str]
    leaning: Mapping[str, Sequence[Cell]]
    tests: int
    leans: int
    groups: Sequence[Mapping[str, Any]]
    more: int
    panels: Mapping[str, Sequence[str]]
    rows: Sequence[str] = TABLE_ROWS
    measures: Sequence[str] = MEASURES


def about(n: int | None) -> str:
    """Write a number with three significant digits and separators; a dash where it is unknown.

    Example:
        >>> about(12499), about(853), about(None)
        ('12,500', '853', '–')
    """
    return "–" if n is None else f"{int(float(f'{n:.3g}')):,}"


def between(interval: Sequence[int | None] | None) -> str | None:
    """Write an interval of n.

    Example:
        >>> between([10173, 15637]), between([20800, None])
        ('10,200 to 15,600', 'more than 20,800')
    """
    if interval is None:
        return None
    low, high = interval
    return f"more than {about(low)}" if high is None else f"{about(low)} to {about(high)}"


def content(facts: Mapping[str, Any]) -> Content:
    """Put what a comparison found into the form that the fragment shows.

    Arguments:
        facts: of `stages.compare`.
    """
    joint, names = facts["joint"], list(facts["names"])
    pairs = sorted(facts["pairs"], key=lambda pair: (-pair["shared"], pair["first"], pair["second"]))
    implied = facts["top"] ** 2 / joint["mean"] if joint["mean"] else None
    properties = [one["name"] for one in facts["bias"]["properties"]]
    tests = facts["bias"]["tests"]
    known = {(test["score"], test["property"]): _cell(test) for test in tests}
    properties = [name for name in properties if any((score, name) in known for score in names)]
    groups = facts["groups"]["found"]
    errors = facts["errors"]
    return Content(
        facts=facts,
        names=names,
        n=None if joint["pairs"]["n"] is None else about(joint["pairs"]["n"]),
        within=(between(joint["pairs"]["within68"]) or "", between(joint["methods68"])),
        implied=about(round(implied)) if implied is not None and implied < 0.95 * joint["distinct"] else None,
        random=joint["pairs"]["within95"][1] in (None, facts["scored"]),
        extremes=(pairs[0], pairs[-1]),
        properties=properties,
        leaning={score: [known.get((score, name), Cell()) for name in properties] for score in names},
        tests=len(tests),
        leans=sum(cell.significant for cell in known.values()),
        groups=groups[:_TOLD],
        more=max(0, len(groups) - _TOLD),
        panels={
            "bias": [f"compare-bias-{name}" for name in _strongest(tests)],
            "errors": [f"compare-error-{name}" for name in MEASURES] if errors else [],
        },
    )


def _cell(test: Mapping[str, Any]) -> Cell:
    significant = test["corrected"] < _SIGNIFICANT
    away = 2 * (test["mean"] - 0.5) if significant else 0.0
    return Cell(test["mean"], test["corrected"], significant, max(-away, 0.0), max(away, 0.0))


def _strongest(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the properties to draw: S/N, and those that lists lean towards most."""
    smallest: dict[str, float] = {}
    for test in tests:
        smallest[test["property"]] = min(smallest.get(test["property"], 1.0), test["p"])
    names = sorted(smallest, key=lambda name: (name != "snr", smallest[name]))
    return names[:_PANELS]


def figures(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Draw all figures of a comparison, by the names that the fragment asks for.

    Arguments:
        facts: of `stages.compare`.
    """
    tests = facts["bias"]["tests"]
    drawn = {
        "compare-overlap": overlap_figure(facts),
        "compare-pairs": pairs_figure(facts),
        "compare-sizes": sizes_figure(facts["curve"]),
    }
    for name in _strongest(tests):
        drawn[f"compare-bias-{name}"] = bias_figure(name, [test for test in tests if test["property"] == name])
    if facts["errors"]:
        for name, histogram in facts["errors"]["histograms"].items():
            drawn[f"compare-error-{name}"] = error_figure(name, histogram, facts["errors"]["cuts"])
    return drawn


def overlap_figure(facts: Mapping[str, Any]) -> Any:
    """Draw the matrix of overlaps: counts below the diagonal, the n that each tells of above it."""
    names = list(facts["names"])
    most = max((pair["shared"] for pair in facts["pairs"]), default=0) or 1
    cells = []
    for pair in facts["pairs"]:
        early, late = sorted((pair["first"], pair["second"]), key=names.index)
        n = about(pair["n"]) if pair["n"] is not None else f"> {about(pair['low95'])}"
        within = between([pair["low68"], pair["high68"]])
        told = {"shared": pair["shared"], "n": n, "within": within}
        color = _shade(pair["shared"] / most)
        cells.append({"x": early, "y": late, "text": f"{pair['shared']:,}", "color": color} | told)
        cells.append({"x": late, "y": early, "text": _short(n), "color": "#ffffff"} | told)
    source = ColumnDataSource({key: [cell[key] for cell in cells] for key in cells[0]})
    plot = panel(80 + 30 * len(names), "", "", x_range=names, y_range=names[::-1], x_axis_location="above", tools="")
    # So wide that a number fits its cell; on a narrow screen the matrix is scrolled.
    plot.sizing_mode, plot.width, plot.min_border_left = "fixed", 130 + max(58, 600 // len(names)) * len(names), 110
    drawn = plot.rect("x", "y", 1, 1, source=source, fill_color="color", line_color="#e7eaee")
    plot.text("x", "y", "text", source=source, text_align="center", text_baseline="middle", text_font_size="11.5px")
    tips = [("lists", "@y and @x"), ("shared", "@shared{0,0}"), ("n", "@n"), ("68 %", "@within")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    plot.xaxis.major_label_orientation = 0.6
    plot.grid.grid_line_color = plot.axis.axis_line_color = plot.axis.major_tick_line_color = None
    return plot


def _short(text: str) -> str:
    """Write thousands as k and millions as M: cells are narrow.

    Example:
        >>> _short("8,630"), _short("12,500"), _short("> 1,250,000")
        ('8,630', '12.5k', '> 1.25M')
    """
    sign, _, digits = text.rpartition(" ")
    number = int(digits.replace(",", ""))
    if number >= 10_000:
        digits = f"{number / 1e6:.3g}M" if number >= 1_000_000 else f"{number / 1e3:.3g}k"
    return f"{sign} {digits}".strip()


def _shade(share: float) -> str:
    """Mix the color of counts with white."""
    mixed = (round(255 + (part - 255) * 0.58 * share) for part in (31, 95, 139))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def pairs_figure(facts: Mapping[str, Any]) -> Any:
    """Draw n against the overlap, with each pair on the curve n = g²/k, as fig. 2 of Reis et al.

    The band holds the overlaps of 68 % of random draws.
    """
    g, joint, pairs = facts["top"], facts["joint"], facts["pairs"]
    shared = [pair["shared"] for pair in pairs]
    # From half of the least overlap to a little more than the largest.
    least, most = max(0.5, 0.5 * min(shared)), min(float(g), 1.2 * max(shared) + 2)
    numbers = np.unique(np.geomspace(max(g, g * g / most), g * g / least, 200).astype(np.int64))
    mean, sd = np.array([overlap_moments(int(n), g, g) for n in numbers]).T
    plot = panel(
        340, f"spectra that two lists of {g:,} share, k", "number of anomalies, n", y_axis_type="log", tools=""
    )
    plot.yaxis[0].formatter = NumeralTickFormatter(format="0,0")
    plot.x_range = Range1d(-0.03 * most, 1.03 * most)
    plot.harea(x1=mean - sd, x2=mean + sd, y=numbers, color=COLORS["count"], alpha=0.3)
    plot.line(mean, numbers, color=COLORS["flux"], line_width=1.5)
    found = [n for n in joint["pairs"]["within68"] if n is not None]
    plot.hspan(y=found, line_color=COLORS["truth"], line_dash="dotted", line_width=1.5)
    if joint["pairs"]["n"] is not None:
        found.append(joint["pairs"]["n"])
        plot.hspan(y=found[-1:], line_color=COLORS["truth"], line_width=2)
    ends = [pair[name] for pair in pairs for name in ("low68", "high68") if pair[name] is not None]
    reach = [*found, *ends, int(numbers[0]), int(numbers[-1])]
    plot.y_range = Range1d(min(reach) / 1.2, max(reach) * 1.2)
    _points(plot, pairs)
    return plot


def _points(plot: Any, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Draw the pairs; those of equal overlap are one point."""
    by_shared: dict[int, list[Mapping[str, Any]]] = {}
    for pair in pairs:
        by_shared.setdefault(pair["shared"], []).append(pair)
    told = [same for k, same in sorted(by_shared.items()) if k]
    source = ColumnDataSource(
        {
            "k": [same[0]["shared"] for same in told],
            "n": [same[0]["n"] for same in told],
            "low": [same[0]["low68"] for same in told],
            "high": [same[0]["high68"] for same in told],
            "pairs": ["; ".join(f"{pair['first']} – {pair['second']}" for pair in same) for same in told],
        }
    )
    plot.segment("k", "low", "k", "high", source=source, color=COLORS["reconstruction"], line_width=1.5)
    points = plot.scatter("k", "n", source=source, size=7, color=COLORS["reconstruction"])
    tips = [("pairs", "@pairs"), ("shared", "@k"), ("n", "@n{0,0}"), ("68 %", "@low{0,0} to @high{0,0}")]
    plot.add_tools(HoverTool(renderers=[points], tooltips=tips))
    if 0 in by_shared:
        plot.scatter([0], [by_shared[0][0]["low95"]], marker="triangle", size=11, color=COLORS["reconstruction"])


def sizes_figure(curve: Sequence[Mapping[str, Any]]) -> Any:
    """Draw n from lists of all lengths, with the interval of the pairs and, wider, that of the choice of scores."""
    sizes = [point["g"] for point in curve]
    plot = panel(
        340, "length of the lists, g", "number of anomalies, n", x_axis_type="log", y_axis_type="log", tools=""
    )
    plot.xaxis[0].ticker = FixedTicker(ticks=sizes if len(sizes) < 7 else sizes[:: -(-len(sizes) // 6)])
    plot.xaxis[0].formatter = plot.yaxis[0].formatter = NumeralTickFormatter(format="0,0")
    plot.x_range = Range1d(min(sizes) / 1.3, max(sizes) * 1.3)
    told = [point for point in curve if point["pairs"]["n"] is not None]
    for name, color, width in (("methods68", COLORS["count"], 2), ("within68", COLORS["truth"], 4)):
        spans = [(point, point[name] if name == "methods68" else point["pairs"][name]) for point in told]
        spans = [(point, span) for point, span in spans if span is not None and span[1] is not None]
        plot.segment(
            [point["g"] for point, _ in spans],
            [span[0] for _, span in spans],
            [point["g"] for point, _ in spans],
            [span[1] for _, span in spans],
            color=color,
            line_width=width,
        )
    source = ColumnDataSource(
        {
            "g": [point["g"] for point in told],
            "n": [point["pairs"]["n"] for point in told],
            "mean": [point["mean"] for point in told],
            "distinct": [point["distinct"] for point in told],
        }
    )
    plot.line("g", "n", source=source, color=COLORS["truth"], line_width=1.5)
    points = plot.scatter("g", "n", source=source, size=8, color=COLORS["truth"])
    tips = [("g", "@g{0,0}"), ("n", "@n{0,0}"), ("mean overlap", "@mean{0.0}"), ("distinct", "@distinct{0,0}")]
    plot.add_tools(HoverTool(renderers=[points], tooltips=tips))
    none = [point for point in curve if point["pairs"]["n"] is None]
    if none:
        lowest = [point["pairs"]["within95"][0] for point in none]
        plot.scatter([point["g"] for point in none], lowest, marker="triangle", size=11, color=COLORS["truth"])
    return plot


def bias_figure(name: str, tests: Sequence[Mapping[str, Any]]) -> Any:
    """Draw how the lists lie over the ranks of a property, as fig. 3 of Reis et al.; uniform lists stay in the band."""
    ordered = sorted(tests, key=lambda test: float(test["p"]))
    plot = panel(250, f"rank in {name}, share of the survey", "members of the list", title=name, tools="")
    edges = np.linspace(0, 1, 11)
    expected, sd = (np.array(ordered[0][key]) for key in ("expected", "sd"))
    band = {"left": edges[:-1], "right": edges[1:], "top": expected + sd, "bottom": np.maximum(expected - sd, 0)}
    plot.quad(**band, color=COLORS["count"], alpha=0.25, line_alpha=0)
    significant = [test for test in ordered if test["corrected"] < _SIGNIFICANT][:_DRAWN]
    plain = [test for test in ordered if test not in significant]
    for test in plain:
        plot.line(*_steps(edges, test["counts"]), color="#b9c1cb", line_width=1)
    for test, color in zip(significant, _PALETTE, strict=False):
        x, y = _steps(edges, test["counts"])
        plot.line(x, y, color=color, line_width=2, legend_label=str(test["score"]))
    largest = max(max(test["counts"]) for test in ordered)
    plot.x_range, plot.y_range = Range1d(0, 1), Range1d(0, 1.08 * max(largest, float((expected + sd).max())))
    plot.xaxis[0].formatter = NumeralTickFormatter(format="0 %")
    plot.xaxis[0].ticker = BasicTicker(desired_num_ticks=5)
    if significant:
        # Where lists have fewer members.
        left, right = (max(max(test["counts"][half]) for test in significant) for half in (slice(5), slice(5, None)))
        plot.legend.location = "top_left" if left < right else "top_right"
        plot.legend.background_fill_alpha = 0.7
        plot.legend.border_line_alpha = 0
        plot.legend.label_text_font_size = "11px"
        plot.legend.spacing, plot.legend.padding = 0, 2
    return plot


def _steps(
    edges: Float64[np.ndarray, "bins+1"], counts: Sequence[float]
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
    """Outline a histogram."""
    return np.repeat(edges, 2)[1:-1], np.repeat(np.array(counts, np.float64), 2)


def error_figure(name: str, histogram: Mapping[str, Any], cuts: Mapping[str, Any]) -> Any:
    """Draw the distribution of one error of the reconstructions, with the lines beyond which spectra are listed."""
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    beyond = histogram["below"] + histogram["above"]
    away = f"; {beyond:,} beyond the axis" if beyond else ""
    plot = panel(230, "", "spectra", y_axis_type="log", title=f"{_NAMES[name]}{away}", tools="")
    source = ColumnDataSource(
        {"left": edges[:-1], "right": edges[1:], "top": counts, "bottom": np.full(len(counts), 0.5)}
    )
    bars = plot.quad("left", "right", "top", "bottom", source=source, color=COLORS["count"], line_color="white")
    tips = [(_NAMES[name], "@left{0.0000a} – @right{0.0000a}"), ("spectra", "@top{0,0}")]
    plot.add_tools(HoverTool(renderers=[bars], tooltips=tips))
    plot.x_range, plot.y_range = Range1d(float(edges[0]), float(edges[-1])), Range1d(0.5, 2.0 * max(1, counts.max()))
    plot.yaxis[0].formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis[0].formatter = PrintfTickFormatter(format="%.2g")
    lines = {"difference": cuts["difference"], "rmse": [cuts["rmse"]], "mse": []}[name]
    for line in lines:
        plot.add_layout(Span(location=line, dimension="height", line_color=COLORS["threshold"], line_width=2))
    return plot
