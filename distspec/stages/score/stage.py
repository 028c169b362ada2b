"""`distspec score`: store and checkpoint -> a layer with latents and all reconstruction scores, and their summaries.

One pass: each worker reads a shard, reconstructs it once, writes every score, and returns a summary that adds up.
"""

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from distspec.config import Experiment
from distspec.detectors.neural.scores import ERRORS, names_of
from distspec.errors import ShardError
from distspec.models.checkpoint import Checkpoint
from distspec.results.layout import score_layer
from distspec.results.scores import score_names
from distspec.runtime.tracking import Run
from distspec.runtime.workers import connect, map_shards
from distspec.spectra import first_reasons
from distspec.stages.score.workers import Scorer, ScoreSummary, summarize
from distspec.statistics.summaries import Histogram
from distspec.store import Fields, Layer, SpectraStore

__all__ = ["score"]


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
