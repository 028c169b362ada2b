"""`distspec report`: everything -> one self-contained HTML page, and the ranked table as CSV.

The page holds its own code and loads nothing, so it can be kept and sent as one file. All text that comes from survey
files is escaped, and ids are text everywhere: a browser's numbers cannot hold them.
"""

import csv
import io
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Float64, Int64
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from distspec import __version__
from distspec.census import take_census
from distspec.config import Experiment, Prepare, Simulate, Tracking, dump
from distspec.detectors.model import ModelScores
from distspec.errors import CheckpointError, ConfigError, StoreError
from distspec.figures import COLORS, Shown, bokeh_script, embed, score_figure, spectrum_figure, training_figure
from distspec.layout import report_path, table_path
from distspec.models.checkpoint import Checkpoint
from distspec.ranking import distributions, listed, overlap, ranks, score_names, top_list
from distspec.reduce import Histogram
from distspec.sample import Statistics
from distspec.store import Layer, SpectraStore
from distspec.truth import has_truth, pointing, recovery, segment_edges, truth_windows

__all__ = ["report"]

_TOP: Final = 0.01
"""Share of the scored spectra in the lists whose threshold and overlap are shown."""

_RECOVERED: Final = 0.02
"""Share of the scored spectra in the lists in which planted anomalies are looked for."""

_NAMED: Final = 100
"""Spectra set aside that are listed by name; all are counted."""

_COLUMNS: Final = ("id", "file", "ra", "dec", "z", "class", "subclass", "snr", "coverage")
"""Catalogue columns of the ranked table."""


def report(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer, explanations: dict[str, Layer]
) -> Path:
    """Write the report and the ranked table of an experiment; each appears whole or not at all.

    Arguments:
        experiment: with the report settings.
        store: the spectra.
        checkpoint: the model that made the scores.
        scores: layer of the score stage.
        explanations: layers of the explain stage, by the score that they explain.

    Returns:
        Path of the page.

    Raises:
        ConfigError: the score that ranks does not exist.
        CheckpointError: the scores were made by another model.
        ShardError: a spectrum is neither scored nor set aside, or both.
        StoreError: the counts do not add up, or a file cannot be written.
    """
    names, chosen = score_names(scores), experiment.report.score
    _require_fit(chosen, store, checkpoint, scores)
    census = take_census(store, scores, _NAMED)
    histograms = distributions(scores)
    explained = _Explained(store, explanations, chosen)
    size = max(experiment.report.table, experiment.report.spectra, explained.longest)
    top = top_list(scores, chosen, min(size, census.scored), histograms[chosen])
    rows = _ranked(store, scores, top.rows, explained)
    cards = rows[: experiment.report.spectra]
    shown = _shown(experiment, store, checkpoint, [row["row"] for row in cards], explained)
    distribution, figures = _distribution(scores, histograms, census.scored)
    phases = {name: epochs for name, epochs in checkpoint.facts.get("phases", {}).items() if epochs}
    figures |= {f"training-{name}": training_figure(epochs) for name, epochs in phases.items()}
    figures |= {f"spectrum-{card['rank']}": spectrum_figure(item) for card, item in zip(cards, shown, strict=True)}
    script, places = embed(figures)
    page = _render(
        experiment=experiment,
        store=store,
        summary=_summary(experiment, store, checkpoint, scores),
        census=census,
        simulated=isinstance(experiment.ingest.source, Simulate),
        distribution=distribution,
        truth=_truth(store, scores, histograms, explanations),
        cards=cards,
        rows=rows[: experiment.report.table],
        ranked=len(rows),
        names=names,
        chosen=chosen,
        phases=list(phases),
        accuracy=checkpoint.facts.get("accuracy"),
        settings=dump(experiment.model_copy(update={"tracking": Tracking(model=experiment.tracking.model)})),
        places={name: Markup(place) for name, place in places.items()},
        scripts=Markup(bokeh_script() + script),
    )
    _write(table_path(experiment), _as_csv(rows, names))
    _write(report_path(experiment), page)
    return report_path(experiment)


def _require_fit(chosen: str, store: SpectraStore, checkpoint: Checkpoint, scores: Layer) -> None:
    """Refuse parts that do not belong together."""
    names = score_names(scores)
    if chosen not in names:
        raise ConfigError(f"report.score is {chosen!r}; expected one of {', '.join(names)}")
    checkpoint.require(store.grid, store.recipe)
    if scores.attributes.get("model") != checkpoint.sha256:
        raise CheckpointError(f"{scores.name} was not made by model {checkpoint.sha256[:12]}; score with this model")


class _Explained:
    """Finds the explanation of a row: that of the ranking score, else the first that holds the row."""

    def __init__(self, store: SpectraStore, layers: Mapping[str, Layer], chosen: str) -> None:
        ordered = sorted(layers, key=lambda name: name != chosen)
        self._rows = {name: layers[name].read("row") for name in ordered}
        self._weights = {name: layers[name].read("weights") for name in ordered}
        self._r2 = {name: layers[name].read("r2") for name in ordered}
        self._edges = {name: segment_edges(store.grid, layers[name]) for name in ordered}
        self._places = {name: {int(row): i for i, row in enumerate(rows)} for name, rows in self._rows.items()}
        self.longest = len(self._rows[chosen]) if chosen in self._rows else 0

    def find(self, row: int) -> "_Explanation | None":
        for name, places in self._places.items():
            if row in places:
                place = places[row]
                return _Explanation(name, self._edges[name], self._weights[name][place], float(self._r2[name][place]))
        return None


@dataclass(frozen=True)
class _Explanation:
    """Weights of one row, and the score that they explain."""

    score: str
    edges: Float64[np.ndarray, "segments+1"]
    weights: Float32[np.ndarray, "segments"]
    r2: float

    @property
    def heaviest(self) -> tuple[float, float, float]:
        """Wavelengths and weight of the segment of largest |weight|."""
        segment = int(np.abs(self.weights).argmax())
        return float(self.edges[segment]), float(self.edges[segment + 1]), float(self.weights[segment])


def _ranked(
    store: SpectraStore, scores: Layer, rows: Int64[np.ndarray, "m"], explained: _Explained
) -> list[dict[str, Any]]:
    """Describe the top rows, best first."""
    columns = {name: store.column(name, rows).tolist() for name in _COLUMNS}
    planted = store.column("anomaly", rows).tolist() if has_truth(store) else [None] * len(rows)
    values = {name: scores.take(name, rows) for name in score_names(scores)}
    standing = {name: ranks(scores, name, taken) for name, taken in values.items()}
    described = []
    for index, row in enumerate(rows.tolist()):
        entry: dict[str, Any] = {name: columns[name][index] for name in _COLUMNS}
        # As text from here on: neither a browser nor a spreadsheet keeps the digits of a large number.
        entry["id"] = str(entry["id"])
        entry |= {"rank": index + 1, "row": row, "planted": planted[index], "explanation": explained.find(row)}
        entry["scores"] = {name: float(taken[index]) for name, taken in values.items()}
        entry["ranks"] = {name: int(places[index]) for name, places in standing.items()}
        described.append(entry)
    return described


def _shown(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, rows: list[int], explained: _Explained
) -> list[Shown]:
    """Read and reconstruct the spectra that get a figure."""
    if not rows:
        return []
    spectra = store.take(np.array(rows, dtype=np.int64))
    models = ModelScores(checkpoint, experiment.score).reconstruct(spectra)
    windows = truth_windows(store, spectra.rows) if has_truth(store) else None
    found = []
    for index, row in enumerate(rows):
        explanation = explained.find(row)
        found.append(
            Shown(
                store.grid,
                store.frame,
                spectra.flux[index],
                spectra.ivar[index],
                models[index],
                None if spectra.redshift is None else float(spectra.redshift[index]),
                None if explanation is None else explanation.edges,
                None if explanation is None else explanation.weights,
                None if windows is None else windows[index],
            )
        )
    return found


def _distribution(
    scores: Layer, histograms: dict[str, Histogram], scored: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the top lists' thresholds and overlap, and the figures of the distributions."""
    size = listed(scored, _TOP)
    tops = {name: top_list(scores, name, size, histogram) for name, histogram in histograms.items()}
    limits = {name: float(top.scores[-1]) if size else float("nan") for name, top in tops.items()}
    figures = {f"score-{name}": score_figure(name, histograms[name], limits[name]) for name in histograms}
    return {"fraction": _TOP, "size": size, "overlap": overlap(tops).tolist()}, figures


def _truth(
    store: SpectraStore, scores: Layer, histograms: dict[str, Histogram], explanations: Mapping[str, Layer]
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
        "pointing": [pointing(store, layer) for layer in explanations.values()],
    }


def _plainly(value: Any) -> str:
    return "–".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _density(checkpoint: Checkpoint) -> str:
    """Say what density the latents have."""
    if checkpoint.density is None or checkpoint.density_settings is None:
        return "none"
    shape = checkpoint.density.flow.shape
    classes = f"{shape['classes']} classes" if shape["classes"] > 1 else "one class"
    layers = f", {shape['layers']} layers" if "layers" in shape else ""
    return f"{checkpoint.density_settings.kind} flow{layers}, {classes}"


def _summary(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer
) -> dict[str, list[tuple[str, str]]]:
    """Say in words what was run on what."""
    stages = "two-stage " if checkpoint.two_stage else ""
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    losses = [epoch["validation_loss"] for epoch in checkpoint.facts.get("phases", {}).get("first", [])]
    layout = ", ".join(f"{name} {_plainly(value)}" for name, value in checkpoint.settings if name != "kind")
    model = [
        ("Architecture", f"{stages}{checkpoint.settings.kind} autoencoder ({layout})"),
        ("Latents", str(checkpoint.latents)),
        ("Parameters", f"{parameters:,}"),
        ("Epochs trained", str(len(losses)) if losses else "unknown"),
        ("Best validation loss", f"{min(losses):.4f}" if losses else "unknown"),
        ("Density", _density(checkpoint)),
        ("Ranked by", experiment.report.score),
    ]
    made = [
        ("Store", store.digest),
        ("Recipe", store.recipe),
        ("Model", checkpoint.sha256[:12]),
        ("Scores", scores.name),
        ("Seed", str(experiment.seed)),
        ("distspec", __version__),
        *((package, metadata.version(package)) for package in ("torch", "numpy", "ray")),
        ("Written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    data = [
        ("Source", _source(experiment)),
        ("Spectra", f"{store.rows:,}"),
        *_recipe(experiment.ingest.prepare, store.statistics),
    ]
    return {"Data and recipe": data, "Model": model, "Provenance": made}


def _source(experiment: Experiment) -> str:
    source = experiment.ingest.source
    match source:
        case Simulate():
            share = f"{100 * source.anomalies:g} % with a planted anomaly"
            return f"simulated survey, seed {experiment.seed}; median S/N {source.snr:g}; {share}"
        case _:
            catalog = getattr(source, "catalog", None)
            return f"{source.kind}, {source.path}" + (f", catalogue {catalog}" if catalog else "")


def _recipe(prepare: Prepare, statistics: Statistics | None) -> list[tuple[str, str]]:
    """Say in words how the spectra were prepared."""
    grid, cuts, scale, dust = prepare.grid, prepare.cuts, prepare.normalize, prepare.dust
    limits = [f"coverage ≥ {100 * cuts.coverage_min:g} %"]
    if cuts.z_min is not None or cuts.z_max is not None:
        low, high = ("" if limit is None else f"{limit:g}" for limit in (cuts.z_min, cuts.z_max))
        limits.append(f"z in [{low or '−∞'}, {high or '∞'}]")
    limits += [f"S/N ≥ {cuts.snr_min:g}"] if cuts.snr_min else []
    limits += [f"total S/N ≥ {cuts.total_snr_min:g}"] if cuts.total_snr_min else []
    limits += [f"span ≥ {100 * cuts.span_min:g} %"] if cuts.span_min else []
    limits += [f"classes {', '.join(cuts.classes)}"] if cuts.classes else []
    limits += ["no redshift warning"] if cuts.zwarn else []
    limits += ["each id once"] if cuts.duplicates else []
    windows = ", ".join(f"{low:g}–{high:g} Å" for low, high in prepare.sky.windows)
    factors = {"wave": "around {:g} Å", "width": "width {:g} Å", "redshift": "at z = {:g}"}
    detail = [text.format(getattr(scale, key)) for key, text in factors.items() if hasattr(scale, key)]
    dusty = "none" if dust.kind == "none" else f"{dust.law}, E(B−V) from {dust.kind} × {dust.scale:g}"
    floor = "none" if prepare.max_pixel_snr is None else f"S/N ≤ {prepare.max_pixel_snr:g} per pixel"
    return [
        ("Frame", f"{prepare.frame} frame, vacuum"),
        ("Grid", f"{grid.scale}, {grid.first:g}–{grid.last:g} Å, {grid.pixels:,} pixels"),
        ("Normalization", ", ".join([scale.kind, *detail])),
        ("Sky", f"{prepare.sky.mode} {windows}" if prepare.sky.mode != "none" else "none"),
        ("Dust", dusty),
        ("Rebinning", prepare.rebin),
        ("Noise floor", floor),
        ("Sample", "nothing frozen" if statistics is None else repr(statistics)[len("Statistics(") : -1]),
        ("Cuts", "; ".join(limits)),
    ]


def _render(**content: Any) -> str:
    text = (resources.files("distspec.stages") / "report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "count": "{:,}".format, "percent": _percent, "redshift": _redshift}
    return environment.from_string(text).render(colors=COLORS, **content)


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


def _as_csv(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Write the ranked table; text is quoted and numbers are not, so a reader can tell an id from a number."""
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    last = ["explained_score", "heaviest_from", "heaviest_to", "heaviest_weight", "r2", "planted"]
    writer.writerow(["rank", "row", *_COLUMNS, *names, *last])
    for row in rows:
        explanation = row["explanation"]
        told: list[Any] = [""] * 5
        if explanation is not None:
            low, high, weight = explanation.heaviest
            told = [explanation.score, round(low, 2), round(high, 2), _short(weight), _short(explanation.r2)]
        described = [_short(row[name]) for name in _COLUMNS]
        values = [_short(row["scores"][name]) for name in names]
        writer.writerow([row["rank"], row["row"], *described, *values, *told, row["planted"] or ""])
    return stream.getvalue()


def _short(value: Any) -> Any:
    """Write what was a float32 with a float32's digits, others with all of theirs; NaN becomes an empty cell."""
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
