"""`distspec explain`: top-ranked spectra -> the wavelengths that make them odd, lines, and the way to higher
probability.

It takes the top lists of `explain.scores`, by as many methods as you like. Each spectrum is explained for all scores
at once, since one pass makes them all.

    [explain]
    scores = ["chi2", "pca"]
    fraction = 0.01      # of the scored spectra, `limit` of them at most

    [[explain.methods]]
    kind = "lime"        # segments switched off at random, and a local
    settle = 0.05        # linear model; no more samples when errors are 5 %
                         # of the heaviest weight
    segments = { kind = "uniform", count = 125 }     # or "slic", "lines"
    perturbation = { kind = "reconstruction" }       # or scale, flat, mean,
                                                     # same_shape, gaussians,
                                                     # same
    [[explain.methods]]
    kind = "imo"         # Inverse Multiscale Occlusion: windows of the
    like = "redshift"    # spectrum put into ordinary ones, at all scales;
                         # ordinary ones of like redshift, or "class", "any"
    windows = [1, 4, 16, 64, 256]

The others are gradient, gradient_input, integrated_gradients, expected_gradients, ablation and occlusion; those with
a gradient need scores of the network. `explain.ids=mine.txt` (an id a line, or a table with a column `id`) explains,
follows and measures these spectra instead of the top lists.

A positive weight raises the score. LIME gives each weight its standard error, R², and the floor that the score's own
noise sets; IMO keeps every window size, and the report draws them all; gradients along a way tell by how much they
miss what they should add up to. A spectrum that fails is recorded with the reason and takes no other with it.

Emission lines (flux, equivalent width, velocity, broad components), Dn4000 and Hδ of all that is explained go to the
layer `lines-...`, and the report says of each spectrum which lines or regions drive it and what the numbers suggest.
Where the model has a density, the gradient of log p is followed from the latents of the top rows, too: the layer
`ascent-...` keeps log p, latents, spectra decoded along the way, and what grows or fades (`explain.ascent`; `false`
leaves it out).

What is explained is not explained again; other settings of a method make another layer beside it.

In the code: every method has one layer, `explain-...`. Its rows are the spectra that are explained, those of the
first score's top list first, so each layer has its own leading axis; the field `row` leads back to the store. A few
spectra are one unit of work, done in Ray actors (`workers.py`). Methods stand in `explainers/`. Where a network's
first and last layers are linear, versions of a spectrum are scored without writing them out, to rounding the same
(`detectors/neural/perturbed.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any, Final

import numpy as np
from jaxtyping import Float64, Int64

from distspec import explainers
from distspec.addresses import address_of
from distspec.config import AnyMethod, Ascent, Experiment, Imo
from distspec.detectors.neural.scores import DENSITY
from distspec.errors import ConfigError
from distspec.explainers.baselines import Baselines
from distspec.models.checkpoint import Checkpoint
from distspec.results.layout import ascent_layer, explain_layer, lines_layer
from distspec.results.lines import LineResults
from distspec.results.scores import Scores
from distspec.runtime.passes import folding
from distspec.runtime.threads import one_thread
from distspec.runtime.workers import Cut, map_items
from distspec.spectra.lines.tables import Indices, LineTable
from distspec.stages.explain.section import content, figures
from distspec.stages.explain.selection import SelectedRows, by_ids, name_of, top_lists, top_rows
from distspec.stages.explain.workers import AscentWorker, ExplainWorker, LineWorker, Unit
from distspec.stages.stage import Job, Products, Section, Stage, State, stage_run
from distspec.store import Fields, Layer, SpectraStore

__all__ = [
    "ExplainStage",
    "ascend",
    "ascents_of",
    "explain",
    "explanations_of",
    "lines_of",
    "measure_lines",
    "ordinary_covariance",
]

_SPECTRA: Final = 16
"""Spectra in one unit of work."""

_MEASURED: Final = 512
"""Spectra whose lines are measured in one unit of work."""

_SAMPLE: Final = 20_000
"""Spectra whose latents say how far apart ordinary ones lie."""

_RUNS: Final = 20
"""Shards that they come from, evenly spaced."""

_ORDINARY: Final = 0.99
"""Share of them, those of highest density, that counts as ordinary."""


class ExplainStage(Stage):
    """Top-ranked spectra -> the wavelengths that make them odd."""

    name, uses = "explain", ("ingest", "train", "score", "detect")

    def state(self, job: Job) -> State:
        """Count the methods by which all spectra of the lists are explained."""
        found, methods = self.find(job), job.experiment.explain.methods
        left = [one.name for one in methods if not _is_whole(found.explanations.get(one.name))]
        more = [found.lines, *([found.ascents] if _wants_ascents(job) else [])]
        lacking = not left and not all(_is_whole(layer) for layer in more)
        why = f"not explained by {', '.join(left)}" if left else "lines or ascents are not finished" if lacking else ""
        return State(len(methods) - len(left) - int(lacking), len(methods), "methods", why)

    def find(self, job: Job) -> Products:
        """Open the explanations, the lines of what is explained and the ascents that there are."""
        if job.have.scores is None:
            return job.have
        return job.having(
            explanations=explanations_of(job.experiment, job.store, job.table),
            lines=lines_of(job.experiment, job.store, job.table),
            ascents=ascents_of(job.experiment, job.store, job.scores),
        )

    def make(self, job: Job) -> Products:
        """Explain, measure lines and follow the density, or finish doing so."""
        experiment, store, checkpoint, table = job.experiment, job.store, job.checkpoint, job.table
        explanations = explain(experiment, store, checkpoint, table)
        lines = measure_lines(experiment, store, checkpoint, table, next(iter(explanations.values())))
        ascents = ascend(experiment, store, checkpoint, job.scores)
        return job.having(explanations=explanations, lines=lines, ascents=ascents)

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the layers."""
        if made.store is not None:
            folder = f"{made.store.path}/layers"
            for layer in made.explanations.values():
                yield "reasons", f"{folder}/{layer.name}"
            if made.lines is not None:
                yield "lines", f"{folder}/{made.lines.name}"
            if made.ascents is not None:
                yield "ascents", f"{folder}/{made.ascents.name}"

    def sections(self, job: Job) -> Iterator[Section]:
        """Show the lines of what is explained."""
        if job.have.lines is not None:
            lines = LineResults(job.store, job.have.lines)
            layers = {f"explained by {name}": layer for name, layer in job.have.explanations.items()}
            layers |= {"lines": job.have.lines} | ({} if job.have.ascents is None else {"ascent": job.have.ascents})
            lost = {row: f"{what}: {why}" for what, layer in layers.items() for row, why in layer.given_up().items()}
            shown = {"lines": content(lines, lost)}
            yield Section("lines", "Lines", "explain/section.html.jinja", shown, figures(lines))


def _is_whole(layer: Layer | None) -> bool:
    return layer is not None and not layer.pending()


def _wants_ascents(job: Job) -> bool:
    return job.experiment.explain.ascent is not None and job.checkpoint.density is not None


@one_thread()
def explain(experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Scores) -> dict[str, Layer]:
    """Explain the top lists of the scores that the settings name, or a list of ids, or finish doing so.

    Arguments:
        experiment: with the explain settings.
        store: the spectra.
        checkpoint: the model that made the scores.
        scores: those of the model and of the classical detectors.

    Returns:
        For each method the layer with fields `row`, `rank` [scores] (place in the list of each score, -1 outside it),
        `weights` [scores, regions], `reason` (why the method failed, and its numbers are NaN) and what else the method
        tells; its attribute `segment_of` gives each pixel's region, `names` those of the scores, `windows` the
        widths of the windows of Inverse Multiscale Occlusion.

    Raises:
        ConfigError: nothing has a score, a score is not there, or no id is known.
        SourceError: the list of ids cannot be read.
    """
    settings = experiment.explain
    for name in settings.scores:
        if name not in scores.names:
            known = ", ".join(scores.names)
            raise ConfigError(f"explain.scores names {name!r}; there are {known}: run its stage first")
    names = _names(experiment, scores)
    there = store.layers()
    done = {name: store.layer(layer) for name, layer in names.items() if layer in there}
    missing = [one for one in settings.methods if one.name not in done or done[one.name].pending()]
    if missing:
        chosen = _chosen(experiment, store, scores)
        # Of all methods, so that one that is done later has the same.
        ordinary = Baselines.of(store, chosen.rows, experiment.seed, settings.methods)
        made = {one.name: _layer_of(experiment, store, checkpoint, scores, one, len(chosen.rows)) for one in missing}
        methods = {layer.name: one for one, layer in zip(missing, made.values(), strict=True)}
        arguments = (store.address, address_of(checkpoint.folder), methods, ordinary, experiment)
        _finish(experiment, store, list(made.values()), chosen, ExplainWorker, arguments, _told)
        done |= made
    return {name: done[name] for name in names}


def explanations_of(experiment: Experiment, store: SpectraStore, scores: Scores) -> dict[str, Layer]:
    """Open the explanations that there are, by method."""
    if not set(experiment.explain.scores) <= set(scores.names):
        return {}
    names = _names(experiment, scores)
    return {name: store.layer(layer) for name, layer in names.items() if layer in store.layers()}


def _names(experiment: Experiment, scores: Scores) -> dict[str, str]:
    """Name the layer of each method."""
    settings = experiment.explain
    layers, listed = [scores.layer(name) for name in settings.scores], name_of(settings.ids)
    return {method.name: explain_layer(experiment, method, layers, listed) for method in settings.methods}


def _chosen(experiment: Experiment, store: SpectraStore, scores: Scores) -> SelectedRows:
    settings, fold = experiment.explain, folding(experiment.runtime, "explain")
    if settings.ids is not None:
        return by_ids(store, scores, settings.scores, settings.ids, fold)
    return top_lists(scores, settings.scores, settings.fraction, settings.limit, fold)


def _layer_of(
    experiment: Experiment,
    store: SpectraStore,
    checkpoint: Checkpoint,
    scores: Scores,
    method: AnyMethod,
    rows: int,
) -> Layer:
    """Open the layer of a method, or make it empty."""
    names = list(experiment.explain.scores)
    explainer = explainers.build(method, store.grid, experiment.seed, rest=store.frame == "rest")
    fields: Fields = {"row": ("i8", ()), "rank": ("i8", (len(names),)), "reason": ("string", ())}
    fields |= explainer.fields(len(names))
    attributes = {
        "method": method.name,
        "kind": method.kind,
        "segment_of": explainer.segment_of.tolist(),
        "windows": list(method.windows) if isinstance(method, Imo) else [],
        "names": names,
        "scores": " ".join(sorted({scores.layer(name).name for name in names})),
        "model": checkpoint.sha256,
    }
    name = _names(experiment, scores)[method.name]
    return store.create_layer(name, fields, attributes, rows=rows, shard_rows=_SPECTRA)


def _told(layer: Layer) -> dict[str, float]:
    """Sum up the explanations by a method."""
    reasons = layer.read("reason")
    told = {"explained": float(len(reasons)), "failed": float((reasons != "").sum())}
    for field in ("r2", "samples", "missing"):
        if field in layer.fields:
            told[f"median_{field}"] = float(np.nanmedian(layer.read(field)))
    return told


def _finish(
    experiment: Experiment,
    store: SpectraStore,
    layers: Sequence[Layer],
    chosen: SelectedRows,
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    summary: Callable[[Layer], dict[str, float]],
) -> None:
    """Let actors do what is left of some layers over the same spectra, and track each.

    An actor does units of all of them: its start, with the imports and the model, takes longer than many a method.
    """
    pending = {layer.name: layer.pending() for layer in layers}
    left = [layer for layer in layers if pending[layer.name]]
    if not left:
        return
    with ExitStack() as stack:
        runs = []
        for layer in left:
            lineage = {"store": store.digest, "model": layer.attributes["model"], "scores": layer.attributes["scores"]}
            key = layer.name.removeprefix("explain-")
            runs.append(stack.enter_context(stage_run(experiment, store, "explain", key, lineage, workers=True)))
        items = []
        for layer in left:
            for shard in pending[layer.name]:
                own = slice(*layer.bounds(shard))
                items.append((layer.name, shard, SelectedRows(chosen.rows[own], chosen.rank[own])))
        needs = experiment.runtime.needs("explain")
        if worker is LineWorker:
            needs = replace(needs, gpus=0.0)  # fits know no device
        label, cut = left[0].name.partition("-")[0], Cut(_places, _row)
        for _ in map_items(worker, arguments, items, experiment.runtime, label, needs=needs, cut=cut):
            pass
        for run, layer in zip(runs, left, strict=True):
            run.metrics(summary(layer))


def _places(item: Unit) -> tuple[int, int]:
    return 0, len(item[2].rows)


def _row(item: Unit, place: int) -> int:
    return int(item[2].rows[place])


# --- lines of what is explained --------------------------------------------------------------------------------------


@one_thread()
def measure_lines(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Scores, explained: Layer
) -> Layer:
    """Measure lines and indices of the spectra that are explained, or finish doing so.

    Arguments:
        experiment: with the explain settings.
        store: the spectra; measured as they stand before the statistics of the sample.
        checkpoint: the model that made the scores.
        scores: those that are explained.
        explained: the layer of one of the methods.

    Returns:
        The layer with `row` and the fields of `lines.LineTable` and `lines.Indices`; its attribute `lines` names the
        lines.
    """
    rows, name = explained.read("row"), _lines_name(experiment, scores)
    shapes: dict[str, tuple[int, ...]] = {field.name: () for field in (*fields(LineTable), *fields(Indices))}
    shapes |= dict.fromkeys(("flux", "flux_error", "width", "width_error", "continuum"), (len(LineTable.names),))
    kept: Fields = {"row": ("i8", ())} | {field: ("f4", shape) for field, shape in shapes.items()}
    attributes = {key: explained.attributes[key] for key in ("scores", "model")} | {"lines": list(LineTable.names)}
    layer = store.create_layer(name, kept, attributes, rows=len(rows), shard_rows=_MEASURED)

    def summary(layer: Layer) -> dict[str, float]:
        return {"measured": float(len(rows)), "with_lines": float(np.isfinite(layer.read("velocity")).sum())}

    chosen = SelectedRows(rows, np.zeros((len(rows), 0), np.int64))
    _finish(experiment, store, [layer], chosen, LineWorker, (store.address,), summary)
    return layer


def lines_of(experiment: Experiment, store: SpectraStore, scores: Scores) -> Layer | None:
    """Open the layer of the lines, if there is one."""
    if not set(experiment.explain.scores) <= set(scores.names):
        return None
    name = _lines_name(experiment, scores)
    return store.layer(name) if name in store.layers() else None


def _lines_name(experiment: Experiment, scores: Scores) -> str:
    settings = experiment.explain
    return lines_layer(experiment, [scores.layer(name) for name in settings.scores], name_of(settings.ids))


# --- the way to higher probability -----------------------------------------------------------------------------------


@one_thread()
def ascend(experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer) -> Layer | None:
    """Follow the gradient of log p from the latents of the top lists, or of a list of ids, or finish doing so.

    References:
        Böhm, Kim & Juneau (PAE), §4: sensitivity analysis.

    Returns:
        The layer with, along each way, `log_prob` and `arc` [steps + 1], `latents` [steps + 1, D], the number `taken`
        of steps that gained, `spectra` [points, pixels] decoded evenly from start to end, and `growth` [pixels], the
        last of them less the first; with classes the likeliest `class` and its `class_probability` at start and end
        [2]. None where the model has no density or the settings ask for no ascent.

    Raises:
        ConfigError: nothing has a score.
    """
    settings, density = experiment.explain.ascent, checkpoint.density
    if settings is None or density is None:
        return None
    rows = _rows_to_follow(experiment, store, scores, settings)
    along, pixels = settings.steps + 1, store.grid.pixels
    fields: Fields = {"row": ("i8", ()), "taken": ("i8", ()), "growth": ("f4", (pixels,))}
    fields |= dict.fromkeys(("log_prob", "arc"), ("f4", (along,)))
    fields |= {"latents": ("f4", (along, checkpoint.latents)), "spectra": ("f4", (settings.points, pixels))}
    if len(density.names) > 1:
        fields |= {"class": ("i8", (2,)), "class_probability": ("f4", (2,))}
    attributes = {"scores": scores.name, "model": checkpoint.sha256, "classes": list(density.names)}
    name = ascent_layer(experiment, scores, name_of(experiment.explain.ids))
    layer = store.create_layer(name, fields, attributes, rows=len(rows), shard_rows=_SPECTRA)

    def summary(layer: Layer) -> dict[str, float]:
        log_prob, taken = layer.read("log_prob"), layer.read("taken")
        gain = log_prob[:, -1] - log_prob[:, 0]
        unfinished = float((taken == settings.steps).mean())
        return {"followed": len(rows), "median_gain": float(np.median(gain)), "unfinished": unfinished}

    if layer.pending():
        arguments = (
            store.address,
            address_of(checkpoint.folder),
            scores.name,
            name,
            ordinary_covariance(scores),
            experiment,
        )
        chosen = SelectedRows(rows, np.zeros((len(rows), 0), np.int64))
        _finish(experiment, store, [layer], chosen, AscentWorker, arguments, summary)
    return layer


def ascents_of(experiment: Experiment, store: SpectraStore, scores: Layer) -> Layer | None:
    """Open the layer of the ways, if there is one."""
    name = ascent_layer(experiment, scores, name_of(experiment.explain.ids))
    wanted = experiment.explain.ascent is not None and DENSITY in scores.fields
    return store.layer(name) if wanted and name in store.layers() else None


def _rows_to_follow(
    experiment: Experiment, store: SpectraStore, scores: Layer, ascent: Ascent
) -> Int64[np.ndarray, "k"]:
    """Join the top lists, that of the density first; a row that is in several is followed once. A list of ids is
    followed in the place of them.
    """
    settings, table = experiment.explain, Scores([scores])
    fold = folding(experiment.runtime, "explain")
    if settings.ids is not None:
        return by_ids(store, table, (DENSITY,), settings.ids, fold).rows[: ascent.limit]
    names = list(dict.fromkeys((DENSITY, *(name for name in settings.scores if name in scores.fields))))
    lists = top_rows(table, names, settings.fraction, settings.limit, fold)
    rows = np.concatenate([one[: ascent.limit] for one in lists])
    return np.asarray(rows[np.sort(np.unique(rows, return_index=True)[1])])


def ordinary_covariance(scores: Layer) -> Float64[np.ndarray, "D D"]:
    """Give the covariance of the latents of ordinary spectra, from a sample of bounded size.

    The hundredth of the sample of lowest density is left out: outliers should not say how far apart others lie.
    """
    chosen = np.unique(np.linspace(0, scores.shards - 1, min(_RUNS, scores.shards)).astype(int))
    latents, density = [], []
    for shard in chosen.tolist():
        start, stop = scores.bounds(shard)
        stop = min(stop, start + _SAMPLE // len(chosen))
        latents.append(scores.read("latents", start, stop).astype(np.float64))
        density.append(scores.read(DENSITY, start, stop))
    joined, odd = np.concatenate(latents), np.concatenate(density)
    joined, odd = joined[~np.isnan(odd)], odd[~np.isnan(odd)]
    if len(odd) <= joined.shape[1]:
        return np.eye(joined.shape[1])
    ordinary = joined[odd <= np.quantile(odd, _ORDINARY)]
    return np.asarray(np.atleast_2d(np.cov(ordinary.T)))
