"""`distspec score`: store and checkpoint -> a layer with latents and all reconstruction scores, and their summaries.

One pass: each worker reads a shard, reconstructs it once, writes every score, and returns a summary that adds up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from distspec.config import Experiment, Score
from distspec.detectors.model import ERRORS, ModelScores, names_of
from distspec.errors import ShardError
from distspec.layout import score_layer
from distspec.models.checkpoint import Checkpoint
from distspec.reduce import Histogram, TopK
from distspec.runtime import connect, map_shards
from distspec.runtime_threads import one_thread
from distspec.scores import score_names
from distspec.spectra import first_reasons
from distspec.store import Fields, Layer, SpectraStore
from distspec.tracking import Run

__all__ = ["ScoreSummary", "score", "summarize"]


@dataclass(frozen=True)
class ScoreSummary:
    """Counts, distributions and top lists of all scores over some shards; adds up across shards."""

    scored: int
    set_aside: int
    histograms: dict[str, Histogram]
    tops: dict[str, TopK]

    def __add__(self, other: "ScoreSummary") -> "ScoreSummary":
        return ScoreSummary(
            self.scored + other.scored,
            self.set_aside + other.set_aside,
            {name: self.histograms[name] + other.histograms[name] for name in self.histograms},
            {name: self.tops[name] + other.tops[name] for name in self.tops},
        )


@one_thread()
def score(experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint) -> Layer:
    """Score a store with a model, or finish doing so.

    Raises:
        CheckpointError: the model was trained on another grid or recipe.
        ShardError: a spectrum that is not set aside has no finite score.
    """
    checkpoint.require(store.grid, store.recipe)
    name = score_layer(experiment, checkpoint.sha256)
    fields: Fields = {"latents": ("f4", (checkpoint.latents,))}
    fields |= dict.fromkeys((*names_of(checkpoint, experiment.score), *ERRORS), ("f4", ()))
    attributes: dict[str, Any] = {"model": checkpoint.sha256, "scores": list(names_of(checkpoint, experiment.score))}
    if checkpoint.density is not None and len(checkpoint.density.names) > 1:
        fields["posterior"] = ("f4", (len(checkpoint.density.names),))
        attributes["classes"] = list(checkpoint.density.names)
    layer = store.create_layer(name, fields, attributes)
    pending = layer.pending()
    if not pending:
        return layer
    lineage = {"store": store.digest, "model": checkpoint.sha256}
    connect(experiment.runtime, experiment.train.workers)
    with Run(experiment, "score", name.removeprefix("score-"), lineage) as run:
        run.reads(experiment.name, store.digest, store.path)
        device = "cuda" if experiment.runtime.gpus_per_worker else "cpu"
        arguments = (store.path, checkpoint.folder, name, experiment.score, device)
        parts = list(map_shards(Scorer, arguments, pending, experiment.runtime, "score"))
        # What an earlier, interrupted run has scored is summarized from the layer.
        done = sorted(set(range(layer.shards)) - set(pending))
        parts += [_summary_of_shard(store, layer, shard, experiment.score.top) for shard in done]
        summary = reduce(add, parts)
        if summary.scored + summary.set_aside != store.rows:
            raise ShardError(
                f"{summary.scored} scored + {summary.set_aside} set aside; the store has {store.rows} rows"
            )
        run.metrics({"scored": summary.scored, "set_aside": summary.set_aside})
        run.summary(_as_text(store, summary), "summary.json")
    return store.layer(name)


def _summary_of_shard(store: SpectraStore, layer: Layer, shard: int, top: int) -> ScoreSummary:
    start, stop = layer.bounds(shard)
    names = score_names(layer)
    usable = store.status(start, stop) == 0
    return summarize(
        np.arange(start, stop), dict(zip(names, layer.read_shard(shard, *names), strict=True)), usable, top
    )


def summarize(
    rows: Int64[np.ndarray, "n"],
    scores: Mapping[str, Float32[np.ndarray, "n"]],
    usable: Bool[np.ndarray, "n"],
    top: int,
) -> ScoreSummary:
    """Summarize the scores of some rows."""
    scored = int(usable.sum())
    columns = {name: np.where(usable, values, np.nan) for name, values in scores.items()}
    return ScoreSummary(
        scored,
        len(rows) - scored,
        {name: Histogram.of(column) for name, column in columns.items()},
        {name: TopK.of(top, rows, column) for name, column in columns.items()},
    )


def _as_text(store: SpectraStore, summary: ScoreSummary) -> dict[str, Any]:
    """Turn a summary into plain values; ids become text, which no reader can round."""
    tops = {}
    for name, top in summary.tops.items():
        ids = [str(value) for value in store.column("id", top.rows)]
        tops[name] = top.to_dict() | {"ids": ids}
    return {
        "spectra": store.rows,
        "scored": summary.scored,
        "set_aside": summary.set_aside,
        "set_aside_reasons": first_reasons(store.column("status")),
        "top": tops,
        "histogram_edges": Histogram.edges().tolist(),
        "histograms": {name: histogram.counts.tolist() for name, histogram in summary.histograms.items()},
    }


class Scorer:
    """Scores one shard after the other; lives in a worker."""

    def __init__(self, store: str, folder: str, layer: str, settings: Score, device: str) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer = self._store.layer(layer)
        self._scores = ModelScores(Checkpoint.load(folder), settings, device)
        self._top = settings.top

    def __call__(self, shard: int) -> ScoreSummary:
        spectra = self._store.read(shard)
        start, stop = self._layer.bounds(shard)
        usable = self._store.status(start, stop) == 0
        chosen = spectra if usable.all() else spectra[usable]
        names = self._scores.names
        values = np.full((len(spectra), len(names)), np.nan, np.float32)
        told = {
            name: np.full((len(spectra), *shape), np.nan, np.float32)
            for name, (_, shape) in self._layer.fields.items()
            if name not in names
        }
        if len(chosen):
            scored = self._scores(chosen)
            values[usable] = scored.scores
            for name in told:
                told[name][usable] = getattr(scored, name)
            odd = usable & ~np.isfinite(values).all(axis=1)
            if odd.any():
                error = ShardError(
                    f"row {spectra.rows[odd][0]} (and {int(odd.sum()) - 1} more of rows {start}-{stop}) has no finite "
                    "score although it is not set aside; look at its flux, or cut it by the recipe"
                )
                error.rows = (start, stop)
                raise error
        columns = {name: np.ascontiguousarray(values[:, index]) for index, name in enumerate(names)}
        self._layer.write(shard, told | columns)
        return summarize(spectra.rows, columns, usable, self._top)
