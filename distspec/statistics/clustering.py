"""Clusters of explanations: spectra that are odd for the same reason have similar weights over wavelength.

Pure functions of arrays. A row that is all zero has no direction; it is in no cluster, label -1.

References:
    Ortiz Manrique & Boquien 2025: absolute weights of unit length, k-means, k by inertia and silhouette.
    Rousseeuw 1987, J. Comput. Appl. Math. 20, 53: silhouettes.
    Campello, Moulavi & Sander 2013, PAKDD: HDBSCAN.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from sklearn import config_context
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, homogeneity_completeness_v_measure, silhouette_samples

from distspec.statistics import significance

__all__ = [
    "EXACT",
    "Agreement",
    "Clusters",
    "LargestGroup",
    "Leaning",
    "Scan",
    "agreement_with",
    "cluster",
    "components_for",
    "largest_groups",
    "leaning",
    "normalized",
    "scan",
    "silhouettes",
]

EXACT: Final = 10_000
"""Rows up to which silhouettes are those of all; of more, of a sample of so many."""

_STARTS: Final = 10

_MEMORY: Final = 128
"""MB of distances at a time."""

_FEWEST: Final = 5
"""Members whose property must be known for a test."""

Vectors = Float64[np.ndarray, "n regions"]

Labels = Int64[np.ndarray, "n"]

Values = Float64[np.ndarray, "n"]

Means = Float64[np.ndarray, "regions"]


def normalized(
    weights: Float[np.ndarray, "n regions"], kind: Literal["l2", "max", "none"] = "l2", signed: bool = False
) -> Vectors:
    """Divide the weights of each row by their size, so that their shape alone is compared; zero stays zero.

    Arguments:
        weights: of the regions of each spectrum.
        kind: of size: Euclidean length, largest |weight|, or none.
        signed: whether signs are kept; else absolute values are given.

    Raises:
        ValueError: a weight is not finite.

    """
    if not np.isfinite(weights).all():
        raise ValueError(f"{(~np.isfinite(weights)).sum()} of {weights.size} weights are not finite")
    values = weights.astype(np.float64)
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    if kind != "none":
        # By the largest first: squares of very small or large weights leave the range of floats.
        values = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    if kind == "l2":
        length = np.linalg.norm(values, axis=1, keepdims=True)
        values = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    return values if signed else np.abs(values)


# --- clusters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scan:
    """How well each number of clusters fits.

    Arguments:
        k: numbers of clusters.
        inertia: sum of squared distances to the centres.
        silhouette: mean over rows; NaN where it is not defined.
        sampled: rows that the silhouettes are of; None for all.
    """

    k: Int64[np.ndarray, "tried"]
    inertia: Float64[np.ndarray, "tried"]
    silhouette: Float64[np.ndarray, "tried"]
    sampled: int | None = None

    @property
    def best(self) -> int:
        """The k of the largest mean silhouette, the least of equals; the first where none is defined."""
        known = np.where(np.isnan(self.silhouette), -np.inf, self.silhouette)
        return int(self.k[known.argmax()])


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each row is in.

    Arguments:
        labels: from 0, the largest cluster; -1 for a row in none.
        centroids: mean of the members.
        distance: Euclidean, of each row to the centre of its cluster; NaN in none.
        silhouette: of each row; NaN in no cluster, where there is one only, or where it is not in the sample.
        scan: of k, where it was not given.
        noise: rows in no cluster.
        notes: sentences, on what was done otherwise than asked for.
    """

    labels: Labels
    centroids: Float64[np.ndarray, "k regions"]
    distance: Values
    silhouette: Values
    scan: Scan | None
    noise: int
    notes: tuple[str, ...]

    @property
    def sizes(self) -> Int64[np.ndarray, "k"]:
        """Number of members of each cluster."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.centroids)).astype(np.int64)


def cluster(
    vectors: Vectors,
    *,
    algorithm: Literal["kmeans", "hdbscan"] = "kmeans",
    k: int | None = None,
    tried: tuple[int, int] = (2, 23),
    min_size: int = 5,
    seed: int = 0,
) -> Clusters:
    """Find clusters of rows.

    Fewer than three rows that are not zero, or rows that are all equal, are one cluster.

    Arguments:
        vectors: of `normalized`.
        algorithm: that finds them.
        k: number of clusters of k-means; None takes that of those tried with the largest mean silhouette.
        tried: least and largest k that are tried.
        min_size: least members of a cluster of HDBSCAN.
        seed: of the first centres of k-means, and of the sample of silhouettes.
    """
    known = np.asarray((vectors != 0).any(axis=1))
    inside = vectors[known]
    distinct = len(np.unique(inside, axis=0)) if len(inside) else 0
    notes: list[str] = []
    if not known.all():
        notes.append(f"spectra without any weight, which are in no cluster: {(~known).sum()}")
    scanned: Scan | None = None
    found = np.zeros(len(inside), np.int64)
    if len(inside) < 3 or distinct == 1:
        if len(inside):
            why = f"only {len(inside)} explained" if len(inside) < 3 else f"all {len(inside)} explanations are equal"
            notes.append(f"{why}: one cluster")
    elif algorithm == "hdbscan":
        found = _hdbscan(inside, min_size)
    else:
        chosen, scanned = _number(inside, k, tried, seed, distinct, notes)
        found = _kmeans(inside, chosen, seed)[0]
    labels = np.full(len(vectors), -1, np.int64)
    labels[known] = _by_size(found)
    apart = np.full(len(vectors), np.nan)
    apart[known] = silhouettes(inside, labels[known], seed)
    if len(inside) and not (labels >= 0).any():
        notes.append(f"no {min_size} spectra lie so close together that they are a cluster")
    centroids, distance = _centroids(vectors, labels)
    return Clusters(labels, centroids, distance, apart, scanned, int((labels < 0).sum()), tuple(notes))


def scan(vectors: Vectors, lowest: int, highest: int, seed: int = 0) -> Scan:
    """Try numbers of clusters.

    Arguments:
        vectors: rows, none of them zero.
        lowest, highest: least and largest k; no k is tried for which there are too few distinct rows.
        seed: of the first centres, and of the sample that silhouettes are taken of where there are over 10,000 rows.

    Raises:
        ValueError: there are not as many distinct rows as clusters, or no more rows than clusters, for any k.
    """
    most = min(highest, len(np.unique(vectors, axis=0)), len(vectors) - 1)
    if not 2 <= lowest <= most:
        raise ValueError(f"{lowest} to {highest} clusters of {len(vectors)} rows, of which at most {most} can be made")
    tried = np.arange(lowest, most + 1)
    inertia, silhouette = np.zeros(len(tried)), np.full(len(tried), np.nan)
    for place, k in enumerate(tried.tolist()):
        labels, inertia[place] = _kmeans(vectors, k, seed)
        apart = silhouettes(vectors, labels, seed)
        silhouette[place] = apart[~np.isnan(apart)].mean() if not np.isnan(apart).all() else np.nan
    return Scan(tried, inertia, silhouette, EXACT if len(vectors) > EXACT else None)


def silhouettes(vectors: Vectors, labels: Labels, seed: int = 0) -> Values:
    """Tell for each row how much nearer its own cluster is than the next one: from -1 to 1.

    Exact for up to 10,000 rows in clusters; of more, for a sample of so many, among themselves.

    Arguments:
        vectors: rows.
        labels: -1 for those in no cluster.
        seed: of the sample.

    Returns:
        NaN in no cluster, outside the sample, and everywhere where there are not two clusters, or as many as rows.
    """
    found = np.full(len(labels), np.nan)
    chosen = np.flatnonzero(labels >= 0)
    if len(chosen) > EXACT:
        chosen = np.sort(np.random.default_rng([seed, EXACT]).choice(chosen, EXACT, replace=False))
    if 2 <= len(np.unique(labels[chosen])) < len(chosen):
        with config_context(working_memory=_MEMORY):
            found[chosen] = silhouette_samples(vectors[chosen], labels[chosen])
    return found


def _number(
    vectors: Vectors, k: int | None, tried: tuple[int, int], seed: int, distinct: int, notes: list[str]
) -> tuple[int, Scan | None]:
    """Choose k: as set, as far as there are rows, or that of the scan."""
    if k is not None:
        if k > distinct:
            notes.append(f"{distinct} distinct explanations: {distinct} clusters in place of {k}")
        return min(k, distinct), None
    lowest, highest = tried
    most = min(highest, distinct, len(vectors) - 1)
    if most < highest:
        notes.append(f"{len(vectors)} spectra, {distinct} of them distinct: no more than {most} clusters were tried")
    scanned = scan(vectors, min(lowest, most), most, seed)
    return scanned.best, scanned


def _kmeans(vectors: Vectors, k: int, seed: int) -> tuple[Labels, float]:
    with warnings.catch_warnings():
        # Rows that differ by rounding alone may share a centre; there are fewer clusters then.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = KMeans(k, random_state=seed, n_init=_STARTS).fit(vectors)
    return np.asarray(fit.labels_, np.int64), float(fit.inertia_)


def _hdbscan(vectors: Vectors, least: int) -> Labels:
    if len(vectors) < least:
        return np.full(len(vectors), -1, np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):  # densities of equal rows are infinite
        return np.asarray(HDBSCAN(min_cluster_size=least, copy=True).fit_predict(vectors), np.int64)


def _by_size(labels: Labels) -> Labels:
    """Number clusters by size, the largest 0; of equal ones that with the earlier first member comes first."""
    inside = labels >= 0
    _, first, place, sizes = np.unique(labels[inside], return_index=True, return_inverse=True, return_counts=True)
    number = np.empty(len(sizes), np.int64)
    number[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    found = np.full(len(labels), -1, np.int64)
    found[inside] = number[place]
    return found


def _centroids(vectors: Vectors, labels: Labels) -> tuple[Float64[np.ndarray, "k regions"], Values]:
    """Give the mean of the members of each cluster, and how far each row is from its own."""
    count = int(labels.max(initial=-1)) + 1
    inside = labels >= 0
    chosen = labels[inside]
    order, sizes = np.argsort(chosen, kind="stable"), np.bincount(chosen, minlength=count)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)
    sums = np.add.reduceat(vectors[inside][order], starts, axis=0) if count else np.zeros((0, vectors.shape[1]))
    centroids = sums / sizes[:, None]
    distance = np.full(len(labels), np.nan)
    distance[inside] = np.linalg.norm(vectors[inside] - centroids[chosen], axis=1)
    return centroids, distance


def components_for(vectors: Vectors, share: float = 0.9) -> int:
    """Count the principal components that hold a share of the variance; 0 where rows do not differ.

    References:
        Ortiz & Boquien: 35 components hold 90 % of the variance of 151 regions.
    """
    if not len(vectors):
        return 0
    centred = vectors - vectors.mean(axis=0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    variance = np.clip(np.linalg.eigvalsh(gram)[::-1], 0.0, None)
    total = variance.sum()
    # Rounding alone is no variance.
    if total <= 1e-24 * max(float((vectors**2).sum()), np.finfo(np.float64).tiny):
        return 0
    return int(np.searchsorted(np.cumsum(variance) / total, share - 1e-12)) + 1


@dataclass(frozen=True)
class LargestGroup:
    """Whether a cluster comes from one exposure, plate or night: the signature of an artefact.

    Arguments:
        cluster: its label.
        label: the one that the cluster holds most more of than chance brings; None where no two members share one.
        members: of the cluster with this label.
        known: members whose label is known.
        share: members / known.
        expected: the share among all rows.
        p: hypergeometric chance of so many members, corrected (Holm) for all labels.
    """

    cluster: int
    label: str | None
    members: int
    known: int
    share: float
    expected: float
    p: float


def largest_groups(labels: Labels, keys: Shaped[np.ndarray, "n"]) -> list[LargestGroup]:
    """Find for each cluster the exposure that it holds most more of than its size makes likely.

    Arguments:
        labels: of clusters, -1 for none; all rows are what a cluster is drawn from.
        keys: exposure (or plate, night) of each row as text, "" where it is unknown.

    References:
        `significance.concentration`: exact hypergeometric chances.
    """
    told = keys != ""
    names, counts = np.unique(keys[told], return_counts=True)
    found = []
    for number in range(int(labels.max(initial=-1)) + 1):
        mine = keys[told & (labels == number)]
        largest = significance.concentration(mine, names, counts.astype(np.int64)).largest if len(mine) else None
        if largest is None:
            found.append(LargestGroup(number, None, 0, len(mine), 0.0, 0.0, 1.0))
            continue
        shares = largest.members / len(mine), largest.expected / len(mine)
        found.append(LargestGroup(number, str(largest.label), largest.members, len(mine), *shares, largest.p))
    return found


@dataclass(frozen=True)
class Leaning:
    """Whether a cluster lies elsewhere in a property (redshift, S/N) than all rows do.

    Arguments:
        cluster: its label.
        known: members of known value.
        mean: share of all rows below a member, on average; None with fewer than five members of known value.
        p: Kolmogorov-Smirnov, corrected (Holm) for all clusters; None likewise.
    """

    cluster: int
    known: int
    mean: float | None
    p: float | None


def leaning(labels: Labels, values: Float[np.ndarray, "n"]) -> list[Leaning]:
    """Test each cluster's values of a property against those of all rows, by ranks; NaN is unknown.

    References:
        `significance.uniformity`.
    """
    known = np.isfinite(values)
    ordered = np.sort(values[known])
    tested: list[tuple[int, int, significance.Uniformity | None]] = []
    for number in range(int(labels.max(initial=-1)) + 1):
        mine = values[known & (labels == number)]
        below, upto = (np.searchsorted(ordered, mine, side).astype(np.int64) for side in ("left", "right"))
        enough = len(mine) >= _FEWEST
        tested.append(
            (number, len(mine), significance.uniformity(below, len(ordered), upto - below) if enough else None)
        )
    corrected = significance.holm(np.array([np.nan if one is None else one.p for _, _, one in tested]))
    return [
        Leaning(number, count, None if one is None else one.mean, None if one is None else float(p))
        for (number, count, one), p in zip(tested, corrected, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far clusters and known kinds are the same groups; rows in no cluster are left out.

    Arguments:
        spectra: compared.
        rand: adjusted Rand index, 1 for the same groups and 0 on average for random ones; None of fewer than two rows.
        homogeneity: 1 where every cluster holds one kind alone.
        completeness: 1 where all of a kind are in one cluster.
        kinds: columns of the table.
        table: members of each cluster, up to the last that has one, that are of each kind.
    """

    spectra: int
    rand: float | None
    homogeneity: float | None
    completeness: float | None
    kinds: tuple[str, ...]
    table: Int64[np.ndarray, "k kinds"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "kinds": list(self.kinds), "table": self.table.tolist()}


def agreement_with(labels: Labels, kinds: Sequence[str] | Shaped[np.ndarray, "n"]) -> Agreement:
    """Compare clusters with kinds that are known, such as those of planted anomalies.

    References:
        Hubert & Arabie 1985, J. Classif. 2, 193; Rosenberg & Hirschberg 2007, EMNLP, 410.
    """
    texts = np.asarray(kinds).astype(np.str_)
    inside: Bool[np.ndarray, "n"] = labels >= 0
    names, column = np.unique(texts[inside], return_inverse=True)
    table = np.zeros((int(labels.max(initial=-1)) + 1, len(names)), np.int64)
    np.add.at(table, (labels[inside], column), 1)
    told = tuple(str(name) for name in names)
    count = int(inside.sum())
    if count < 2:
        return Agreement(count, None, None, None, told, table)
    rand = float(adjusted_rand_score(column, labels[inside]))
    # Rounding may lift them above 1.
    homogeneity, completeness = np.clip(homogeneity_completeness_v_measure(column, labels[inside])[:2], 0, 1).tolist()
    return Agreement(count, rand, homogeneity, completeness, told, table)
