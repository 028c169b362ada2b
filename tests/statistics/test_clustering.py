"""Clusters of vectors against planted groups, and what is told of them against independent implementations."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import adjusted_rand_score, silhouette_samples, silhouette_score

from distspec.statistics import clustering
from distspec.statistics.clustering import (
    agreement_with,
    cluster,
    components_for,
    largest_groups,
    leaning,
    normalized,
    scan,
    silhouettes,
)

SIZES = (60, 45, 30, 20)


def planted(
    rng: np.random.Generator, sizes: tuple[int, ...] = SIZES, regions: int = 40, noise: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Make weights with one heavy region for each group, of any sign and size, in random order."""
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    weights = noise * rng.normal(size=(len(groups), regions))
    weights[np.arange(len(groups)), 7 * groups + 3] += rng.choice([-1.0, 1.0], len(groups))
    return (weights * rng.lognormal(0, 3, (len(groups), 1))).astype(np.float32), groups


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_vectors_have_unit_length_whatever_the_size_of_the_weights(rng: np.random.Generator) -> None:
    weights = rng.normal(size=(6, 9)).astype(np.float32)
    weights[4] = 0
    expected = (
        np.abs(weights.astype(float)) / np.maximum(np.linalg.norm(weights.astype(float), axis=1), 1e-300)[:, None]
    )
    np.testing.assert_allclose(normalized(weights), expected, rtol=1e-12)
    np.testing.assert_array_equal(normalized(weights)[4], 0)
    np.testing.assert_allclose(np.abs(normalized(weights, signed=True)), expected, rtol=1e-12)
    np.testing.assert_array_equal(np.sign(normalized(weights, signed=True)), np.sign(weights))
    np.testing.assert_array_equal(normalized(weights, "max")[[0, 1, 2, 3, 5]].max(axis=1), 1)
    np.testing.assert_array_equal(normalized(weights, "none", signed=True), weights)
    # Squares of these leave the range of floats.
    for scale in (1e-300, 1e300):
        np.testing.assert_allclose(normalized(weights.astype(float) * scale), expected, rtol=1e-12)
    assert normalized(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 4 weights"):
        normalized(np.array([[1.0, np.nan], [0.0, 2.0]]))


# --- clusters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["kmeans", "hdbscan"])
def test_planted_groups_are_found_and_numbered_by_size(rng: np.random.Generator, algorithm: str) -> None:
    weights, groups = planted(rng)
    found = cluster(normalized(weights), algorithm=algorithm, tried=(2, 9))
    np.testing.assert_array_equal(found.labels, groups)  # groups are the largest first, too
    np.testing.assert_array_equal(found.sizes, SIZES)
    assert found.noise == 0 and found.notes == ()
    vectors = normalized(weights)
    for label in range(len(SIZES)):
        np.testing.assert_allclose(found.centroids[label], vectors[groups == label].mean(axis=0), atol=1e-12)
        assert found.centroids[label].argmax() == 7 * label + 3
    np.testing.assert_allclose(found.distance, np.linalg.norm(vectors - found.centroids[groups], axis=1), atol=1e-12)
    np.testing.assert_allclose(found.silhouette, silhouette_samples(vectors, groups), atol=1e-12)
    assert (found.scan is not None) == (algorithm == "kmeans")
    if found.scan is not None:
        assert found.scan.best == len(SIZES)
        assert found.scan.k.tolist() == list(range(2, 10))


def test_the_same_seed_gives_the_same_clusters_in_any_order_of_rows(rng: np.random.Generator) -> None:
    vectors = normalized(planted(rng, noise=0.2)[0])
    first, again = (cluster(vectors, k=4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.labels, again.labels)
    order = rng.permutation(len(vectors))
    np.testing.assert_array_equal(cluster(vectors[order], k=4, seed=3).labels, first.labels[order])


def test_clusters_of_equal_size_are_numbered_by_their_first_member() -> None:
    vectors = np.eye(3)[[2, 0, 1, 1, 0, 2]]
    np.testing.assert_array_equal(cluster(vectors, k=3).labels, [0, 1, 2, 2, 1, 0])


def test_signs_part_what_raises_from_what_lowers_the_score() -> None:
    weights = np.zeros((20, 5), np.float32)
    weights[:, 2] = np.where(np.arange(20) < 12, 1, -1)
    weights[:, 0] = 0.01 * np.arange(20)
    assert len(cluster(normalized(weights, signed=True), k=2).centroids) == 2
    np.testing.assert_array_equal(
        cluster(normalized(weights, signed=True), k=2).labels, np.where(np.arange(20) < 12, 0, 1)
    )
    assert not np.array_equal(cluster(normalized(weights), k=2).labels, np.where(np.arange(20) < 12, 0, 1))


def test_a_row_without_weights_is_in_no_cluster_and_changes_none(rng: np.random.Generator) -> None:
    vectors = normalized(planted(rng)[0])
    whole = np.insert(vectors, [0, 17, 17, len(vectors)], 0.0, axis=0)
    blank = ~whole.any(axis=1)
    found = cluster(whole, k=4)
    np.testing.assert_array_equal(found.labels[blank], -1)
    np.testing.assert_array_equal(found.labels[~blank], cluster(vectors, k=4).labels)
    assert np.isnan(found.distance[blank]).all() and np.isnan(found.silhouette[blank]).all()
    assert found.noise == 4 and found.notes == ("spectra without any weight, which are in no cluster: 4",)


@pytest.mark.parametrize("algorithm", ["kmeans", "hdbscan"])
@pytest.mark.parametrize(
    ("vectors", "labels", "note"),
    [
        (np.zeros((0, 4)), [], None),
        (np.ones((1, 4)), [0], "only 1 explained: one cluster"),
        (np.eye(2), [0, 0], "only 2 explained: one cluster"),
        (np.ones((9, 4)), [0] * 9, "all 9 explanations are equal: one cluster"),
        (np.zeros((3, 4)), [-1] * 3, "spectra without any weight, which are in no cluster: 3"),
    ],
)
def test_too_little_for_clusters_is_one(algorithm: str, vectors: np.ndarray, labels: list[int], note: str) -> None:
    found = cluster(vectors, algorithm=algorithm)
    assert found.labels.tolist() == labels
    assert found.notes == (() if note is None else (note,))
    assert found.scan is None
    assert len(found.centroids) == (1 if 0 in labels else 0)
    assert np.isnan(found.silhouette).all()


def test_more_clusters_than_distinct_rows_are_not_made() -> None:
    vectors = np.eye(5)[[0, 0, 0, 1, 1, 2]]
    found = cluster(vectors, k=50)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert found.notes == ("3 distinct explanations: 3 clusters in place of 50",)
    scanned = cluster(vectors)
    assert scanned.scan is not None and scanned.scan.k.tolist() == [2, 3]
    assert scanned.notes == ("6 spectra, 3 of them distinct: no more than 3 clusters were tried",)
    assert scanned.labels.tolist() == [0, 0, 0, 1, 1, 2]
    # Where even the least k is too many, the largest possible one is taken.
    high = cluster(vectors, tried=(7, 9))
    assert high.scan is not None and high.scan.k.tolist() == [3]
    apart = cluster(np.eye(3))  # as many clusters as rows have no silhouette
    assert apart.scan is not None and apart.scan.k.tolist() == [2]
    assert apart.notes == ("3 spectra, 3 of them distinct: no more than 2 clusters were tried",)
    assert cluster(np.eye(3), k=3).labels.tolist() == [0, 1, 2]
    assert cluster(np.eye(3), k=1).labels.tolist() == [0, 0, 0]


def test_rows_that_differ_by_rounding_alone_raise_no_warning() -> None:
    vectors = 1.0 + 1e-16 * np.arange(60.0).reshape(20, 3)
    vectors[10:, 0] += 1e-15
    assert set(cluster(vectors, k=5).labels.tolist()) <= set(range(5))


def test_scattered_rows_are_noise_to_hdbscan(rng: np.random.Generator) -> None:
    weights, groups = planted(rng, (30, 20), regions=20, noise=0.01)
    lonely = np.zeros((4, 20), np.float32)
    lonely[np.arange(4), [0, 6, 13, 18]] = 1
    found = cluster(normalized(np.concatenate([weights, lonely])), algorithm="hdbscan", min_size=6)
    np.testing.assert_array_equal(found.labels, [*groups, -1, -1, -1, -1])
    assert found.noise == 4
    np.testing.assert_allclose(found.silhouette[:50], silhouette_samples(normalized(weights), groups), atol=1e-12)
    nothing = cluster(np.eye(20), algorithm="hdbscan", min_size=6)
    assert nothing.noise == 20 and len(nothing.centroids) == 0
    assert nothing.notes == ("no 6 spectra lie so close together that they are a cluster",)
    few = cluster(np.eye(4), algorithm="hdbscan", min_size=6)
    assert few.noise == 4


def test_a_scan_gives_the_inertia_and_silhouettes_of_its_labels(rng: np.random.Generator) -> None:
    vectors = normalized(planted(rng, noise=0.1)[0])
    found = scan(vectors, 2, 6, seed=4)
    for k, inertia, silhouette in zip(found.k.tolist(), found.inertia, found.silhouette, strict=True):
        one = cluster(vectors, k=k, seed=4)
        assert inertia == pytest.approx(((vectors - one.centroids[one.labels]) ** 2).sum(), rel=1e-9)
        assert silhouette == pytest.approx(silhouette_score(vectors, one.labels), abs=1e-12)
    assert (np.diff(found.inertia) < 0).all()
    assert found.best == found.k[found.silhouette.argmax()]
    assert found.sampled is None
    with pytest.raises(ValueError, match="at most 2"):
        scan(np.eye(3), 3, 5)


def test_silhouettes_of_many_rows_are_those_of_a_fixed_sample(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, labels = rng.normal(size=(300, 3)), rng.integers(-1, 3, 300)
    vectors[:, 0] += labels
    whole = silhouettes(vectors, labels)
    inside = labels >= 0
    np.testing.assert_allclose(whole[inside], silhouette_samples(vectors[inside], labels[inside]), atol=1e-12)
    assert np.isnan(whole[~inside]).all()
    monkeypatch.setattr(clustering, "EXACT", 150)
    part = silhouettes(vectors, labels, seed=1)
    chosen = np.flatnonzero(~np.isnan(part))
    assert len(chosen) == 150 and inside[chosen].all()
    np.testing.assert_allclose(part[chosen], silhouette_samples(vectors[chosen], labels[chosen]), atol=1e-12)
    np.testing.assert_array_equal(part, silhouettes(vectors, labels, seed=1))
    assert abs(np.nanmean(part) - np.nanmean(whole)) < 0.05
    assert scan(vectors, 2, 3).sampled == 150


# --- components ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(200, 12), (12, 200)])
def test_components_are_counted_as_their_singular_values_say(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    vectors = rng.normal(size=shape) * 0.7 ** np.arange(shape[1]) + 5
    variance = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2
    shares = np.cumsum(variance) / variance.sum()
    for share in (0.5, 0.9, 0.99):
        assert components_for(vectors, share) == int((shares < share).sum()) + 1


def test_rows_that_do_not_differ_have_no_component() -> None:
    assert (
        components_for(np.full((5, 3), 0.1)) == components_for(np.zeros((0, 3))) == components_for(np.ones((1, 3))) == 0
    )
    assert components_for(np.array([[1.0, 0.0], [0.0, 1.0]])) == 1


# --- exposures, properties, truth ------------------------------------------------------------------------------------


def test_a_cluster_from_one_plate_has_the_hypergeometric_chance(rng: np.random.Generator) -> None:
    labels = np.repeat([0, 1, -1], [50, 20, 30])
    keys = np.char.add("plate ", rng.integers(1, 9, 100).astype(np.str_))
    keys[50:65] = "plate 3"
    keys[[0, 1, 66]] = ""
    first, second = largest_groups(labels, keys)
    known = keys != ""
    spectra, members = int((keys == "plate 3").sum()), int((keys[50:70] == "plate 3").sum())
    p = stats.hypergeom.sf(members - 1, known.sum(), spectra, 19)
    assert (second.cluster, second.label, second.members, second.known) == (1, "plate 3", members, 19)
    assert second.share == pytest.approx(members / 19)
    assert second.expected == pytest.approx(spectra / known.sum())
    assert second.p == pytest.approx(p * len(np.unique(keys[known])), rel=1e-9)
    assert second.p < 1e-6 < 0.05 < first.p <= 1


def test_a_cluster_of_unknown_or_distinct_exposures_shares_none() -> None:
    (nothing,) = largest_groups(np.zeros(4, np.int64), np.array(["", "", "", ""]))
    assert (nothing.label, nothing.known, nothing.p) == (None, 0, 1.0)
    (apart,) = largest_groups(np.zeros(3, np.int64), np.array(["a", "b", "c"]))
    assert (apart.label, apart.known, apart.p) == (None, 3, 1.0)
    assert largest_groups(np.full(3, -1), np.array(["a", "a", "a"])) == []
    # All of one exposure is what every cluster would be.
    (same,) = largest_groups(np.zeros(3, np.int64), np.array(["a", "a", "a"]))
    assert (same.label, same.share, same.expected, same.p) == ("a", 1.0, 1.0, 1.0)


def test_random_clusters_seldom_share_an_exposure(rng: np.random.Generator) -> None:
    keys = np.char.add("plate ", rng.integers(0, 30, 400).astype(np.str_))
    found = [one.p for _ in range(60) for one in largest_groups(rng.integers(0, 3, 400), keys)]
    assert np.mean(np.array(found) < 0.05) < 0.08


def test_a_cluster_that_leans_is_told_by_kolmogorov_and_smirnov(rng: np.random.Generator) -> None:
    values = rng.random(400)
    labels = rng.integers(0, 3, 400)
    labels[values > 0.9] = 2
    values[:6] = np.nan
    labels[6:10] = 3  # fewer than five
    found = leaning(labels, values)
    known = np.sort(values[np.isfinite(values)])
    raw = []
    for label in range(3):
        mine = values[np.isfinite(values) & (labels == label)]
        ranks = np.searchsorted(known, mine)
        upper = np.searchsorted(np.sort(mine), mine, "right") / len(mine) - (ranks + 1) / len(known)
        lower = np.searchsorted(np.sort(mine), mine, "left") / len(mine) - ranks / len(known)
        raw.append(stats.kstwo.sf(max(np.abs(upper).max(), np.abs(lower).max()), len(mine)))
        assert found[label].known == len(mine)
        assert found[label].mean == pytest.approx(((ranks + 0.5) / len(known)).mean())
    expected = np.minimum(np.maximum.accumulate(np.sort(raw) * [3, 2, 1]), 1)[np.argsort(np.argsort(raw))]
    np.testing.assert_allclose([one.p for one in found[:3]], expected, rtol=1e-9)
    assert found[2].p < 0.01 and found[2].mean > 0.55
    assert (found[3].known, found[3].mean, found[3].p) == (4, None, None)
    assert leaning(labels, np.full(400, np.nan))[0].p is None
    assert all(one.p == 1 for one in leaning(labels, np.ones(400))[:3])  # ties tell nothing


def test_agreement_with_kinds_that_are_known() -> None:
    kinds = np.array(["a", "a", "b", "b", "c", "c", "a"])
    same = agreement_with(np.array([1, 1, 0, 0, 2, 2, -1]), kinds)
    assert (same.spectra, same.rand, same.homogeneity, same.completeness) == (6, 1.0, 1.0, 1.0)
    assert same.kinds == ("a", "b", "c")
    assert same.table.tolist() == [[0, 2, 0], [2, 0, 0], [0, 0, 2]]
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    joined = agreement_with(labels, kinds.astype(object))
    assert joined.rand == pytest.approx(adjusted_rand_score(kinds, labels))
    assert joined.homogeneity < 1 and joined.table.tolist() == [[2, 2, 0], [1, 0, 2]]
    alone = agreement_with(np.array([0]), ["a"])
    assert (alone.spectra, alone.rand, alone.table.tolist()) == (1, None, [[1]])
    assert agreement_with(np.zeros(0, np.int64), []).to_dict()["table"] == []
