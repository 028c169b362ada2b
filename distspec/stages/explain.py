"""`distspec explain`: top rows and model -> weights per segment, and the way to higher probability, in Ray actors.

The explained rows are a list of their own, best first, so each layer has its own leading axis; the field `row` leads
back to the store. A few spectra are one unit of work.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from distspec.config import Ascent, Experiment, Explain, Score
from distspec.detectors import Detector
from distspec.detectors.fitted import FieldDetector, load_detector
from distspec.detectors.model import DENSITY, ModelDetector, ModelScores
from distspec.errors import CheckpointError, ConfigError
from distspec.explainers.ascent import ascend, growth
from distspec.explainers.lime import Lime, uniform_segments
from distspec.layout import ascent_layer, detector_folder, explain_layer
from distspec.models.checkpoint import Checkpoint
from distspec.reduce import TopK
from distspec.runtime import connect, map_actors
from distspec.scores import Scores
from distspec.store import Fields, Layer, SpectraStore
from distspec.tracking import Run

__all__ = ["ascents_of", "explain", "explanations_of", "follow", "ordinary_covariance"]

_SPECTRA: Final = 16
"""Spectra in one unit of work."""

_SAMPLE: Final = 20_000
"""Spectra whose latents say how far apart ordinary ones lie."""

_RUNS: Final = 20
"""Shards that they come from, evenly spaced."""

_ORDINARY: Final = 0.99
"""Share of them, those of highest density, that counts as ordinary."""


def explain(experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Scores) -> dict[str, Layer]:
    """Explain the top list of each score that the settings name, or finish doing so.

    Arguments:
        experiment: with the explain settings.
        store: the spectra.
        checkpoint: the model that made the scores.
        scores: those of the model and of the classical detectors.

    Returns:
        For each score the layer with fields `row`, `weights` [segments], `intercept`, `r2`, `prediction`; its
        attribute `segment_of` gives each pixel's segment.

    Raises:
        ConfigError: nothing has a score, or a score is not there.
    """
    for name in experiment.explain.scores:
        if name not in scores.names:
            there = ", ".join(scores.names)
            raise ConfigError(f"explain.scores names {name!r}; there are {there}: run its stage first")
    return {name: _explain_score(experiment, store, checkpoint, scores, name) for name in experiment.explain.scores}


def explanations_of(experiment: Experiment, store: SpectraStore, scores: Scores) -> dict[str, Layer]:
    """Open the explanations that there are, by score."""
    wanted = [name for name in experiment.explain.scores if name in scores.names]
    names = {name: explain_layer(experiment, name, scores.layer(name)) for name in wanted}
    return {name: store.layer(layer) for name, layer in names.items() if layer in store.layers()}


def _explain_score(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Scores, name: str
) -> Layer:
    settings, scored = experiment.explain, scores.layer(name)
    rows = _top_rows(scored, name, settings)
    segment_of = uniform_segments(store.grid.pixels, min(settings.segments, store.grid.pixels))
    segments = int(segment_of[-1]) + 1
    fields: Fields = {"row": ("i8", ()), "weights": ("f4", (segments,))}
    fields |= dict.fromkeys(("intercept", "r2", "prediction"), ("f4", ()))
    layer = store.create_layer(
        explain_layer(experiment, name, scored),
        fields,
        {"segment_of": segment_of.tolist(), "score": name, "scores": scored.name, "model": checkpoint.sha256},
        rows=len(rows),
        shard_rows=_SPECTRA,
    )

    def summary() -> dict[str, float]:
        r2 = layer.read("r2")
        return {"explained": len(rows), "median_r2": float(np.median(r2)), "smallest_r2": float(r2.min())}

    arguments = (store.path, checkpoint.folder, layer.name, name, experiment)
    _finish(experiment, store, layer, rows, LimeWorker, arguments, summary)
    return layer


def _finish(
    experiment: Experiment,
    store: SpectraStore,
    layer: Layer,
    rows: Int64[np.ndarray, "k"],
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    summary: Callable[[], dict[str, float]],
) -> None:
    """Let actors do what is left of a layer, and track it."""
    pending = layer.pending()
    if not pending:
        return
    lineage = {"store": store.digest, "model": layer.attributes["model"], "scores": layer.attributes["scores"]}
    connect(experiment.runtime, experiment.train.workers)
    with Run(experiment, "explain", layer.name.removeprefix("explain-"), lineage) as run:
        run.reads(experiment.name, store.digest, store.path)
        items = [(shard, rows[slice(*layer.bounds(shard))]) for shard in pending]
        label = layer.name.rpartition("-")[0].replace("-", " ")
        for _ in map_actors(worker, arguments, items, experiment.runtime, label):
            pass
        run.metrics(summary())


def _top_rows(scores: Layer, name: str, settings: Explain) -> Int64[np.ndarray, "k"]:
    """Find the rows to explain, best first, shard by shard."""
    scored = 0
    top = TopK.zero(settings.limit)
    for shard in range(scores.shards):
        start, stop = scores.bounds(shard)
        values = scores.read(name, start, stop)
        scored += int((~np.isnan(values)).sum())
        top += TopK.of(settings.limit, np.arange(start, stop), values)
    if scored == 0:
        raise ConfigError(f"no spectrum of layer {scores.name} has a score; there is nothing to explain")
    return top.rows[: max(1, math.ceil(settings.fraction * scored))]


class LimeWorker:
    """Explains a few spectra at a time; lives in a worker."""

    def __init__(self, store: str, folder: str, layer: str, name: str, experiment: Experiment) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer = self._store.layer(layer)
        settings: Score = experiment.score
        self._detector: Detector
        # A detector may give a second score, named after the first.
        classical = [one for one in experiment.detect.detectors if name in (one.name, f"{one.name}_mixture")]
        if classical:
            detector, _ = load_detector(detector_folder(experiment, classical[0], self._store.digest))
            self._detector = FieldDetector(detector, name)
        else:
            self._detector = ModelDetector(ModelScores(Checkpoint.load(folder), settings, _device(experiment)), name)
        self._lime = Lime(experiment.explain, self._store.grid.pixels, experiment.seed)

    def __call__(self, item: tuple[int, Int64[np.ndarray, "k"]]) -> int:
        shard, rows = item
        explanation = self._lime.explain(self._detector.score, self._store.take(rows))
        fields = {key: getattr(explanation, key) for key in ("weights", "intercept", "r2", "prediction")}
        self._layer.write(shard, {"row": rows, **fields})
        return shard


def _device(experiment: Experiment) -> str:
    return "cuda" if experiment.runtime.gpus_per_worker else "cpu"


# --- the way to higher probability -----------------------------------------------------------------------------------


def follow(experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer) -> Layer | None:
    """Follow the gradient of log p from the latents of the top lists, or finish doing so.

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
    rows = _rows_to_follow(scores, experiment.explain, settings)
    along, pixels = settings.steps + 1, store.grid.pixels
    fields: Fields = {"row": ("i8", ()), "taken": ("i8", ()), "growth": ("f4", (pixels,))}
    fields |= dict.fromkeys(("log_prob", "arc"), ("f4", (along,)))
    fields |= {"latents": ("f4", (along, checkpoint.latents)), "spectra": ("f4", (settings.points, pixels))}
    if len(density.names) > 1:
        fields |= {"class": ("i8", (2,)), "class_probability": ("f4", (2,))}
    attributes = {"scores": scores.name, "model": checkpoint.sha256, "classes": list(density.names)}
    name = ascent_layer(experiment, scores)
    layer = store.create_layer(name, fields, attributes, rows=len(rows), shard_rows=_SPECTRA)

    def summary() -> dict[str, float]:
        log_prob, taken = layer.read("log_prob"), layer.read("taken")
        gain = log_prob[:, -1] - log_prob[:, 0]
        unfinished = float((taken == settings.steps).mean())
        return {"followed": len(rows), "median_gain": float(np.median(gain)), "unfinished": unfinished}

    if layer.pending():
        arguments = (store.path, checkpoint.folder, scores.name, name, ordinary_covariance(scores), experiment)
        _finish(experiment, store, layer, rows, AscentWorker, arguments, summary)
    return layer


def ascents_of(experiment: Experiment, store: SpectraStore, scores: Layer) -> Layer | None:
    """Open the layer of the ways, if there is one."""
    name = ascent_layer(experiment, scores)
    wanted = experiment.explain.ascent is not None and DENSITY in scores.fields
    return store.layer(name) if wanted and name in store.layers() else None


def _rows_to_follow(scores: Layer, settings: Explain, ascent: Ascent) -> Int64[np.ndarray, "k"]:
    """Join the top lists, that of the density first; a row that is in several is followed once."""
    names = dict.fromkeys((DENSITY, *(name for name in settings.scores if name in scores.fields)))
    rows = np.concatenate([_top_rows(scores, name, settings)[: ascent.limit] for name in names])
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


class AscentWorker:
    """Follows a few spectra at a time; lives in a worker."""

    def __init__(
        self,
        store: str,
        folder: str,
        scores: str,
        layer: str,
        covariance: Float64[np.ndarray, "D D"],
        experiment: Experiment,
    ) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer, self._scored = self._store.layer(layer), self._store.layer(scores)
        checkpoint = Checkpoint.load(folder)
        if checkpoint.density is None or experiment.explain.ascent is None:
            raise CheckpointError(f"{folder} has no density, up which a way could lead; train with train.density")
        self._device = _device(experiment)
        self._model = ModelScores(checkpoint, experiment.score, self._device)
        self._density = checkpoint.density
        self._settings = experiment.explain.ascent
        self._covariance = torch.from_numpy(covariance)

    def __call__(self, item: tuple[int, Int64[np.ndarray, "k"]]) -> int:
        shard, rows = item
        # Those that were scored; in float64, so that no gain is lost in rounding.
        start = torch.from_numpy(self._scored.take("latents", rows)).double().to(self._device)
        settings = self._settings
        path = ascend(
            self._density.log_prob, start, steps=settings.steps, length=settings.length, covariance=self._covariance
        )
        decode = self._model.decoder(self._store.take(rows))
        ends = path.latents[:, [0, -1]]
        fields = {
            "log_prob": path.log_prob,
            "arc": path.arc,
            "latents": path.latents,
            "spectra": torch.stack([decode(place) for place in path.evenly(settings.points).unbind(1)], dim=1),
            "growth": growth(path, decode),
        }
        told = {name: _array(values) for name, values in fields.items()}
        told |= {"row": rows, "taken": path.taken.cpu().numpy()}
        if "class" in self._layer.fields:
            best = self._density.posterior(ends.flatten(0, 1)).max(dim=1)
            told |= {"class": best.indices.view(-1, 2).cpu().numpy()}
            told |= {"class_probability": _array(best.values.view(-1, 2))}
        self._layer.write(shard, told)
        return shard


def _array(values: Tensor) -> np.ndarray:
    return np.asarray(values.float().cpu().numpy())
