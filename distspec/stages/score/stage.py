"""`distspec score`: store and checkpoint -> a layer with latents and all reconstruction scores, and their summaries.

A score is one number a spectrum, higher = odder; NaN where a spectrum is set aside. All come from one pass of the
model; those of residuals are defined as by Ortiz & Boquien:

    mse        squared error: root of the sum of (reconstruction - flux)²
    relative   the same, weighted by inverse flux
    chi2       chi-squared per good pixel
    density    -log p of the latents, where the model has a density

`mse` and `relative` also come as `_filtered` (without windows around emission lines, `score.filter_velocity`),
`_trimmed` (without the largest residuals, `score.trim_percentage`) and `_filtered_trimmed` (both). Ranks of one score
can be compared; magnitudes cannot, between scores or between spectra of very different coverage. Two more metrics add
eight scores each, with absolute residuals and with their power 0.33:

    [score]
    metrics = ["mad", "lp"]
    top = 1000           # length of the top lists in the summary

`score.checkpoint=FOLDER` scores with a model that was trained before, on spectra of the same recipe and grid.

What is scored is not scored again. After a store has grown only new spectra are scored. Another model, or other
settings of `score`, make another layer; the old one stays in the store.

In the code: one pass; each worker (`workers.py`) reads a shard, reconstructs it once, writes every score, and returns
a summary that adds up. The mathematics stands in `detectors/neural/reconstruction.py`.
"""

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from distspec.addresses import address_of
from distspec.config import Experiment
from distspec.detectors.neural.scores import ERRORS, names_of
from distspec.errors import ShardError
from distspec.models.checkpoint import Checkpoint
from distspec.results.layout import score_layer
from distspec.results.scores import score_names
from distspec.runtime.threads import one_thread
from distspec.runtime.workers import Cut, map_items
from distspec.spectra import first_reasons
from distspec.stages.score.section import sections
from distspec.stages.score.workers import Scorer, ScoreSummary, summarize
from distspec.stages.stage import Job, Products, Section, Stage, State, stage_run
from distspec.statistics.summaries import Histogram
from distspec.store import Fields, Layer, SpectraStore

__all__ = ["ScoreStage", "score"]


class ScoreStage(Stage):
    """Store and model -> latents and scores of every spectrum."""

    name, uses = "score", ("ingest", "train")

    def state(self, job: Job) -> State:
        """Count the shards that are scored."""
        layer = self.find(job).scores
        done = 0 if layer is None else layer.shards - len(layer.pending())
        grown = layer is not None and layer.shards < job.store.shards
        why = "" if done == job.store.shards else "the store has grown" if grown else "not all shards are scored"
        return State(done, job.store.shards, "shards", why if done else "not scored by this model")

    def find(self, job: Job) -> Products:
        """Open the layer of this model's scores."""
        if job.have.checkpoint is None:
            return job.have
        name = score_layer(job.experiment, job.have.checkpoint.sha256)
        return job.having(scores=job.store.layer(name)) if name in job.store.layers() else job.have

    def make(self, job: Job) -> Products:
        """Score, or finish doing so."""
        return job.having(scores=score(job.experiment, job.store, job.checkpoint))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the layer."""
        if made.scores is not None and made.store is not None:
            yield "scores", f"{made.store.path}/layers/{made.scores.name}"

    def sections(self, job: Job) -> Iterator[Section]:
        """Account for every spectrum, and show how scores are distributed."""
        yield from sections(job)


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
    with stage_run(experiment, store, "score", name.removeprefix("score-"), lineage, workers=True) as run:
        needs = experiment.runtime.needs("score")
        arguments = (store.address, address_of(checkpoint.folder), name, experiment.score, needs.device)
        cut = Cut(layer.bounds)
        parts = list(map_items(Scorer, arguments, pending, experiment.runtime, "score", needs=needs, cut=cut))
        # What an earlier, interrupted run has scored is summarized from the layer.
        done = sorted(set(range(layer.shards)) - set(pending))
        parts += [_summary_of_shard(store, layer, shard, experiment.score.top) for shard in done]
        summary = reduce(add, parts)
        if summary.scored + summary.set_aside != store.rows:
            raise ShardError(
                f"{summary.scored} scored + {summary.set_aside} set aside; the store has {store.rows} rows"
            )
        run.metrics({"scored": summary.scored, "set_aside": summary.set_aside})
        run.summary(_as_text(store, summary, len(layer.given_up())), "summary.json")
    return store.layer(name)


def _summary_of_shard(store: SpectraStore, layer: Layer, shard: int, top: int) -> ScoreSummary:
    start, stop = layer.bounds(shard)
    names = score_names(layer)
    usable = (store.status(start, stop) == 0) & ~np.isin(np.arange(start, stop), list(layer.given_up()))
    return summarize(
        np.arange(start, stop), dict(zip(names, layer.read_shard(shard, *names), strict=True)), usable, top
    )


def _as_text(store: SpectraStore, summary: ScoreSummary, given_up: int) -> dict[str, Any]:
    """Turn a summary into plain values; ids become text, which no reader can round. The reasons add up."""
    reasons = first_reasons(store.column("status")) | ({"GIVEN_UP": given_up} if given_up else {})
    tops = {}
    for name, top in summary.tops.items():
        ids = [str(value) for value in store.column("id", top.rows)]
        tops[name] = top.to_dict() | {"ids": ids}
    return {
        "spectra": store.rows,
        "scored": summary.scored,
        "set_aside": summary.set_aside,
        "set_aside_reasons": reasons,
        "top": tops,
        "histogram_edges": Histogram.edges().tolist(),
        "histograms": {name: histogram.counts.tolist() for name, histogram in summary.histograms.items()},
    }
