"""`distspec cluster`: explanations -> groups of spectra that are odd for the same reason, and what is in each.

Spectra that are odd for the same reason have weights in the same places. The weights of each spectrum are divided by
their length and grouped by k-means or HDBSCAN. Of each group it tells the mean and median spectrum, mean weights,
where these peak, nearest members, lines, line-ratio classes, redshifts, S/N, and whether its members share an
exposure or an observed wavelength, as artefacts do.

    [cluster]
    k = 8                # none takes that of the best mean silhouette
    scan = [2, 23]       # of all k from the least to the largest
    algorithm = "hdbscan"
    min_size = 5         # of its clusters
    method = "lime"      # none takes the first of explain.methods
    score = "chi2"       # none takes the first of explain.scores

A mean silhouette near 1 says that groups lie apart, one near 0 that they run into each other. `signed = true` keeps
the signs of weights; the paper (Ortiz & Boquien) takes absolute values.

The folder that is printed holds `members.csv`, which lists who is where, and `clusters.json`. Other settings, or
other explanations, make another folder; the old one stays.

In the code: what is clustered fits in memory, a number for each region of some thousand spectra; the spectra
themselves are read in chunks. k-means and silhouettes stand in `statistics/clustering.py`, what members share in
`members.py`. `clusters.json` is written last, so what there is of it is whole; `section.py` says what it holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from distspec.addresses import Place
from distspec.config import Cluster, Experiment
from distspec.errors import ConfigError
from distspec.files import csv_text
from distspec.results import facts as on_disk
from distspec.results.explanations import region_of_pixel
from distspec.results.facts import Facts
from distspec.results.layout import cluster_folder
from distspec.results.lines import LineResults
from distspec.results.scores import list_length
from distspec.runtime.threads import one_thread
from distspec.spectra.segments import edges_of, fold
from distspec.stages.cluster.members import (
    axis_of,
    concentrations,
    counts_of,
    mean_of,
    moved,
    number,
    peaks,
    plain,
    planted,
    quantiles,
    stacks,
)
from distspec.stages.cluster.section import SCHEMA, content, figures, picture
from distspec.stages.stage import Job, Products, Section, Stage, State, stage_run
from distspec.statistics.clustering import EXACT, Clusters, components_for, leaning, normalized
from distspec.statistics.clustering import cluster as find_clusters
from distspec.store import Layer, SpectraStore

__all__ = ["ClusterStage", "cluster", "clustered_of"]

_TOLD: Final = 24
"""Clusters whose spectra are averaged, the largest; of others only numbers are told."""

_LISTED: Final = 20
"""Members of highest score that are named; all are in the table."""

_VARIANCE: Final = 0.9

_PROPERTIES: Final = ("z", "snr")

_COLUMNS: Final = ("ra", "dec", "z", "snr", "class", "subclass", "anomaly")
"""Catalogue columns of the table of members, where the store has them."""


class ClusterStage(Stage):
    """Explanations -> groups of spectra that are odd for the same reason."""

    name, uses = "cluster", ("ingest", "train", "score", "detect", "explain")

    def state(self, job: Job) -> State:
        """Look for the clusters of these explanations."""
        whole = self.find(job).clusters is not None
        return State(int(whole), 1, "clusterings", "" if whole else "these explanations are not clustered")

    def find(self, job: Job) -> Products:
        """Open the clusters of the explanations by the method that the settings name."""
        layer = job.have.explanations.get(_method(job.experiment))
        return job.have if layer is None else job.having(clusters=clustered_of(job.experiment, job.store, layer))

    def make(self, job: Job) -> Products:
        """Cluster."""
        method = _method(job.experiment)
        layer = job.have.explanations.get(method)
        if layer is None:
            job.scores  # noqa: B018 (says what is missing, if it is more than explanations)
            raise ConfigError(f"no explanations by {method!r} to cluster; run `distspec explain` first")
        return job.having(clusters=cluster(job.experiment, job.store, layer, job.have.lines))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the folder."""
        if made.clusters is not None:
            yield "clusters", str(made.clusters.folder)

    def sections(self, job: Job) -> Iterator[Section]:
        """Show the clusters."""
        if job.have.clusters is not None:
            facts = job.have.clusters.content
            yield Section(
                "clusters", "Clusters", "cluster/section.html.jinja", {"clustered": content(facts)}, figures(facts)
            )


@one_thread()
def cluster(experiment: Experiment, store: SpectraStore, layer: Layer, lines: Layer | None = None) -> Facts:
    """Cluster the explanations of one score by one method; what is done is not done again.

    Arguments:
        experiment: with the cluster settings.
        store: the spectra.
        layer: of the explain stage: `row`, `rank` [scores] and `weights` [scores, regions], and `names` of the scores.
        lines: layer of lines measured in the same spectra; without it clusters are told without words about lines.

    Raises:
        ConfigError: the layer is of another method or has not the score, or nothing is explained.
        StoreError: explanations are not finished, or a file cannot be written.
        CheckpointError: what an earlier run left is damaged.
    """
    found = clustered_of(experiment, store, layer)
    if found is not None:
        return found
    listing = _listing(experiment, store, layer)
    folder = _folder(experiment, store, layer)
    lineage = {"store": store.digest, "explanations": layer.name, "model": str(layer.attributes.get("model", ""))}
    with stage_run(experiment, store, "cluster", folder.name, lineage) as run:
        facts, table = _clustered(experiment, store, layer, listing, lines)
        written = on_disk.write(folder, "clusters.json", facts, {"members.csv": table}, indent=None)
        run.metrics(_metrics(written.content))
        run.summary(written.content, "clusters.json")
        run.figure(picture(written.content), "clusters.png")
    return written


def clustered_of(experiment: Experiment, store: SpectraStore, layer: Layer) -> Facts | None:
    """Open the clusters of these explanations, if there are any.

    Raises:
        CheckpointError: the file is damaged.
    """
    return on_disk.find(_folder(experiment, store, layer), "clusters.json", SCHEMA, "cluster")


def _folder(experiment: Experiment, store: SpectraStore, layer: Layer) -> Place:
    return cluster_folder(experiment, store.digest, layer, _score(experiment))


def _score(experiment: Experiment) -> str:
    return experiment.cluster.score or experiment.explain.scores[0]


def _method(experiment: Experiment) -> str:
    return experiment.cluster.method or experiment.explain.methods[0].name


# --- what is clustered -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Listing:
    """The spectra that are clustered, that of highest score first.

    Arguments:
        rows: of the store.
        ranks: in the list of the score, from 0.
        weights: of their regions; those of pixels are added up over windows.
        edges: of the regions, Å.
        heaviest: centre of the region of largest |weight|, Å; NaN where all are zero.
        explained: spectra in the list.
        unknown: those that could not be explained.
    """

    rows: Int64[np.ndarray, "n"]
    ranks: Int64[np.ndarray, "n"]
    weights: Float64[np.ndarray, "n regions"]
    edges: Float64[np.ndarray, "regions+1"]
    heaviest: Float64[np.ndarray, "n"]
    explained: int
    unknown: int


def _listing(experiment: Experiment, store: SpectraStore, layer: Layer) -> _Listing:
    method, score, scores = _method(experiment), _score(experiment), list(layer.attributes["names"])
    if layer.attributes.get("method") != method:
        raise ConfigError(f"cluster.method is {method!r}; {layer.name} explains by {layer.attributes.get('method')!r}")
    if score not in scores:
        raise ConfigError(f"no explanations of score {score!r} to cluster; there are {', '.join(scores) or 'none'}")
    layer.require_finished("run `distspec explain` to finish it")
    place = scores.index(score)
    ranks = layer.read("rank")[:, place].astype(np.int64)
    inside = np.flatnonzero(ranks >= 0)
    order = inside[np.argsort(ranks[inside], kind="stable")]
    segment_of = region_of_pixel(store.grid, layer)
    parts = [np.zeros((0, int(segment_of[-1]) + 1))]
    for shard in range(layer.shards):
        # Shard by shard: weights of all pixels are many, and those of other scores are not asked for.
        weights = layer.read("weights", *layer.bounds(shard))[:, place].astype(np.float64)
        weights[~np.isfinite(weights)] = np.nan
        parts.append(fold(weights, segment_of)[0])
    weights = np.concatenate(parts[1:] or parts)[order]
    edges = edges_of(store.grid, fold(np.zeros(int(segment_of[-1]) + 1), segment_of)[1])
    known: Bool[np.ndarray, "n"] = np.asarray(np.isfinite(weights).all(axis=1))
    if not known.any():
        raise ConfigError(
            f"none of {len(order)} spectra of score {score!r} is explained by {method}: nothing to cluster"
        )
    order, weights = order[known], weights[known]
    taken = list_length(len(order), experiment.cluster.fraction)
    rows = layer.read("row")[order[:taken]]
    size = np.abs(weights[:taken])
    heaviest = np.where(size.any(axis=1), (0.5 * (edges[:-1] + edges[1:]))[size.argmax(axis=1)], np.nan)
    return _Listing(rows, ranks[order[:taken]], weights[:taken], edges, heaviest, len(known), int((~known).sum()))


def _clustered(
    experiment: Experiment, store: SpectraStore, layer: Layer, listing: _Listing, lines: Layer | None
) -> tuple[dict[str, Any], bytes]:
    """Make the content of clusters.json and of members.csv."""
    settings = experiment.cluster
    vectors = normalized(listing.weights, settings.normalize, settings.signed)
    found = find_clusters(
        vectors,
        algorithm=settings.algorithm,
        k=settings.k,
        tried=settings.scan,
        min_size=settings.min_size,
        seed=experiment.seed,
    )
    there = [name for name in _COLUMNS if name in store.column_names]
    columns: dict[str, Shaped[np.ndarray, "n"]] = {name: store.column(name, listing.rows) for name in there}
    ids = [str(value) for value in store.column("id", listing.rows)]
    scan = found.scan
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "store": store.digest,
        "frame": store.frame,
        "grid": asdict(store.grid),
        "layer": layer.name,
        "model": layer.attributes.get("model"),
        "method": _method(experiment),
        "score": _score(experiment),
        "settings": settings.model_dump(mode="json"),
        "explained": listing.explained,
        "unknown": listing.unknown,
        "clustered": len(listing.rows),
        "noise": found.noise,
        "notes": list(found.notes),
        "edges": plain(listing.edges, 9),
        "components": {"share": _VARIANCE, "number": components_for(vectors, _VARIANCE)},
        "silhouette": mean_of(found.silhouette),
        "sampled": EXACT if len(found.labels) - found.noise > EXACT else None,
        "scan": None
        if scan is None
        else {"k": scan.k.tolist(), "inertia": plain(scan.inertia), "silhouette": plain(scan.silhouette)},
        "properties": {name: axis_of(columns[name]) for name in _PROPERTIES if name in there},
    }
    facts["clusters"] = _each(store, listing, found, facts["properties"], columns, ids, settings)
    if lines is not None and "z" in columns:
        size = np.abs(normalized(listing.weights, settings.normalize, signed=True))
        _tell_lines(facts["clusters"], store, listing, found, columns["z"].astype(np.float64), size, lines)
    facts["concentrations"] = concentrations(experiment, store, listing.rows, found.labels, facts["clusters"])
    facts["truth"] = planted(store, listing.rows, found.labels)
    return facts, _members_csv(listing, found, columns, ids)


# --- what each cluster is --------------------------------------------------------------------------------------------


def _each(
    store: SpectraStore,
    listing: _Listing,
    found: Clusters,
    axes: dict[str, Any],
    columns: dict[str, Shaped[np.ndarray, "n"]],
    ids: Sequence[str],
    settings: Cluster,
) -> list[dict[str, Any]]:
    """Describe the clusters, the largest first."""
    told = min(len(found.centroids), _TOLD)
    spectra = stacks(store, listing.rows, found.labels, told)
    shape = normalized(listing.weights, settings.normalize, signed=True)
    leans = {name: leaning(found.labels, columns[name].astype(np.float64)) for name in axes}
    described = []
    for label, size in enumerate(found.sizes.tolist()):
        members = np.flatnonzero(found.labels == label)
        size_of = np.abs(shape[members]).mean(axis=0)
        most = float(size_of.max(initial=0.0)) or 1.0
        mean, signed = size_of / most, shape[members].mean(axis=0) / most
        nearest = members[np.argsort(found.distance[members], kind="stable")[: settings.nearest]]
        found_at = [asdict(one) for one in peaks(mean, signed, listing.edges, rest=store.frame == "rest")]
        described.append(
            {
                "label": label,
                "size": size,
                "share": size / len(listing.rows),
                "silhouette": mean_of(found.silhouette[members]),
                "distance": number(float(np.median(found.distance[members]))),
                "weights": {"mean": plain(mean), "signed": plain(signed)} if label < told else None,
                "spectrum": spectra[label] if label < told else None,
                "peaks": found_at,
                "moved": moved(listing.heaviest[members], columns["z"][members], store.frame)
                if "z" in columns
                else None,
                "nearest": [_member(listing, found, ids, place) for place in nearest.tolist()],
                "top": [_member(listing, found, ids, place) for place in members[:_LISTED].tolist()],
                "properties": {
                    name: quantiles(columns[name][members], axes[name]) | {"leaning": asdict(leans[name][label])}
                    for name in axes
                },
                "classes": counts_of(columns["class"][members]) if "class" in columns else None,
                "exposures": [],
                "text": None,
                "bpt": None,
            }
        )
    return described


def _tell_lines(
    clusters: list[dict[str, Any]],
    store: SpectraStore,
    listing: _Listing,
    found: Clusters,
    z: Float64[np.ndarray, "n"],
    size: Float64[np.ndarray, "n regions"],
    lines: Layer,
) -> None:
    """Say in words what lines the members of each cluster have, and count their classes by line ratios."""
    diagnosed = LineResults(store, lines)
    region = np.searchsorted(listing.edges[1:-1], store.grid.wave, side="right")
    pixels = np.maximum(np.bincount(region, minlength=size.shape[1]), 1)
    for one in clusters:
        members = np.flatnonzero(found.labels == one["label"])
        weights = (size[members].mean(axis=0) / pixels)[region]
        told = diagnosed.cluster(listing.rows[members], weights, z[members], listing.heaviest[members])
        one["text"], one["bpt"] = told.text, diagnosed.classes(listing.rows[members])


def _member(listing: _Listing, found: Clusters, ids: Sequence[str], place: int) -> dict[str, Any]:
    return {
        "row": int(listing.rows[place]),
        "id": ids[place],
        "rank": int(listing.ranks[place]),
        "distance": number(float(found.distance[place])),
    }


# --- tables and numbers ----------------------------------------------------------------------------------------------


def _members_csv(
    listing: _Listing, found: Clusters, columns: dict[str, Shaped[np.ndarray, "n"]], ids: Sequence[str]
) -> bytes:
    """List all that was clustered, cluster by cluster and by score; text is quoted, and ids are text."""
    header = ("cluster", "row", "id", "rank", "distance", "silhouette", "heaviest", *columns)
    last = len(found.centroids)
    order = np.lexsort((listing.ranks, np.where(found.labels < 0, last, found.labels)))
    told = [found.labels, listing.rows, np.asarray(ids, dtype=object), listing.ranks]
    told += [found.distance, found.silhouette, listing.heaviest, *columns.values()]
    return csv_text(header, zip(*(values[order] for values in told), strict=True)).encode()


def _metrics(facts: dict[str, Any]) -> dict[str, float]:
    """Choose the numbers that runs are compared by; what is unknown has no point."""
    truth = facts["truth"]
    told = {
        "clusters": len(facts["clusters"]),
        "clustered": facts["clustered"],
        "noise": facts["noise"],
        "silhouette": facts["silhouette"],
        "components": facts["components"]["number"],
        "largest": max((one["share"] for one in facts["clusters"]), default=None),
        "rand": None if truth is None else truth["planted"]["rand"],
    }
    return {name: float(value) for name, value in told.items() if value is not None}
