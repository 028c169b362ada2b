"""What an evaluation tells, for the report and for MLflow: tables, sentences and figures from evaluation.json alone.

The file (`distspec.stages.evaluate.stage` writes it) holds, as plain values with None for what is not known:

    schema, store, model        what it belongs to
    hosts, background           number of spectra planted in, and of those compared with
    detectors, strengths        in their order; `strength` is that of tables that show one
    levels, listed, level       shares looked at, lengths of their top lists, the level of tables that show one
    kinds, groups, impossible   kind -> what it is about, whether graded, number of hosts at each strength; members
    results, best               of `statistics.recall.summarize`
    strata, pointing            of `stratified` there, and of `pointed` there for each explainer
    notes                       what to know before trusting the numbers
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d
from matplotlib.figure import Figure

from distspec.results.figures.kit import panel, stacked
from distspec.results.truth import pointing, recovery
from distspec.stages.stage import Job, Section

__all__ = ["SCHEMA", "content", "figures", "picture", "truth_section"]

_RECOVERED: Final = 0.02
"""Share of the scored spectra in the lists in which planted anomalies are looked for."""

SCHEMA: Final = 1
"""Of evaluation.json."""

LINES: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
"""Colors of the best detectors in figures (Okabe & Ito, told apart by all eyes)."""

_ABREAST: Final = 4
"""Panels in a row."""

Facts = Mapping[str, Any]

Triple = Sequence[Any]

Cell = dict[str, Any]
"""`text` of a cell and its `range`, its `shade` from 0 to 1 or None, if it is the `best` of its column, a `tip`."""


def content(facts: Facts) -> dict[str, Any]:
    """Give what the fragment section.html.jinja shows.

    Arguments:
        facts: content of evaluation.json.
    """
    order = _ranked(facts)
    at = facts["strengths"].index(facts["strength"])
    level = _level(facts)
    tables = {"auc": _table(facts, order, lambda found: found["auc"][at], _auc, lambda value: 2.0 * value - 1.0)}
    if facts["level"] is not None:
        tables["recall"] = _table(facts, order, lambda found: found["recall"][level][at], _percent, float)
        tables["half"] = _halves(facts, order)
    return {
        "facts": facts,
        "tables": tables,
        "best": _sentences(facts),
        "lists": _lists(facts),
        "level": None if facts["level"] is None else _percent(facts["level"]),
        "size": None if facts["level"] is None else facts["listed"][level],
        "confidence": _percent(facts["confidence"]),
        "lines": list(zip(_drawn(facts), LINES, strict=False)),
        "figure": "evaluation" if _panels(facts) else None,
        "strata": _strata(facts, order),
        "pointing": _pointing(facts),
        "rare": _rare(facts, at),
    }


def _level(facts: Facts) -> str:
    """Give the key of the level of tables that show one."""
    return "" if facts["level"] is None else f"{facts['level']:g}"


def _columns(facts: Facts) -> list[str]:
    """Name groups, then kinds."""
    return [*facts["groups"], *facts["kinds"]]


def _overall(facts: Facts, detector: str) -> float:
    """Give what detectors are ranked by: recall over all kinds, or the area under the curve where no list is known."""
    found, at = facts["results"][detector]["all"], facts["strengths"].index(facts["strength"])
    triple = found["auc"][at] if facts["level"] is None else found["recall"][_level(facts)][at]
    return -1.0 if triple[0] is None else float(triple[0])


def _ranked(facts: Facts) -> list[str]:
    """Order the detectors, best first; equals stay in their order."""
    return sorted(facts["detectors"], key=lambda detector: -_overall(facts, detector))


def _drawn(facts: Facts) -> list[str]:
    return _ranked(facts)[: len(LINES)]


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(
    facts: Facts,
    order: Sequence[str],
    pick: Callable[[Any], Triple],
    write: Callable[[Any], str],
    shade: Callable[[float], float],
) -> dict[str, Any]:
    """Make a table of detectors x groups and kinds; the largest value of each column is its best."""
    columns, results = _columns(facts), facts["results"]
    rows: list[dict[str, Any]] = [
        {
            "name": detector,
            "cells": [_cell(pick(results[detector][name]), write, shade, name in facts["groups"]) for name in columns],
        }
        for detector in order
    ]
    for place in range(len(columns)):
        values = [row["cells"][place]["value"] for row in rows]
        most = max((value for value in values if value is not None), default=None)
        for row in rows:
            row["cells"][place]["best"] = most is not None and most > 0 and row["cells"][place]["value"] == most
    return {"columns": [_column(facts, name) for name in columns], "rows": rows}


def _cell(triple: Triple, write: Callable[[Any], str], shade: Callable[[float], float], wide: bool) -> Cell:
    value, low, high = triple
    if value is None:
        return {"text": "–", "range": "", "value": None, "shade": None, "best": False, "tip": "cannot be known"}
    ends = f"{_bare(write(low))}–{_bare(write(high))}"
    return {
        "text": _bare(write(value)),
        "range": ends if wide else "",
        "value": value,
        "shade": min(max(shade(value), 0.0), 1.0),
        "best": False,
        "tip": f"{write(value)}, {ends}",
    }


def _column(facts: Facts, name: str) -> dict[str, Any]:
    if name in facts["groups"]:
        return {"name": name, "sum": True, "tip": ", ".join(facts["groups"][name])}
    kind = facts["kinds"][name]
    at = facts["strengths"].index(facts["strength"])
    tip = f"{kind['about']}; in {kind['possible'][at]} of {facts['hosts']} hosts"
    return {"name": name, "sum": False, "tip": tip if kind["graded"] else f"{tip}; of one grade"}


def _halves(facts: Facts, order: Sequence[str]) -> dict[str, Any]:
    """Make the table of the strengths at which half are found; the smallest of a column is its best."""
    smallest, largest = facts["strengths"][0], facts["strengths"][-1]
    words = {"below": f"<\u2009{smallest:g}", "above": f">\u2009{largest:g}"}
    rank = {"below": 0.0, "above": np.inf}
    width = np.log(largest / smallest) or 1.0

    def write(value: Any) -> str:
        return words.get(str(value), "–") if value is None or isinstance(value, str) else f"{value:.2g}"

    def number(value: Any) -> float:
        return float(rank.get(value, value))

    def cell(name: str, found: Any) -> Cell:
        value, low, high = found["half"]
        if value is None or (name in facts["kinds"] and not facts["kinds"][name]["graded"]):
            return {
                "text": "–",
                "range": "",
                "value": None,
                "shade": None,
                "best": False,
                "tip": "of one grade, or unknown",
            }
        # What is known only to lie beyond the largest strength has no interval to speak of.
        ends = "" if value == "above" and low == "above" else f"{write(low)} – {write(high)}"
        place = 1.0 - np.log(np.clip(number(value), smallest, largest) / smallest) / width
        share = 0.0 if value == "above" else float(place)
        return {"text": write(value), "range": "", "value": number(value), "shade": share, "best": False, "tip": ends}

    columns = _columns(facts)
    results = facts["results"]
    rows: list[dict[str, Any]] = [
        {"name": one, "cells": [cell(name, results[one][name]) for name in columns]} for one in order
    ]
    for place in range(len(columns)):
        values = [row["cells"][place]["value"] for row in rows if row["cells"][place]["value"] is not None]
        least = min(values, default=np.inf)
        for row in rows:
            row["cells"][place]["best"] = row["cells"][place]["value"] == least < np.inf
    return {"columns": [_column(facts, name) for name in columns], "rows": rows}


def _strata(facts: Facts, order: Sequence[str]) -> dict[str, Any] | None:
    """Make the table of detectors x parts of the hosts, over all kinds."""
    if not facts["strata"]:
        return None
    measure = "auc" if facts["level"] is None else "recall"
    write, shade = (_auc, lambda value: 2.0 * value - 1.0) if measure == "auc" else (_percent, float)
    named = {"snr": "S/N", "z": "z"}
    columns = [
        {
            "name": f"{named.get(part['by'], part['by'])} {part['low']:.3g} to {part['high']:.3g}".replace("-", "−"),
            "hosts": part["hosts"],
        }
        for part in facts["strata"]
    ]
    rows = [
        {
            "name": detector,
            "cells": [_cell(part["results"][detector]["all"][measure], write, shade, True) for part in facts["strata"]],
        }
        for detector in order
    ]
    return {"measure": measure, "columns": columns, "rows": rows}


def _pointing(facts: Facts) -> dict[str, Any] | None:
    """Make the table of groups and kinds x explainers."""
    if not facts["pointing"]:
        return None
    rows = []
    for name in _columns(facts):
        cells = []
        for pointer in facts["pointing"]:
            found = pointer["results"][name]
            cell = _cell(found["share"], _percent, float, name in facts["groups"])
            # Better than chance, as surely as intervals say.
            cell["best"] = cell["value"] is not None and found["share"][1] > found["chance"]
            cell |= {"chance": _percent(found["chance"]), "tip": f"{found['hits']} of {found['explained']}"}
            cells.append(cell)
        rows.append({"name": name, "sum": name in facts["groups"], "cells": cells})
    return {"columns": [{"name": one["name"], "regions": one["regions"]} for one in facts["pointing"]], "rows": rows}


def _rare(facts: Facts, at: int) -> list[tuple[str, int]]:
    """List the kinds that less than half of the hosts allow."""
    numbers = [(name, kind["possible"][at]) for name, kind in facts["kinds"].items()]
    return [(name, number) for name, number in numbers if 2 * number < facts["hosts"]]


def _lists(facts: Facts) -> list[dict[str, Any]]:
    """Give recall of the best detectors at every level, and why a level is not known."""
    at = facts["strengths"].index(facts["strength"])
    told = []
    for level in facts["levels"]:
        key = f"{level:g}"
        cells = [
            _cell(facts["results"][one]["all"]["recall"][key][at], _percent, float, True) for one in _ranked(facts)
        ]
        reason = "" if facts["listed"][key] else f"cannot be known from {facts['background']:,} spectra"
        told.append({"level": _percent(level), "size": facts["listed"][key], "cells": cells, "reason": reason})
    return told


def _sentences(facts: Facts) -> list[dict[str, Any]]:
    """Say which detector is best at each group, and how sure that is."""
    words = {"all": "all kinds together", "objects": "odd objects", "artefacts": "artefacts"}
    told = []
    for group, best in facts["best"].items():
        if best is None:
            continue
        write = _auc if facts["level"] is None else _percent
        value, low, high = best["value"]
        sure = "" if best["leads"] is None else _percent(best["leads"])
        ends = f"{_bare(write(low))}–{write(high)}"
        named = {"group": words.get(group, group), "detector": best["detector"]}
        told.append({**named, "value": write(value), "ends": ends, "sure": sure})
    return told


def _percent(share: float | None) -> str:
    """Write a share as a percentage; small ones keep two significant digits."""
    if share is None:
        return "–"
    digits = ".0f" if share >= 0.0995 or share == 0 else ".2g"
    return f"{100 * share:{digits}}\u00a0%"


def _auc(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _bare(text: str) -> str:
    """Leave the percent sign to the caption."""
    return text.removesuffix("\u00a0%")


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(facts: Facts) -> dict[str, Any]:
    """Draw recall against strength, a panel for each group and each graded kind, a line for each of the best detectors.

    Where top lists are too short to be known, the area under the curve takes the place of recall.

    Returns:
        Bokeh models by the name of their place in the page; none where only one strength was planted.
    """
    names = _panels(facts)
    if not names:
        return {}
    across, upright = Range1d(*_ends(facts["strengths"])), Range1d(-0.03, 1.03)
    plots = []
    for name in names:
        plot = panel(190, "", "", x_axis_type="log", x_range=across, y_range=upright, title=name)
        plot.yaxis[0].formatter = NumeralTickFormatter(format="0.00" if facts["level"] is None else "0 %")
        plot.xaxis[0].ticker = [float(one) for one in facts["strengths"]]
        plot.xaxis[0].formatter = NumeralTickFormatter(format="0.[00]")
        if facts["level"] is None:
            plot.line([across.start, across.end], [0.5, 0.5], color="#aab2bc", line_dash="dashed")
        for detector, color in zip(_drawn(facts), LINES, strict=False):
            _curve(plot, facts, detector, name, color)
        plots.append(plot)
    return {"evaluation": stacked([plots[start : start + _ABREAST] for start in range(0, len(plots), _ABREAST)])}


def _panels(facts: Facts) -> list[str]:
    """Name the panels: what has more than one strength."""
    if len(facts["strengths"]) < 2:
        return []
    return [*facts["groups"], *(kind for kind, told in facts["kinds"].items() if told["graded"])]


def _ends(strengths: Sequence[float]) -> tuple[float, float]:
    margin = (strengths[-1] / strengths[0]) ** 0.04
    return strengths[0] / margin, strengths[-1] * margin


def _curve(plot: Any, facts: Facts, detector: str, name: str, color: str) -> None:
    found = facts["results"][detector][name]
    triples = found["auc"] if facts["level"] is None else found["recall"][_level(facts)]
    value, low, high = np.array(triples, dtype=np.float64).T  # None becomes NaN, which is a gap
    source = ColumnDataSource(
        {
            "strength": np.array(facts["strengths"], dtype=np.float64),
            "value": value,
            "low": low,
            "high": high,
            "detector": [detector] * len(value),
        }
    )
    plot.varea("strength", "low", "high", source=source, fill_color=color, fill_alpha=0.13)
    drawn = plot.line("strength", "value", source=source, color=color, line_width=1.8)
    plot.scatter("strength", "value", source=source, color=color, size=4)
    digits = "0.00" if facts["level"] is None else "0 %"
    tips = [
        ("", "@detector"),
        ("strength", "@strength"),
        (
            "found" if facts["level"] is not None else "AUC",
            f"@value{{{digits}}} (@low{{{digits}}} – @high{{{digits}}})",
        ),
    ]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips))


def picture(facts: Facts) -> Figure:
    """Draw the table of recall (or of the area under the curve) as one picture."""
    order, columns = _ranked(facts), _columns(facts)
    at = facts["strengths"].index(facts["strength"])
    picked = [[_value(facts, facts["results"][detector][name], at) for name in columns] for detector in order]
    values = np.array(picked, dtype=np.float64)
    known = facts["level"] is not None
    figure = Figure(figsize=(2.6 + 0.5 * len(columns), 1.9 + 0.32 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Greens", vmin=0.0 if known else 0.5, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right")
    axes.set_yticks(range(len(order)), order)
    for row, column in np.ndindex(*values.shape):
        text = "–" if np.isnan(values[row, column]) else f"{100 * values[row, column]:.0f}"
        dark = values[row, column] > (0.6 if known else 0.8)
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.axvline(len(facts["groups"]) - 0.5, color="white", linewidth=3)
    measure = f"recall in the top {_percent(facts['level'])}" if known else "area under the curve"
    axes.set_title(f"100 × {measure} at strength {facts['strength']:g}")
    return figure


def _value(facts: Facts, found: Any, at: int) -> Any:
    return found["auc"][at][0] if facts["level"] is None else found["recall"][_level(facts)][at][0]


# --- planted anomalies of a simulated survey -------------------------------------------------------------------------


def truth_section(job: Job) -> Section:
    """Compare scores and explanations with what a simulated survey planted."""
    # Imported here: reports on real surveys need nothing of the simulation.
    from distspec.sources.simulation.anomalies import ANOMALIES, STRONG

    scores, explanations = job.all_scores, job.have.explanations
    found = recovery(job.store, scores, _RECOVERED, job.distributions, job.fold("report"))
    order = {kind: place for place, kind in enumerate(ANOMALIES)}
    truth = {
        "recovery": found,
        "kinds": sorted(found.planted, key=lambda kind: (kind not in STRONG, order.get(kind, len(order)), kind)),
        "strong": STRONG,
        "best": found.best(STRONG),
        "pointing": [one for layer in explanations.values() for one in pointing(job.store, layer)],
    }
    shown = {"truth": truth, "names": scores.names}
    return Section("truth", "Planted anomalies", "evaluate/truth.html.jinja", shown)
