"""The ranked spectra: what the table says of each, and the cards of the first of them with their figures."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Int64

from distspec.config import Simulate
from distspec.detectors.neural.scores import ModelScores
from distspec.files import csv_text
from distspec.results.ascents import Ascents
from distspec.results.explanations import Explanations
from distspec.results.figures.spectrum import Shown, spectrum_figure, way_figure
from distspec.results.lines import LineResults
from distspec.results.scores import Fold, Scores, ranks, top_list
from distspec.results.truth import has_truth, truth_windows
from distspec.spectra.lines.changes import Change, changes
from distspec.stages.stage import Job, Section
from distspec.store import Layer, SpectraStore

__all__ = ["Ranked", "cards_section", "rank", "ranked_csv", "table_section"]

_COLUMNS: Final = ("id", "file", "ra", "dec", "z", "class", "subclass", "snr", "coverage")
"""Catalogue columns of the ranked table."""


@dataclass(frozen=True)
class Ranked:
    """The spectra of the table.

    Arguments:
        rows: what is said of each, the oddest first.
        explained: explanations of all that were explained.
        ascents: their ascents of the density.
    """

    rows: list[dict[str, Any]]
    explained: Explanations
    ascents: Ascents


def rank(job: Job) -> Ranked:
    """Rank the spectra of the list by the score that the settings name, and say what is known of each."""
    experiment, store, table, chosen = job.experiment, job.store, job.all_scores, job.experiment.report.score
    explained, ascents = Explanations(store, job.have.explanations, chosen), Ascents(job.have.ascents)
    size = max(experiment.report.table, experiment.report.spectra, explained.longest)
    fold = job.fold("report")
    top = top_list(table, chosen, min(size, job.scored), job.distributions[chosen], fold).rows
    if experiment.explain.ids is not None and len(explained.rows):
        # Who names spectra wants to see these.
        top = explained.rows[np.argsort(-table.take(chosen, explained.rows), kind="stable")]
    rows = _ranked(store, (table, chosen, fold), top, explained, ascents)
    lines = None if job.have.lines is None else LineResults(store, job.have.lines)
    _tell_lines(store, lines, rows[: max(experiment.report.table, experiment.report.spectra)])
    return Ranked(rows, explained, ascents)


def cards_section(job: Job, ranked: Ranked) -> Section:
    """Show the first spectra, each on a card with its figures."""
    experiment, store = job.experiment, job.store
    cards = ranked.rows[: experiment.report.spectra]
    figures: dict[str, Any] = {}
    for card, item in zip(cards, _shown(job, [row["row"] for row in cards], ranked), strict=True):
        figures[f"spectrum-{card['row']}"] = spectrum_figure(item)
        if item.way is not None:
            card |= _against_noise(item, item.way)
            figures[f"way-{card['row']}"] = way_figure(item)
    shown = {
        "cards": cards,
        "chosen": experiment.report.score,
        "names": job.all_scores.names,
        "scored": job.scored,
        "list_file": experiment.explain.ids,
        "simulated": isinstance(experiment.ingest.source, Simulate),
        "truth": has_truth(store),
        "ascents": ranked.ascents,
        "kind": _kind_of_class(job),
    }
    return Section("anomalies", "Top anomalies", "report/cards.html.jinja", shown, figures)


def table_section(job: Job, ranked: Ranked) -> Section:
    """Show the ranked table."""
    experiment = job.experiment
    shown = {
        "rows": ranked.rows[: experiment.report.table],
        "ranked": len(ranked.rows),
        "carded": min(experiment.report.spectra, len(ranked.rows)),
        "chosen": experiment.report.score,
        "list_file": experiment.explain.ids,
        "truth": has_truth(job.store),
        "likeliest": _kind_of_class(job),
        "piece": "block" if isinstance(experiment.ingest.source, Simulate) else "file",
    }
    return Section("table", "Ranked table", "report/table.html.jinja", shown)


def _kind_of_class(job: Job) -> str:
    """Say what the density's classes are; nothing where it knows one only."""
    density, settings = job.checkpoint.density, job.checkpoint.density_settings
    if density is None or settings is None or len(density.names) == 1:
        return ""
    return "class" if settings.labels else "component"


def _ranked(
    store: SpectraStore,
    ranking: tuple[Scores, str, Fold],
    rows: Int64[np.ndarray, "m"],
    explained: Explanations,
    ways: Ascents,
) -> list[dict[str, Any]]:
    """Describe some rows; of equal scores those that come first have the smaller rank."""
    scores, chosen, fold = ranking
    columns = {name: store.column(name, rows).tolist() for name in _COLUMNS}
    planted = store.column("anomaly", rows).tolist() if has_truth(store) else [None] * len(rows)
    values = {name: scores.take(name, rows) for name in scores.names}
    standing = ranks(scores, values, fold)
    likeliest, regions = _likeliest(scores.layers[0], rows), _deciding(scores, rows)
    earlier: Counter[int] = Counter()
    described = []
    for index, row in enumerate(rows.tolist()):
        entry: dict[str, Any] = {name: columns[name][index] for name in _COLUMNS}
        # As text from here on: neither a browser nor a spreadsheet keeps the digits of a large number.
        entry["id"] = str(entry["id"])
        entry |= {
            "rank": int(standing[chosen][index]) + earlier[int(standing[chosen][index])],
            "row": row,
            "planted": planted[index],
            "explanations": explained.all(row),
            "diagnosis": None,
        }
        earlier[int(standing[chosen][index])] += 1
        way = ways.find(row)
        redshift = None if store.frame == "rest" else entry["z"]
        found = [] if way is None else changes(way.growth, store.grid, redshift)
        entry |= {"likeliest": likeliest[index], "regions": regions[index], "way": way, "changes": found}
        entry["scores"] = {name: float(taken[index]) for name, taken in values.items()}
        entry["ranks"] = {name: int(places[index]) for name, places in standing.items()}
        described.append(entry)
    return described


def _likeliest(scores: Layer, rows: Int64[np.ndarray, "m"]) -> list[tuple[str, float] | None]:
    """Give the most probable class of each row and its probability; None where the density knows one class only."""
    if "posterior" not in scores.fields:
        return [None] * len(rows)
    posterior, names = scores.take("posterior", rows), scores.attributes["classes"]
    best = posterior.argmax(axis=1).tolist()
    return [(str(names[number]), float(posterior[index, number])) for index, number in enumerate(best)]


def _deciding(scores: Scores, rows: Int64[np.ndarray, "m"]) -> list[list[tuple[str, float, float, float]]]:
    """Name the region that decides each score by regions: score, ends in Å, and its chi-squared per pixel."""
    found: list[list[tuple[str, float, float, float]]] = [[] for _ in rows]
    for layer in scores.layers:
        if "regions" in layer.attributes:
            edges = layer.attributes["regions"]
            chi2 = layer.take("region_chi2", rows).tolist()
            for index, region in enumerate(layer.take("region", rows).tolist()):
                if region >= 0:
                    found[index].append((layer.attributes["scores"][0], *edges[region], chi2[index]))
    return found


def _tell_lines(store: SpectraStore, diagnosed: LineResults | None, rows: list[dict[str, Any]]) -> None:
    """Say in words what makes the spectra of the table odd, where they were explained and measured."""
    explained = [row for row in rows if row["explanations"]]
    if diagnosed is None or not explained:
        return
    spectra = store.take(np.array([row["row"] for row in explained], dtype=np.int64))
    for row, good in zip(explained, spectra.good, strict=True):
        found = diagnosed.one(row["row"], row["explanations"][0], good, row["z"])
        row["diagnosis"] = None if found is None else found.text


def _against_noise(shown: Shown, way: Float32[np.ndarray, "points pixels"]) -> dict[str, Any]:
    """Compare what changes along a way with the spectrum's own pixels: where it has data, and their noise."""
    growth, good = way[-1] - way[0], shown.ivar > 0
    found = changes(growth, shown.grid, shown.redshift, good)
    sigmas = np.abs(growth[good]) * np.sqrt(shown.ivar[good])
    return {"changes": found, "sigmas": float(sigmas.max(initial=0.0))}


def _shown(job: Job, rows: list[int], ranked: Ranked) -> list[Shown]:
    """Read and reconstruct the spectra that get a figure."""
    if not rows:
        return []
    store, explained, ways = job.store, ranked.explained, ranked.ascents
    spectra = store.take(np.array(rows, dtype=np.int64))
    models = ModelScores(job.checkpoint, job.experiment.score).reconstruct(spectra)
    windows = truth_windows(store, spectra.rows) if has_truth(store) else None
    found = []
    for index, row in enumerate(rows):
        found.append(
            Shown(
                store.grid,
                store.frame,
                spectra.flux[index],
                spectra.ivar[index],
                models[index],
                None if spectra.redshift is None else float(spectra.redshift[index]),
                tuple((one.method.replace("_", " "), one.edges, one.weights) for one in explained.all(row)),
                None if windows is None else windows[index],
                ways.decoded(row),
                tuple((name.replace("_", " "), widths, values) for name, widths, values in explained.windows(row)),
            )
        )
    return found


def ranked_csv(rows: list[dict[str, Any]], names: list[str], *, ways: bool, classes: bool) -> str:
    """Write the ranked table; text is quoted and numbers are not, so a reader can tell an id from a number."""
    lines = []
    last = [
        "suggests",
        "explained_by",
        "explained_score",
        "heaviest_from",
        "heaviest_to",
        "heaviest_weight",
        "r2",
        "planted",
    ]
    more = ["likeliest_class", "class_probability"] if classes else []
    more += ["steps", "log_p_start", "log_p_end", "grows", "fades"] if ways else []
    for row in rows:
        told: list[Any] = [row["diagnosis"] or "", *[""] * 6]
        if row["explanations"]:
            first = row["explanations"][0]
            low, high, weight = first.heaviest
            told[1:] = [first.method, first.score, round(low, 2), round(high, 2), _short(weight), _short(first.r2)]
        described = [_short(row[name]) for name in _COLUMNS]
        values = [_short(row["scores"][name]) for name in names]
        best = [row["likeliest"][0], _short(row["likeliest"][1])] if classes else []
        along = _way_cells(row) if ways else []
        lines.append([row["rank"], row["row"], *described, *values, *best, *along, *told, row["planted"] or ""])
    return csv_text(("rank", "row", *_COLUMNS, *names, *more, *last), lines)


def _way_cells(row: dict[str, Any]) -> list[Any]:
    """Tell of a row's way in five cells, empty where it was not followed."""
    if row["way"] is None:
        return [""] * 5
    start, end = row["way"].log_prob
    found: list[Change] = row["changes"]
    grows, fades = ("; ".join(one.label for one in found if (one.amount > 0) == rising) for rising in (True, False))
    return [row["way"].steps, _short(start), _short(end), grows, fades]


def _short(value: Any) -> Any:
    """Give what was a float32 as one, so that it is written with a float32's digits."""
    if not isinstance(value, float):
        return value
    single = np.float32(value)
    return single if float(single) == value else value
