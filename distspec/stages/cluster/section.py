"""What clusters of explanations tell, for the report and for MLflow: words and figures from clusters.json alone.

The file (`distspec.stages.cluster.stage` writes it) holds, as plain values with None for what is not known:

    schema, store, layer, model   what it belongs to
    frame, grid, edges            of the spectra; the wavelengths between which regions lie, Å vacuum
    method, score, settings       what was clustered, and how
    explained, unknown, clustered spectra in the list, of these without an explanation, and those clustered
    noise, notes                  spectra in no cluster; what to know before trusting the rest
    scan                          k, inertia and mean silhouette of each; None where k was given
    silhouette, sampled           mean over spectra; how many it is of, None for all
    components                    principal components that hold a share of the variance of the weights
    properties                    redshift and S/N of all: known, quantiles, edges and counts of a histogram
    clusters                      largest first: size, share, silhouette, mean weights, mean and median spectrum, peaks,
                                  where the heaviest regions of members lie in either frame (moved), nearest and top
                                  members, properties and how they lean, classes, exposures, text
    concentrations                kinds of exposures that were tested, and number of tests
    truth                         agreement with planted kinds, among all spectra and among planted ones; None without

Quantiles are those of 2.5, 16, 50, 84 and 97.5 %.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, LinearColorMapper, NumeralTickFormatter, Range1d
from jaxtyping import Float64
from matplotlib.figure import Figure

from distspec.results.figures.kit import COLORS, line_marks, panel, stacked
from distspec.spectra import WaveGrid

__all__ = ["SCHEMA", "content", "figures", "picture"]

SCHEMA: Final = 1
"""Of clusters.json."""

Facts = Mapping[str, Any]

_LIMIT: Final = 0.01
"""Corrected p below which a cluster is said to share an exposure, or to lean."""

_ROWS: Final = 40
"""Clusters in the table; of more, the rest is counted."""

_MOST: Final = 0.9
"""Share of all in one cluster from which on the silhouette tells little."""

_EXPOSURES: Final = 5
"""Shared exposures that are told of a cluster."""

_SHADES: Final = 250
"""Strips that tint a background, at most."""

_STRUCTURE: Final = ((0.7, "a strong"), (0.5, "a reasonable"), (0.25, "a weak"), (-np.inf, "no substantial"))
"""Mean silhouette above which a structure is called so (Kaufman & Rousseeuw 1990, Finding Groups in Data, table 4)."""

_ALGORITHMS: Final = {"kmeans": "k-means", "hdbscan": "HDBSCAN"}

_NAMES: Final = {"z": "redshift", "snr": "S/N per pixel"}


# --- words -----------------------------------------------------------------------------------------------------------


def content(facts: Facts) -> dict[str, Any]:
    """Give what the fragment section.html.jinja shows.

    Arguments:
        facts: content of clusters.json.
    """
    clusters = facts["clusters"]
    return {
        "facts": facts,
        "algorithm": _ALGORITHMS[facts["settings"]["algorithm"]],
        "vectors": _vectors(facts["settings"]),
        "regions": len(facts["edges"]) - 1,
        "structure": _structure(facts["silhouette"]),
        "choice": _choice(facts),
        "dominant": next((one["share"] for one in clusters if len(clusters) > 1 and one["share"] > _MOST), None),
        "rows": [_row(facts, one) for one in clusters[:_ROWS]],
        "more": max(0, len(clusters) - _ROWS),
        "properties": [(name, _NAMES[name]) for name in facts["properties"]],
        "cards": [_card(facts, one) for one in clusters if one["spectrum"] is not None],
        "exposures": [", ".join(kind["columns"]) for kind in facts["concentrations"]["kinds"]],
        "limit": _LIMIT,
        "truth": None if facts["truth"] is None else _truth(facts["truth"]),
        "panels": _panels(facts),
    }


def _vectors(settings: Mapping[str, Any]) -> str:
    """Say what was clustered."""
    weights = "signed weights" if settings["signed"] else "absolute weights"
    divided = {"l2": "divided by the length of their vector", "max": "divided by the largest", "none": "as they are"}
    return f"{weights}, {divided[settings['normalize']]}"


def _structure(silhouette: float | None) -> str | None:
    """Put a mean silhouette into words; None where it is not defined.

    Example:
        >>> _structure(0.31), _structure(0.1), _structure(None)
        ('a weak', 'no substantial', None)
    """
    return None if silhouette is None else next(word for least, word in _STRUCTURE if silhouette > least)


def _choice(facts: Facts) -> str | None:
    """Say how k was chosen, and where that says little."""
    scan = facts["scan"]
    if scan is None:
        return None
    known = [(value, k) for k, value in zip(scan["k"], scan["silhouette"], strict=True) if value is not None]
    if not known:
        return None
    best, k = max(known, key=lambda pair: (pair[0], -pair[1]))
    told = f"k = {k} has the largest mean silhouette, {best:.2f}, of k = {scan['k'][0]} to {scan['k'][-1]}"
    if len(scan["k"]) > 2 and k == scan["k"][0]:
        return f"{told}; it is the least that was tried, as where explanations do not fall into groups"
    if len(scan["k"]) > 2 and k == scan["k"][-1]:
        return f"{told}; it is the largest that was tried: more may be better (cluster.scan)"
    return told


def _row(facts: Facts, one: Mapping[str, Any]) -> dict[str, Any]:
    """Tell of a cluster in a row of the table."""
    shared = [held for held in one["exposures"] if held["p"] < _LIMIT]
    spread = _is_spread(facts, one["peaks"])
    return {
        "label": one["label"],
        "size": one["size"],
        "share": one["share"],
        "silhouette": one["silhouette"],
        "peak": "all wavelengths alike" if spread else _peak(one["peaks"][0]) if one["peaks"] else "–",
        "others": [] if spread else [_peak(peak) for peak in one["peaks"][1:]],
        "properties": [_interval(one["properties"][name]) for name in facts["properties"]],
        "leans": [_leans(one, name) for name in facts["properties"]],
        "shared": shared[0] if shared else None,
        "text": one["text"],
        "told": one["spectrum"] is not None,
    }


def _card(facts: Facts, one: Mapping[str, Any]) -> dict[str, Any]:
    """Tell of a cluster beside its figures."""
    label, spread = one["label"], _is_spread(facts, one["peaks"])
    return _row(facts, one) | {
        "figure": f"cluster-{label}",
        "panels": [f"cluster-{label}-{name}" for name in facts["properties"]],
        "spectrum": one["spectrum"],
        "nearest": one["nearest"],
        "top": one["top"],
        "exposures": [held for held in one["exposures"] if held["p"] < _LIMIT][:_EXPOSURES],
        "sign": None if spread else _sign(one["peaks"]),
        "moved": None if spread else _moved(one),
        "confined": _confined(facts, one),
        "bpt": list((one["bpt"] or {}).items()),
        "classes": [(name or "unknown", count) for name, count in (one["classes"] or {}).items()],
    }


def _is_spread(facts: Facts, peaks: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the weights have no place of their own: the first peak is wider than half of the spectrum."""
    edges = facts["edges"]
    return bool(peaks) and bool(peaks[0]["high"] - peaks[0]["low"] > 0.5 * (edges[-1] - edges[0]))


def _peak(peak: Mapping[str, Any]) -> str:
    """Write where a peak is.

    Example:
        >>> _peak({"low": 6549.9, "high": 6581.2, "lines": ["H alpha", "[N II] 6550"]})
        '6,550–6,581 Å (H alpha, [N II] 6550)'
    """
    lines = f" ({', '.join(peak['lines'])})" if peak["lines"] else ""
    return f"{peak['low']:,.0f}–{peak['high']:,.0f} Å{lines}"


def _interval(spread: Mapping[str, Any]) -> str:
    """Write median and 68 % interval.

    Example:
        >>> _interval({"quantiles": [0.01, 0.0213, 0.05, 0.081, 0.2]}), _interval({"quantiles": None})
        ('0.05 (0.0213 to 0.081)', '–')
    """
    if spread["quantiles"] is None:
        return "–"
    _, low, middle, high, _ = (f"{value:.3g}".replace("-", "−") for value in spread["quantiles"])
    return f"{middle} ({low} to {high})"


def _leans(one: Mapping[str, Any], name: str) -> bool:
    p = one["properties"][name]["leaning"]["p"]
    return p is not None and p < _LIMIT


def _sign(peaks: Sequence[Mapping[str, Any]]) -> str | None:
    """Say whether the flux at the first peak raises the score in all members, lowers it in all, or neither."""
    if not peaks:
        return None
    ratio = peaks[0]["signed"] / peaks[0]["value"]
    return "raises" if ratio > 0.8 else "lowers" if ratio < -0.8 else "mixed"


def _moved(one: Mapping[str, Any]) -> str | None:
    """Write where the heaviest regions of members lie in the other frame: median and 68 % interval."""
    if one["moved"] is None:
        return None
    _, low, middle, high, _ = (f"{wave:,.0f}" for wave in one["moved"]["quantiles"])
    return f"{middle} Å {one['moved']['frame']} ({low} to {high} Å)"


def _confined(facts: Facts, one: Mapping[str, Any]) -> bool:
    """Tell whether a cluster's redshifts keep to a part of those of all, as where a sky line meets a spectral line."""
    if "z" not in facts["properties"] or facts["frame"] != "rest" or not _leans(one, "z"):
        return False
    every, mine = facts["properties"]["z"]["quantiles"], one["properties"]["z"]["quantiles"]
    return bool(mine[3] - mine[1] < 0.5 * (every[3] - every[1]))


def _truth(truth: Mapping[str, Any]) -> dict[str, Any]:
    """Give the table of clusters and planted kinds, with shades by the share of a kind that is in a cluster."""
    every = truth["all"]
    sums = np.array(every["table"], np.int64).reshape(-1, len(every["kinds"])).sum(axis=0).tolist()
    shown = every["table"][:_ROWS]
    cells = [[(count, count / total) for count, total in zip(row, sums, strict=True)] for row in shown]
    kinds = [kind or "not planted" for kind in every["kinds"]]
    return {"kinds": kinds, "rows": cells, "sums": sums, "all": every, "planted": truth["planted"]}


# --- figures ---------------------------------------------------------------------------------------------------------


def _panels(facts: Facts) -> dict[str, str | None]:
    """Name the figures that stand over those of each cluster."""
    scan = facts["scan"]
    scanned = scan is not None and len(scan["k"]) > 1
    several = sum(one["weights"] is not None for one in facts["clusters"]) > 1
    return {"scan": "clusters-scan" if scanned else None, "weights": "clusters-weights" if several else None}


def figures(facts: Facts) -> dict[str, Any]:
    """Draw all figures, by the names that the fragment asks for.

    Arguments:
        facts: content of clusters.json.

    Returns:
        Bokeh models: the scan of k and the mean weights of all clusters, where there are several; then for each cluster
        its mean and median spectrum with its weights, and histograms of its properties.
    """
    names, drawn = _panels(facts), {}
    if names["scan"]:
        drawn[names["scan"]] = _scan_figure(facts["scan"])
    if names["weights"]:
        drawn[names["weights"]] = _weights_figure(facts)
    for one in facts["clusters"]:
        if one["spectrum"] is None:
            continue
        drawn[f"cluster-{one['label']}"] = _cluster_figure(facts, one)
        for name, every in facts["properties"].items():
            drawn[f"cluster-{one['label']}-{name}"] = _histogram(name, every, one["properties"][name])
    return drawn


def _numbers(values: Sequence[float | None]) -> Float64[np.ndarray, "n"]:
    return np.array(values, dtype=np.float64)  # None becomes NaN, which is a gap


def _relative(values: Sequence[float | None]) -> Float64[np.ndarray, "n"]:
    """Divide by the largest, as the paper does, so that both curves share an axis."""
    numbers = _numbers(values)
    known = numbers[np.isfinite(numbers)]
    most = float(known.max()) if len(known) else 0.0
    return numbers / most if most > 0 else numbers


def _scan_figure(scan: Mapping[str, Any]) -> Any:
    """Draw inertia and mean silhouette against k, each over its largest."""
    plot = panel(280, "number of clusters, k", "relative to the largest", tools="")
    source = ColumnDataSource(
        {
            "k": scan["k"],
            "inertia": _numbers(scan["inertia"]),
            "silhouette": _numbers(scan["silhouette"]),
            "low": _relative(scan["inertia"]),
            "high": _relative(scan["silhouette"]),
        }
    )
    for column, name, color in (("low", "inertia", COLORS["count"]), ("high", "silhouette", COLORS["truth"])):
        plot.line("k", column, source=source, color=color, line_width=1.8, legend_label=name)
        points = plot.scatter("k", column, source=source, color=color, size=6)
        tips = [("k", "@k"), ("inertia", "@inertia{0.000a}"), ("mean silhouette", "@silhouette{0.000}")]
        plot.add_tools(HoverTool(renderers=[points], tooltips=tips))
    # From 0, so that the legend stands below the curves; silhouettes may be negative.
    plot.y_range = Range1d(min([0.0, *(value for value in _relative(scan["silhouette"]).tolist() if value < 0)]), 1.05)
    plot.xaxis[0].formatter = NumeralTickFormatter(format="0")
    plot.legend.location = "bottom_left"
    plot.legend.background_fill_alpha, plot.legend.border_line_alpha = 0.7, 0
    plot.legend.label_text_font_size = "11px"
    return plot


def _map(facts: Facts) -> tuple[Float64[np.ndarray, "k regions"], list[int]]:
    """Give the mean weights of the clusters whose spectra are told, and their labels."""
    told = [one for one in facts["clusters"] if one["weights"] is not None]
    return np.array([one["weights"]["mean"] for one in told], np.float64), [one["label"] for one in told]


def _weights_figure(facts: Facts) -> Any:
    """Draw the mean weights of all clusters, one line of the picture each."""
    weights, labels = _map(facts)
    edges = _numbers(facts["edges"])
    names = [str(label) for label in labels]
    axis = Range1d(float(edges[0]), float(edges[-1]))
    plot = panel(90 + 20 * len(labels), _wavelength(facts), "cluster", x_range=axis, y_range=names[::-1])
    shown, ends = _coarse(weights, edges)
    line, place = np.indices(shown.shape).reshape(2, -1)
    source = ColumnDataSource(
        {
            "cluster": [names[index] for index in line.tolist()],
            "middle": (0.5 * (ends[:-1] + ends[1:]))[place].astype(np.float32),
            "width": np.diff(ends)[place].astype(np.float32),
            "weight": shown.ravel().astype(np.float32),
        }
    )
    palette = [_mixed(share) for share in np.linspace(0, 1, 64)]
    mapper = LinearColorMapper(palette=palette, low=0.0, high=1.0)
    cells = plot.rect(
        "middle",
        "cluster",
        "width",
        0.92,
        source=source,
        fill_color={"field": "weight", "transform": mapper},
        line_alpha=0,
    )
    tips = [("cluster", "@cluster"), ("wavelength", "@middle{0,0} Å"), ("mean |weight|", "@weight{0.00}")]
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tips))
    plot.grid.grid_line_color = None
    return plot


def _mixed(share: float) -> str:
    """Mix the color of what raises a score with white."""
    whole = (int(COLORS["raises"][place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in whole)


def _coarse(
    values: Float64[np.ndarray, "k regions"], edges: Float64[np.ndarray, "regions+1"]
) -> tuple[Float64[np.ndarray, "k strips"], Float64[np.ndarray, "strips+1"]]:
    """Join neighbouring regions until there are few enough to draw; the strongest of each strip is kept."""
    step = -(-values.shape[1] // _SHADES)
    starts = np.arange(0, values.shape[1], step)
    strongest = np.maximum.reduceat(values, starts, axis=1)
    weakest = np.minimum.reduceat(values, starts, axis=1)
    return np.where(strongest >= -weakest, strongest, weakest), np.append(edges[:-1][starts], edges[-1])


def _wavelength(facts: Facts) -> str:
    return f"{'Rest-frame' if facts['frame'] == 'rest' else 'Observed'} wavelength in vacuum (Å)"


def _cluster_figure(facts: Facts, one: Mapping[str, Any]) -> Any:
    """Draw a cluster's mean and median spectrum over the mean weights, and these weights below."""
    grid, edges = WaveGrid(**facts["grid"]), _numbers(facts["edges"])
    axis = Range1d(float(grid.wave[0]), float(grid.wave[-1]))
    mean, median = _numbers(one["spectrum"]["mean"]), _numbers(one["spectrum"]["median"])
    size, signed = (_numbers(one["weights"][name]) for name in ("mean", "signed"))
    source = ColumnDataSource({"wave": grid.wave.astype(np.float32), "mean": mean, "median": median})
    known = np.concatenate([mean, median])
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    height = (high - low) or 1.0
    marks = line_marks(axis.start, axis.end) if facts["frame"] == "rest" else []
    roof = high + height * (0.32 if marks else 0.05)
    top = panel(260, "", "flux", x_range=axis, y_range=Range1d(low - 0.05 * height, roof))
    top.xaxis.visible = False
    shades, ends = _coarse(np.stack([size, signed]), edges)
    tint, strength = [_tint(*pair) for pair in shades.T.tolist()], 0.45 * np.clip(shades[0], 0, 1)
    top.vstrip(x0=ends[:-1], x1=ends[1:], fill_color=tint, fill_alpha=strength, line_alpha=0, level="underlay")
    if marks:
        waves = [wave for mark in marks for wave in mark.waves]
        top.vspan(x=waves, line_color=COLORS["emission"], line_alpha=0.25)
        told = {"x": [mark.place for mark in marks], "y": [roof] * len(marks), "text": [mark.label for mark in marks]}
        style = {"text_font_size": "10px", "text_color": COLORS["emission"], "background_fill_color": "white"}
        top.text(**told, angle=np.pi / 2, text_align="right", text_baseline="middle", y_offset=5, **style)
    drawn = top.line("wave", "mean", source=source, color=COLORS["flux"], line_width=1.4)
    top.line("wave", "median", source=source, color=COLORS["end"], line_width=1.0, line_dash="dashed")
    tips = [("wavelength", "@wave{0.0} Å"), ("mean", "@mean{0.000}"), ("median", "@median{0.000}")]
    top.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline", line_policy="nearest"))
    return stacked([[top], [_weight_panel(facts, edges, size, signed, axis)]])


def _tint(size: float, signed: float) -> str:
    """Choose the color of a region: grey where members do not agree on the sign."""
    return COLORS["count"] if abs(signed) < 0.3 * size else COLORS["raises"] if signed > 0 else COLORS["lowers"]


def _weight_panel(
    facts: Facts,
    edges: Float64[np.ndarray, "regions+1"],
    size: Float64[np.ndarray, "regions"],
    signed: Float64[np.ndarray, "regions"],
    axis: Range1d,
) -> Any:
    """Draw mean |weights| as an outline, and signed means as a surface: the same height where signs agree."""
    plot = panel(165, _wavelength(facts), "mean weight", x_range=axis, y_range=Range1d(-1.08, 1.08))
    steps = {"wave": np.repeat(edges, 2)[1:-1], "size": np.repeat(size, 2), "signed": np.repeat(signed, 2)}
    steps |= {"up": np.maximum(steps["signed"], 0), "down": np.minimum(steps["signed"], 0)}
    source = ColumnDataSource({name: values.astype(np.float32) for name, values in steps.items()})
    plot.varea("wave", 0, "up", source=source, fill_color=COLORS["raises"], fill_alpha=0.45)
    plot.varea("wave", "down", 0, source=source, fill_color=COLORS["lowers"], fill_alpha=0.45)
    drawn = plot.line("wave", "size", source=source, color=COLORS["flux"], line_width=1)
    tips = [("wavelength", "@wave{0.0} Å"), ("mean |weight|", "@size{0.00}"), ("mean weight", "@signed{0.00}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline", line_policy="nearest"))
    return plot


def _histogram(name: str, every: Mapping[str, Any], mine: Mapping[str, Any]) -> Any:
    """Draw how a cluster's members lie in a property; the line is what as many of all spectra would give."""
    edges, counts = _numbers(every["edges"]), np.array(mine["counts"], np.int64)
    expected = np.array(every["counts"], np.float64) * mine["known"] / max(every["known"], 1)
    plot = panel(170, _NAMES[name], "members", tools="")
    source = ColumnDataSource({"left": edges[:-1], "right": edges[1:], "top": counts, "expected": expected})
    bars = plot.quad("left", "right", "top", 0, source=source, color=COLORS["count"], line_color="white")
    plot.line(np.repeat(edges, 2)[1:-1], np.repeat(expected, 2), color=COLORS["flux"], line_width=1.2)
    tips = [(_NAMES[name], "@left{0.000} – @right{0.000}"), ("members", "@top"), ("of all", "@expected{0.0}")]
    plot.add_tools(HoverTool(renderers=[bars], tooltips=tips))
    plot.x_range = Range1d(float(edges[0]), float(edges[-1]))
    plot.y_range = Range1d(0, 1.08 * max(1.0, float(counts.max(initial=0)), float(expected.max(initial=0.0))))
    return plot


def picture(facts: Facts) -> Figure:
    """Draw the mean weights of all clusters, and the scan of k, as one picture."""
    scan = facts["scan"]
    weights, labels = _map(facts)
    figure = Figure(figsize=(9.0, (2.6 if scan else 0.8) + 0.6 + 0.28 * max(len(labels), 1)), layout="constrained")
    ratios = [2.6, 0.6 + 0.28 * max(len(labels), 1)] if scan else [1.0]
    axes = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    if scan:
        axes[0].plot(scan["k"], _relative(scan["inertia"]), "o-", label="inertia", color=COLORS["count"])
        axes[0].plot(scan["k"], _relative(scan["silhouette"]), "o-", label="silhouette", color=COLORS["truth"])
        axes[0].set(xlabel="k", ylabel="relative to the largest")
        axes[0].legend()
    if len(labels):
        edges = _numbers(facts["edges"])
        axes[-1].pcolormesh(edges, np.arange(len(labels) + 1) - 0.5, weights, cmap="Reds", vmin=0, vmax=1)
        axes[-1].set_yticks(range(len(labels)), labels)
        axes[-1].invert_yaxis()
    axes[-1].set(xlabel=_wavelength(facts), ylabel="cluster")
    axes[-1].set_title(f"mean |weights| of {facts['method']}, score {facts['score']}")
    return figure
