"""`distspec explain`: top rows and model -> weights per segment, in Ray actors.

The explained rows are a list of their own, best first, so the layer has its own leading axis; the field `row` leads
back to the store. A few spectra are one unit of work.
"""

import math

import numpy as np
from jaxtyping import Int64

from distspec.config import Experiment, Explain, Score
from distspec.detectors.model import ModelDetector, ModelScores
from distspec.errors import ConfigError
from distspec.explainers.lime import Lime, uniform_segments
from distspec.layout import explain_layer
from distspec.models.checkpoint import Checkpoint
from distspec.reduce import TopK
from distspec.runtime import connect, map_actors
from distspec.store import Fields, Layer, SpectraStore
from distspec.tracking import Run

__all__ = ["explain", "explanations_of"]

_SPECTRA = 16
"""Explanations in one unit of work."""


def explain(experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer) -> dict[str, Layer]:
    """Explain the top list of each score that the settings name, or finish doing so.

    Arguments:
        experiment: with the explain settings.
        store: the spectra.
        checkpoint: the model that made the scores.
        scores: layer of the score stage.

    Returns:
        For each score the layer with fields `row`, `weights` [segments], `intercept`, `r2`, `prediction`; its
        attribute `segment_of` gives each pixel's segment.

    Raises:
        ConfigError: nothing has a score.
    """
    return {name: _explain_score(experiment, store, checkpoint, scores, name) for name in experiment.explain.scores}


def explanations_of(experiment: Experiment, store: SpectraStore, scores: Layer) -> dict[str, Layer]:
    """Open the explanations that there are, by score."""
    names = {name: explain_layer(experiment, name, scores) for name in experiment.explain.scores}
    return {name: store.layer(layer) for name, layer in names.items() if layer in store.layers()}


def _explain_score(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint, scores: Layer, name: str
) -> Layer:
    settings = experiment.explain
    rows = _top_rows(scores, name, settings)
    segment_of = uniform_segments(store.grid.pixels, min(settings.segments, store.grid.pixels))
    segments = int(segment_of[-1]) + 1
    fields: Fields = {"row": ("i8", ()), "weights": ("f4", (segments,))}
    fields |= dict.fromkeys(("intercept", "r2", "prediction"), ("f4", ()))
    layer = store.create_layer(
        explain_layer(experiment, name, scores),
        fields,
        {"segment_of": segment_of.tolist(), "score": name, "scores": scores.name, "model": checkpoint.sha256},
        rows=len(rows),
        shard_rows=_SPECTRA,
    )
    pending = layer.pending()
    if not pending:
        return layer
    lineage = {"store": store.digest, "model": checkpoint.sha256, "scores": scores.name}
    connect(experiment.runtime, experiment.train.workers)
    with Run(experiment, "explain", layer.name.removeprefix("explain-"), lineage) as run:
        run.reads(experiment.name, store.digest, store.path)
        arguments = (store.path, checkpoint.folder, layer.name, name, experiment)
        items = [(shard, rows[slice(*layer.bounds(shard))]) for shard in pending]
        for _ in map_actors(LimeWorker, arguments, items, experiment.runtime, "explain"):
            pass
        r2 = layer.read("r2")
        run.metrics({"explained": len(rows), "median_r2": float(np.median(r2)), "smallest_r2": float(r2.min())})
    return layer


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
        device = "cuda" if experiment.runtime.gpus_per_worker else "cpu"
        scores = ModelScores(Checkpoint.load(folder), settings, device)
        self._detector = ModelDetector(scores, name)
        self._lime = Lime(experiment.explain, self._store.grid.pixels, experiment.seed)

    def __call__(self, item: tuple[int, Int64[np.ndarray, "k"]]) -> int:
        shard, rows = item
        explanation = self._lime.explain(self._detector.score, self._store.take(rows))
        fields = {key: getattr(explanation, key) for key in ("weights", "intercept", "r2", "prediction")}
        self._layer.write(shard, {"row": rows, **fields})
        return shard
