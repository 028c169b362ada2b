"""`distspec report`: everything -> one self-contained HTML page, and the ranked table as CSV.

The page holds its own code and loads nothing, so it can be kept and sent as one file. All text that comes from survey
files is escaped, and ids are text everywhere: a browser's numbers cannot hold them.
"""

import csv
import io
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Int64
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distspec import clustered as _clusters
from distspec import compared as _compared
from distspec import evaluated as _evaluated
from distspec.accuracy import ROWS
from distspec.census import take_census
from distspec.config import METRICS, RECONSTRUCTION, Experiment, Simulate, Tracking, dump, metric_scores
from distspec.curves import linear_figure, score_figure, training_figure
from distspec.detectors.model import DENSITY, ModelScores
from distspec.diagnosed import Diagnosed
from distspec.errors import CheckpointError, ConfigError, StoreError
from distspec.explained import Change, Explained, Ways, changes
from distspec.figures import COLORS, Shown, bokeh_script, embed, spectrum_figure, way_figure
from distspec.layout import report_path, table_path
from distspec.models.checkpoint import Checkpoint
from distspec.ranking import distributions, listed, overlap, ranks, spread, top_list
from distspec.reduce import Histogram
from distspec.runtime_threads import one_thread
from distspec.scores import Scores
from distspec.store import Layer, SpectraStore
from distspec.summary import phases, summarize_density, summary
from distspec.truth import has_truth, pointing, recovery, truth_windows

__all__ = ["report"]

_TOP: Final = 0.01
"""Share of the scored spectra in the lists whose threshold and overlap are shown."""

_RECOVERED: Final = 0.02
"""Share of the scored spectra in the lists in which planted anomalies are looked for."""

_NAMED: Final = 100
"""Spectra set aside that are listed by name; all are counted."""

_BARS: Final = 60
"""Of the distribution of a score on a linear axis."""

_LOGARITHMIC: Final = {*RECONSTRUCTION, *(name for metric in METRICS for name in metric_scores(metric))}
"""Scores that are positive and spread over decades."""

_COLUMNS: Final = ("id", "file", "ra", "dec", "z", "class", "subclass", "snr", "coverage")
"""Catalogue columns of the ranked table."""


@one_thread()
def report(
    experiment: Experiment,
    store: SpectraStore,
    checkpoint: Checkpoint,
    scores: Layer,
    explanations: dict[str, Layer],
    ascents: Layer | None = None,
    others: Iterable[Layer] = (),
    compared: Mapping[str, Any] | None = None,
    evaluated: Mapping[str, Any] | None = None,
    lines: Layer | None = None,
    clustered: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report and the ranked table of an experiment; each appears whole or not at all.

    Arguments:
        experiment: with the report settings.
        store: the spectra.
        checkpoint: the model that made the scores.
        scores: layer of the score stage.
        explanations: layers of the explain stage, by method.
        ascents: its layer of the ways to higher probability, if the model has a density.
        others: layers of the classical detectors and of the ensembles.
        compared: what the compare stage found.
        evaluated: what the evaluate stage measured.
        lines: layer of the lines of what is explained.
        clustered: what the cluster stage found.

    Returns:
        Path of the page.

    Raises:
        ConfigError: the score that ranks does not exist.
        CheckpointError: the scores were made by another model.
        ShardError: a spectrum is neither scored nor set aside, or both.
        StoreError: the counts do not add up, or a file cannot be written.
    """
    table, chosen = Scores([scores, *others]), experiment.report.score
    _require_fit(chosen, store, checkpoint, table)
    census = take_census(store, table, _NAMED)
    histograms = distributions(table)
    explained, ways = Explained(store, explanations, chosen), Ways(ascents)
    size = max(experiment.report.table, experiment.report.spectra, explained.longest)
    top = top_list(table, chosen, min(size, census.scored), histograms[chosen]).rows
    if experiment.explain.ids is not None and len(explained.rows):
        # Who names spectra wants to see these.
        top = explained.rows[np.argsort(-table.take(chosen, explained.rows), kind="stable")]
    rows = _ranked(store, table, chosen, top, explained, ways)
    cards = rows[: experiment.report.spectra]
    shown = _shown(experiment, store, checkpoint, [row["row"] for row in cards], explained, ways)
    distribution, figures = _distribution(table, histograms, census.scored)
    trained = phases(checkpoint)
    figures |= {f"training-{phase.name}": training_figure(phase.epochs) for phase in trained}
    diagnosed = None if lines is None else Diagnosed(store, lines)
    _tell_lines(store, diagnosed, rows[: max(experiment.report.table, len(cards))])
    for card, item in zip(cards, shown, strict=True):
        figures[f"spectrum-{card['row']}"] = spectrum_figure(item)
        if item.way is not None:
            card |= _against_noise(item, item.way)
            figures[f"way-{card['row']}"] = way_figure(item)
    if compared is not None:
        figures |= _compared.figures(compared)
    if evaluated is not None:
        figures |= _evaluated.figures(evaluated)
    if clustered is not None:
        figures |= _clusters.figures(clustered)
    if diagnosed is not None:
        figures |= diagnosed.figures()
    script, places = embed(figures)
    page = _render(
        experiment=experiment,
        store=store,
        summary=summary(experiment, store, checkpoint, scores),
        census=census,
        simulated=isinstance(experiment.ingest.source, Simulate),
        distribution=distribution,
        truth=_truth(store, table, histograms, explanations),
        compared=None if compared is None else _compared.content(compared),
        evaluated=None if evaluated is None else _evaluated.content(evaluated),
        clustered=None if clustered is None else _clusters.content(clustered),
        lines=None if diagnosed is None else diagnosed.content(),
        cards=cards,
        rows=rows[: experiment.report.table],
        ranked=len(rows),
        list_file=experiment.explain.ids,
        names=table.names,
        chosen=chosen,
        phases=trained,
        accuracy=checkpoint.facts.get("accuracy"),
        accuracy_rows=ROWS,
        density=summarize_density(checkpoint),
        ways=ways,
        settings=dump(experiment.model_copy(update={"tracking": Tracking(model=experiment.tracking.model)})),
        places={name: Markup(place) for name, place in places.items()},
        scripts=Markup(bokeh_script() + script),
    )
    classes = "posterior" in scores.fields
    _write(table_path(experiment), _as_csv(rows, table.names, ways=ascents is not None, classes=classes))
    _write(report_path(experiment), page)
    return report_path(experiment)


def _require_fit(chosen: str, store: SpectraStore, checkpoint: Checkpoint, scores: Scores) -> None:
    """Refuse parts that do not belong together."""
    if chosen not in scores.names:
        raise ConfigError(f"report.score is {chosen!r}; there are {', '.join(scores.names)}: run its stage first")
    checkpoint.require(store.grid, store.recipe)
    if scores.layers[0].attributes.get("model") != checkpoint.sha256:
        raise CheckpointError(f"{scores.key[0]} was not made by model {checkpoint.sha256[:12]}; score with this model")


def _ranked(
    store: SpectraStore, scores: Scores, chosen: str, rows: Int64[np.ndarray, "m"], explained: Explained, ways: Ways
) -> list[dict[str, Any]]:
    """Describe some rows; of equal scores those that come first have the smaller rank."""
    columns = {name: store.column(name, rows).tolist() for name in _COLUMNS}
    planted = store.column("anomaly", rows).tolist() if has_truth(store) else [None] * len(rows)
    values = {name: scores.take(name, rows) for name in scores.names}
    standing = {name: ranks(scores, name, taken) for name, taken in values.items()}
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


def _tell_lines(store: SpectraStore, diagnosed: Diagnosed | None, rows: list[dict[str, Any]]) -> None:
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


def _shown(
    experiment: Experiment,
    store: SpectraStore,
    checkpoint: Checkpoint,
    rows: list[int],
    explained: Explained,
    ways: Ways,
) -> list[Shown]:
    """Read and reconstruct the spectra that get a figure."""
    if not rows:
        return []
    spectra = store.take(np.array(rows, dtype=np.int64))
    models = ModelScores(checkpoint, experiment.score).reconstruct(spectra)
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


def _distribution(
    scores: Scores, histograms: dict[str, Histogram], scored: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the top lists' thresholds and overlap, and the figures of the distributions."""
    size = listed(scored, _TOP)
    tops = {name: top_list(scores, name, size, histogram) for name, histogram in histograms.items()}
    limits = {name: float(top.scores[-1]) if size else float("nan") for name, top in tops.items()}
    figures = {}
    for name, histogram in histograms.items():
        if name in _LOGARITHMIC:
            figures[f"score-{name}"] = score_figure(name, histogram, limits[name])
        else:
            title = f"{name} (−log p, nats)" if name == DENSITY else name
            figures[f"score-{name}"] = linear_figure(title, *spread(scores, name, _BARS), limits[name])
    return {"fraction": _TOP, "size": size, "overlap": overlap(tops).tolist()}, figures


def _truth(
    store: SpectraStore, scores: Scores, histograms: dict[str, Histogram], explanations: Mapping[str, Layer]
) -> dict[str, Any] | None:
    """Compare with what was planted; None where nothing is known."""
    if not has_truth(store):
        return None
    # Imported here: reports on real surveys need nothing of the simulation.
    from distspec.sources.anomalies import ANOMALIES, STRONG

    found = recovery(store, scores, _RECOVERED, histograms)
    order = {kind: place for place, kind in enumerate(ANOMALIES)}
    return {
        "recovery": found,
        "kinds": sorted(found.planted, key=lambda kind: (kind not in STRONG, order.get(kind, len(order)), kind)),
        "strong": STRONG,
        "best": found.best(STRONG),
        "pointing": [one for layer in explanations.values() for one in pointing(store, layer)],
    }


def _render(**content: Any) -> str:
    loader = PackageLoader("distspec", "stages")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "count": "{:,}".format, "percent": _percent, "redshift": _redshift}
    environment.filters |= {"probability": _probability, "abs_argmax": lambda weights: int(np.abs(weights).argmax())}
    return environment.get_template("report.html.jinja").render(colors=COLORS, **content)


def _number(value: float | None, digits: int = 4) -> str:
    """Write a number with some significant digits; a dash where it is unknown."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def _redshift(value: float) -> str:
    return f"{value:.5f}".replace("-", "−") if np.isfinite(value) else "–"


def _percent(share: float) -> str:
    """Write a share as a percentage; small ones keep two significant digits."""
    if not np.isfinite(share):
        return "–"
    digits = ".0f" if share >= 0.1 or share == 0 else ".2g"
    return f"{100 * share:{digits}}\u00a0%"


def _probability(value: float) -> str:
    """Write a probability as a percentage that is never surer than it is."""
    return ">\u00a099\u00a0%" if value >= 0.995 else _percent(value)


def _as_csv(rows: list[dict[str, Any]], names: list[str], *, ways: bool, classes: bool) -> str:
    """Write the ranked table; text is quoted and numbers are not, so a reader can tell an id from a number."""
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
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
    writer.writerow(["rank", "row", *_COLUMNS, *names, *more, *last])
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
        writer.writerow([row["rank"], row["row"], *described, *values, *best, *along, *told, row["planted"] or ""])
    return stream.getvalue()


def _way_cells(row: dict[str, Any]) -> list[Any]:
    """Tell of a row's way in five cells, empty where it was not followed."""
    if row["way"] is None:
        return [""] * 5
    start, end = row["way"].log_prob
    found: list[Change] = row["changes"]
    grows, fades = ("; ".join(one.label for one in found if (one.amount > 0) == rising) for rising in (True, False))
    return [row["way"].steps, _short(start), _short(end), grows, fades]


def _short(value: Any) -> Any:
    """Write what was a float32 with a float32's digits, others with all of theirs; NaN becomes an empty cell."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return value
    if not np.isfinite(value):
        return ""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _write(path: Path, text: str) -> None:
    """Write a file that appears whole: under another name first, then renamed over the old one."""
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}; choose another output") from error
    finally:
        partial.unlink(missing_ok=True)
