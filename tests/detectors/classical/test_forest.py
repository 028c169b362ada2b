"""The unsupervised forest against sums over all pairs, and the laws of its parts, looks and masks."""

import json
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from distspec.config import Forest
from distspec.detectors import Arrays
from distspec.detectors.classical.features import Features
from distspec.detectors.classical.forest import LeafCounts, UnsupervisedForest, synthesize
from distspec.detectors.classical.saved import load_detector, save_detector
from distspec.detectors.classical.trees import Trees
from distspec.errors import ConfigError, LayoutError
from distspec.spectra import Spectra, WaveGrid

pytestmark = pytest.mark.numeric

PIXELS = 24
GRID = WaveGrid.between("log", 3600.0, 7200.0, PIXELS)


def survey(rng: np.random.Generator, count: int, masked: float = 0.05) -> Spectra:
    """Spectra made of three components, with noise; masked pixels hold garbage."""
    shapes = np.cos(np.linspace(0, 3, PIXELS) * np.arange(1, 4)[:, None])
    flux = 2 + rng.normal(size=(count, 3)) @ shapes + 0.2 * rng.normal(size=(count, PIXELS))
    good = rng.random(flux.shape) >= masked
    flux = np.where(good, flux, rng.choice([np.nan, np.inf, 1e30], flux.shape))
    return Spectra(np.arange(count), flux.astype(np.float32), np.where(good, 25, 0).astype(np.float32), GRID)


def forest(**changes: Any) -> Forest:
    few = {"trees": 12, "trees_per_draw": 5, "subsample": 600, "reference": 300}
    return Forest.model_validate({**few, **changes})


def grown(settings: Forest, sample: Spectra, seed: int = 3) -> UnsupervisedForest:
    parts = [
        UnsupervisedForest.grow(settings, sample, seed, part) for part in range(UnsupervisedForest.parts(settings))
    ]
    return UnsupervisedForest.assemble(settings, sample.grid, parts)


def fitted(settings: Forest, sample: Spectra, seed: int = 3) -> UnsupervisedForest:
    """Grown on a sample, which is the survey too."""
    found = grown(settings, sample, seed)
    return found.learn(found.look(sample)) if found.looking else found


def leaves_and_good(detector: UnsupervisedForest, spectra: Spectra) -> tuple[np.ndarray, np.ndarray]:
    leaves = detector.trees.leaves(detector.features(spectra))
    return leaves, detector.trees.value[leaves] > 0.5


@pytest.fixture(scope="module")
def sample() -> Spectra:
    return survey(np.random.default_rng(7), 2000)


@pytest.fixture(scope="module")
def linear(sample: Spectra) -> UnsupervisedForest:
    return fitted(forest(), sample)


# --- definition -------------------------------------------------------------------------------------------------------


def test_leaf_counts_give_the_mean_over_all_pairs(sample: Spectra, linear: UnsupervisedForest) -> None:
    leaves, good = leaves_and_good(linear, sample)
    expected = np.ones(len(sample))
    for i in range(len(sample)):
        m = good[i].sum()
        if m:
            similarity = ((leaves == leaves[i]) & good[i]).sum(axis=1) / m
            expected[i] = (1 - similarity).mean()
    details = linear.details(sample)
    np.testing.assert_allclose(details["forest"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(details["good_trees"], good.sum(axis=1))
    assert np.ptp(expected) > 0.1
    assert linear.score(sample).tobytes() == details["forest"].tobytes()


def pair_distances(detector: UnsupervisedForest, spectra: Spectra, reference: np.ndarray) -> np.ndarray:
    """d = 1 - s / m of every spectrum and every reference, one pair at a time."""
    leaves, good = leaves_and_good(detector, spectra)
    others = detector.trees.value[reference] > 0.5
    distances = np.ones((len(spectra), len(reference)))
    for i in range(len(spectra)):
        for j in range(len(reference)):
            both = good[i] & others[j]
            if both.any():
                distances[i, j] = 1 - (leaves[i] == reference[j])[both].sum() / both.sum()
    return distances


@pytest.mark.parametrize("trees", [12, 300])
def test_pairs_are_compared_over_the_leaves_that_are_good_for_both(sample: Spectra, trees: int) -> None:
    part = sample[:150]
    settings = forest(trees=trees, trees_per_draw=100, subsample=60, reference=40)
    detector = fitted(settings, part)
    assert detector.reference is None
    for similarity in ("pairwise", "neighbour"):
        detector = fitted(settings.model_copy(update={"similarity": similarity, "neighbour": 4}), part)
        assert not detector.looking
        assert detector.reference is not None
        assert detector.reference.shape == (40, trees)
        distances = pair_distances(detector, part, detector.reference)
        expected = distances.mean(axis=1) if similarity == "pairwise" else np.sort(distances, axis=1)[:, 4]
        np.testing.assert_allclose(detector.score(part), expected, rtol=0, atol=1e-6)
        assert np.ptp(expected) > 0.1


def stumps(values: list[tuple[float, float]]) -> Trees:
    """Trees of two leaves, flux up to 0 and beyond; each leaf has a share of real spectra."""
    trees = len(values)
    root = np.arange(trees)[:, None] * 3
    return Trees(
        np.zeros(3 * trees, np.int32),
        np.zeros(3 * trees, np.float32),
        (root + np.array([1, 1, 2])).ravel().astype(np.int32),
        (root + np.array([2, 1, 2])).ravel().astype(np.int32),
        np.array([(1.0, *pair) for pair in values], np.float32).ravel(),
        np.arange(trees + 1) * 3,
        1,
    )


def drawn(similarity: str, trees: Trees, reference: list[float] | None = None) -> UnsupervisedForest:
    """A forest of given trees on one pixel, with the given fluxes as reference."""
    features = Features(np.array([0, 1]), np.array([0]), np.zeros(1, np.float32))
    leaves = None if reference is None else trees.leaves(np.array(reference, np.float32)[:, None])
    settings = forest(similarity=similarity, neighbour=1)
    return UnsupervisedForest(settings, WaveGrid("linear", 4000.0, 1.0, 1), features, trees, reference=leaves)


def fluxes(values: list[float]) -> Spectra:
    flux = np.array(values, np.float32)[:, None]
    return Spectra(np.arange(len(flux)), flux, np.ones_like(flux), WaveGrid("linear", 4000.0, 1.0, 1))


def test_scores_of_trees_drawn_by_hand() -> None:
    """A leaf that half of is real is not good; trees count where they are good for the spectrum, or for both."""
    trees = stumps([(1.0, 1.0), (0.75, 0.5), (0.5, 0.5)])
    low, high, nowhere = [-1.0, -2.0, -3.0], [1.0], stumps([(0.5, 0.25)])
    survey = fluxes(low + high)
    detector = drawn("all", trees)
    details = detector.learn(detector.look(survey)).details(survey)
    # Low fluxes are good in two trees and share each leaf with three of four; the high one in one, where it is alone.
    np.testing.assert_allclose(details["forest"], [0.25, 0.25, 0.25, 0.75])
    assert details["good_trees"].tolist() == [2, 2, 2, 1]
    alone = drawn("all", nowhere)
    assert alone.learn(alone.look(survey)).score(survey).tolist() == [1.0] * 4
    # A low and a high one share one good tree, in which their leaves differ; two high ones share it and the leaf.
    np.testing.assert_allclose(drawn("pairwise", trees, [-5.0, 5.0, 6.0]).score(survey), [2 / 3] * 3 + [1 / 3])
    assert drawn("neighbour", trees, [-5.0, 5.0, 6.0]).score(survey).tolist() == [1.0, 1.0, 1.0, 0.0]
    assert drawn("pairwise", nowhere, [-5.0]).score(survey).tolist() == [1.0] * 4


@pytest.mark.parametrize("trees", [255, 256, 300])
def test_no_count_of_shared_leaves_runs_over(trees: int) -> None:
    same = drawn("pairwise", stumps([(1.0, 1.0)] * trees), [1.0, 2.0])
    assert same.score(fluxes([1.0, -1.0])).tolist() == [0.0, 1.0]


def test_the_reference_is_the_same_spectra_in_all_parts(sample: Spectra) -> None:
    detector = fitted(forest(similarity="pairwise", reference=100), sample)
    assert detector.reference is not None
    leaves = {row.tobytes() for row in leaves_and_good(detector, sample)[0]}
    assert all(row.tobytes() in leaves for row in detector.reference)
    assert len({row.tobytes() for row in detector.reference}) > 90


def test_a_spectrum_of_the_reference_is_its_own_nearest_neighbour(sample: Spectra) -> None:
    part = sample[:60]
    detector = fitted(forest(similarity="neighbour", neighbour=1), part)  # all are the reference
    assert detector.reference is not None
    distances = pair_distances(detector, part, detector.reference)
    itself = (leaves_and_good(detector, part)[0][:, None] == detector.reference).all(axis=2).argmax(axis=1)
    held = detector.details(part)["good_trees"] > 0
    assert held.any()
    assert (distances[np.arange(60), itself][held] == 0).all()
    distances[np.arange(60), itself] = np.inf
    np.testing.assert_allclose(detector.score(part)[held], distances.min(axis=1)[held], rtol=0, atol=1e-6)


def test_planted_spectra_are_the_oddest(rng: np.random.Generator) -> None:
    """Each of their pixels is usual; together they are like no other spectrum."""
    spectra = survey(rng, 1500, masked=0)
    planted = np.arange(0, 1500, 150)
    flux = spectra.flux.copy()
    flux[planted] = rng.permuted(flux[:200].T, axis=1).T[:10]
    spectra = Spectra(spectra.rows, flux, spectra.ivar, GRID)
    for similarity in ("all", "pairwise", "neighbour"):
        scores = fitted(forest(trees=40, trees_per_draw=20, similarity=similarity), spectra).score(spectra)
        # Many share the largest score, 1: those that no tree holds real.
        below = (scores[planted, None] > scores).mean(axis=1) + 0.5 * (scores[planted, None] == scores).mean(axis=1)
        assert np.median(below) > 0.97, similarity


# --- synthetic spectra ------------------------------------------------------------------------------------------------


def linked(rng: np.random.Generator) -> np.ndarray:
    """Six features, all linked closely."""
    x = rng.gamma(2, size=(4000, 1)) + 0.1 * rng.normal(size=(4000, 6))
    return np.asarray(x * [1, 2, 3, 4, 5, 6], np.float32)


@pytest.mark.parametrize(("kind", "chunks"), [("marginal", 3), ("chunks", 3), ("chunks", 4)])
def test_synthetic_spectra_keep_each_distribution(rng: np.random.Generator, kind: str, chunks: int) -> None:
    x = linked(rng)
    made = synthesize(forest(synthetic=kind, chunks=chunks), x, rng)
    assert made.shape == x.shape
    assert made.dtype == np.float32
    for column in range(6):
        assert np.isin(made[:, column], x[:, column]).all()
        assert ks_2samp(made[:, column], x[:, column]).pvalue > 1e-3
        # Drawn with replacement: about 1 - 1/e of the values occur.
        assert 0.6 < len(np.unique(made[:, column])) / len(np.unique(x[:, column])) < 0.67


def test_links_are_kept_inside_chunks_only(rng: np.random.Generator) -> None:
    x = linked(rng)
    assert np.corrcoef(x.T).min() > 0.99
    marginal = np.corrcoef(synthesize(forest(synthetic="marginal"), x, rng).T)
    assert np.abs(marginal - np.eye(6)).max() < 0.08
    for chunks in (2, 3, 4):
        found = np.corrcoef(synthesize(forest(synthetic="chunks", chunks=chunks), x, rng).T)
        run = np.repeat(np.arange(chunks), np.diff(np.arange(chunks + 1) * 6 // chunks))
        inside = run[:, None] == run
        assert found[inside].min() > 0.99
        assert np.abs(found[~inside]).max() < 0.08


def test_more_chunks_than_features_are_single_features(rng: np.random.Generator) -> None:
    found = np.corrcoef(synthesize(forest(synthetic="chunks", chunks=50), linked(rng), rng).T)
    assert np.abs(found - np.eye(6)).max() < 0.08


def test_uniform_spectra_fill_the_range(rng: np.random.Generator) -> None:
    x = linked(rng)
    made = synthesize(forest(synthetic="uniform"), x, rng)
    share = (made - x.min(axis=0)) / np.ptp(x, axis=0)
    assert share.min() >= 0
    assert share.max() <= 1
    np.testing.assert_allclose(share.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(share.var(axis=0), 1 / 12, atol=0.01)
    assert np.abs(np.corrcoef(made.T) - np.eye(6)).max() < 0.08


def test_chunks_and_uniform_forests_score(sample: Spectra) -> None:
    for synthetic in ("chunks", "uniform"):
        detector = fitted(forest(synthetic=synthetic, trees=4, bins=8), sample[:300])
        scores = detector.score(sample)
        assert detector.facts["features"] == 8
        assert ((scores >= 0) & (scores <= 1)).all()


# --- parts and looks --------------------------------------------------------------------------------------------------


def test_parts_are_repeatable_and_differ(sample: Spectra) -> None:
    settings = forest(similarity="pairwise")
    assert UnsupervisedForest.parts(settings) == 3
    parts = [UnsupervisedForest.grow(settings, sample, 3, part) for part in (0, 1, 2, 1)]
    assert [len(part["roots"]) - 1 for part in parts] == [5, 5, 2, 5]
    for name, values in parts[1].items():
        assert parts[3][name].tobytes() == values.tobytes()
    assert parts[0]["threshold"].tobytes() != parts[1]["threshold"].tobytes()
    drawn_real = [part["value"][part["roots"][:-1]] for part in parts]  # share of each tree's own subsample
    assert (drawn_real[0] != drawn_real[1]).any()
    other = UnsupervisedForest.grow(settings, sample, 4, 1)
    assert other["threshold"].tobytes() != parts[1]["threshold"].tobytes()
    whole = UnsupervisedForest.assemble(settings, GRID, parts[:3])
    assert len(whole.trees) == 12


def test_parts_that_do_not_belong_together_are_refused(sample: Spectra) -> None:
    settings = forest(trees=2, trees_per_draw=1)
    one, two = (UnsupervisedForest.grow(settings, sample[:100], 3, part) for part in range(2))
    with pytest.raises(ValueError, match="1 parts of a forest; expected 2"):
        UnsupervisedForest.assemble(settings, GRID, [one])
    with pytest.raises(ValueError, match="different samples"):
        UnsupervisedForest.assemble(settings, GRID, [one, UnsupervisedForest.grow(settings, sample[100:200], 3, 1)])
    assert len(UnsupervisedForest.assemble(settings, GRID, [one, two]).trees) == 2


@cache
def looked() -> tuple[Spectra, UnsupervisedForest]:
    """A survey, and a forest that asks for a look at it; grown once for many examples."""
    sample = survey(np.random.default_rng(8), 2000)
    return sample, grown(forest(trees=6), sample[:500])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2000), max_size=5).map(sorted), st.randoms())
def test_looks_add_up_whatever_the_cut(where: list[int], random: Any) -> None:
    sample, detector = looked()
    edges = [0, *where, len(sample)]
    parts = [detector.look(sample[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    random.shuffle(parts)
    merged, whole = reduce(add, parts), detector.look(sample)
    assert merged.spectra == whole.spectra == len(sample)
    assert merged.leaves.tobytes() == whole.leaves.tobytes()


def test_scores_do_not_depend_on_the_batch(sample: Spectra, linear: UnsupervisedForest) -> None:
    detectors = [
        linear,
        *(fitted(forest(similarity=name, reference=100), sample) for name in ("pairwise", "neighbour")),
    ]
    for detector in detectors:
        whole = detector.score(sample)
        for cut in (1, 63, 64, 777):
            parts = [detector.score(sample[:cut]), detector.score(sample[cut:])]
            assert np.concatenate(parts).tobytes() == whole.tobytes()
        assert detector.score(sample[:0]).shape == (0,)


def test_a_forest_says_whether_it_must_look(sample: Spectra, linear: UnsupervisedForest) -> None:
    before = grown(forest(trees=2), sample[:100])
    assert before.looking
    with pytest.raises(ValueError, match="cannot score yet"):
        before.score(sample)
    with pytest.raises(ValueError, match="counts of 1 leaves"):
        before.learn(LeafCounts(np.zeros(1, np.int64), 1))
    assert not linear.looking
    assert "fitted" in repr(linear)
    with pytest.raises(ValueError, match="needs no look"):
        linear.look(sample)
    with pytest.raises(ValueError, match="needs no look"):
        linear.learn(LeafCounts(np.zeros(1, np.int64), 1))


def test_fields_and_facts_tell_what_is_kept(sample: Spectra) -> None:
    detector = fitted(forest(name="odd", similarity="pairwise"), sample)
    details = detector.details(sample[:7])
    assert list(details) == list(detector.fields) == ["odd", "good_trees"]
    for name, (dtype, shape) in detector.fields.items():
        assert details[name].dtype == np.dtype(dtype)
        assert details[name].shape == (7, *shape)
    facts = json.loads(json.dumps(detector.facts))
    assert facts["trees"] == 12
    assert facts["references"] == 300
    assert facts["spectra"] is None
    assert 0 < facts["good_leaves"] < facts["leaves"]


# --- masks and edge cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["all", "pairwise"])
def test_what_a_masked_pixel_holds_does_not_matter(sample: Spectra, similarity: str) -> None:
    other = Spectra(sample.rows, np.where(sample.good, sample.flux, -7.0), sample.ivar, GRID)
    one, two = (fitted(forest(trees=3, similarity=similarity), spectra) for spectra in (sample, other))
    for name, values in one.to_arrays().items():
        assert two.to_arrays()[name].tobytes() == values.tobytes()
    assert one.score(sample).tobytes() == two.score(other).tobytes()


@pytest.mark.parametrize("similarity", ["all", "pairwise", "neighbour"])
def test_a_spectrum_without_a_good_pixel_teaches_nothing_and_has_no_score(sample: Spectra, similarity: str) -> None:
    part = sample[:400]
    ivar = part.ivar.copy()
    ivar[::4] = 0
    holes = Spectra(part.rows, part.flux, ivar, GRID)
    seen = np.arange(400) % 4 > 0
    settings = forest(trees=3, similarity=similarity, reference=50)
    one, two = fitted(settings, holes), fitted(settings, holes[seen])
    for name, values in one.to_arrays().items():
        assert two.to_arrays()[name].tobytes() == values.tobytes()
    details = one.details(holes)
    assert np.isnan(details["forest"][~seen]).all()
    assert (details["good_trees"][~seen] == 0).all()
    assert ((details["forest"][seen] >= 0) & (details["forest"][seen] <= 1)).all()


@pytest.mark.parametrize("similarity", ["all", "pairwise", "neighbour"])
@pytest.mark.parametrize("what", ["constant", "duplicated", "huge", "two"])
def test_simple_samples_have_scores(rng: np.random.Generator, similarity: str, what: str) -> None:
    count = 2 if what == "two" else 30
    flux = rng.normal(size=(count, PIXELS)).astype(np.float32)
    if what == "constant":
        flux[:] = 2
    if what == "duplicated":
        flux[:] = flux[np.arange(count) % 3]
    if what == "huge":
        flux[:15] = np.where(flux[:15] > 0, np.inf, -3e38)
    spectra = Spectra(np.arange(count), flux, np.ones_like(flux), GRID)
    settings = forest(trees=6, similarity=similarity, neighbour=1)
    scores = fitted(settings, spectra).score(spectra)
    assert ((scores >= 0) & (scores <= 1)).all()
    if what == "constant":
        assert len(np.unique(scores)) == 1
    if what == "duplicated":
        np.testing.assert_array_equal(scores, scores[np.arange(count) % 3])
        assert scores.max() < 1


def test_survey_spectra_that_no_tree_holds_real_have_score_one(sample: Spectra, linear: UnsupervisedForest) -> None:
    details = linear.details(sample)
    none = details["good_trees"] == 0
    assert (details["forest"][none] == 1).all()
    nobody = grown(forest(trees=3), sample[:50])
    nobody = nobody.learn(nobody.look(sample[:0]))
    assert (nobody.score(sample[:50]) == 1).all()


def test_samples_that_cannot_be_used_are_refused(sample: Spectra) -> None:
    with pytest.raises(ConfigError, match="1 spectra of the sample have a good pixel"):
        UnsupervisedForest.grow(forest(), sample[:1], 0, 0)
    dead = Spectra(sample.rows, sample.flux, np.zeros_like(sample.ivar), GRID)
    with pytest.raises(ConfigError, match="0 spectra of the sample have a good pixel"):
        UnsupervisedForest.grow(forest(), dead, 0, 0)
    with pytest.raises(ConfigError, match="neighbour = 10 of a reference of 8 spectra"):
        UnsupervisedForest.grow(forest(similarity="neighbour"), sample[:8], 0, 0)
    with pytest.raises(ConfigError, match="bins = 25"):
        UnsupervisedForest.grow(forest(bins=25), sample, 0, 0)


def test_spectra_on_another_grid_are_refused(sample: Spectra, linear: UnsupervisedForest) -> None:
    other = Spectra(sample.rows, sample.flux, sample.ivar, WaveGrid.between("log", 3700.0, 7200.0, PIXELS))
    with pytest.raises(LayoutError, match="fit it on these spectra"):
        linear.score(other)
    with pytest.raises(LayoutError, match="fit it on these spectra"):
        grown(forest(trees=1), sample[:50]).look(other)


# --- as arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["all", "pairwise", "neighbour"])
def test_a_forest_is_kept_on_disk(sample: Spectra, tmp_path: Any, similarity: str) -> None:
    part = sample[:200]
    detector = fitted(forest(similarity=similarity, trees=6), part)
    for state in (grown(forest(similarity=similarity, trees=6), part), detector):
        folder = tmp_path / ("looking" if state.looking else "fitted")
        sha256 = save_detector(state, folder, "recipe")
        again, found = load_detector(folder)
        assert isinstance(again, UnsupervisedForest)
        assert (found, again.looking, again.settings) == (sha256, state.looking, state.settings)
        if again.looking:
            again = again.learn(again.look(part))
        assert again.score(part).tobytes() == detector.score(part).tobytes()


def damaged(arrays: Arrays, name: str, values: np.ndarray | None) -> Arrays:
    changed = {**arrays}
    if values is None:
        del changed[name]
    else:
        changed[name] = values
    return changed


def test_arrays_that_are_no_forest_are_refused(sample: Spectra, linear: UnsupervisedForest) -> None:
    arrays = linear.to_arrays()
    counts, value = arrays["counts"], arrays["value"]
    for name, values in [
        *((name, None) for name in arrays if name != "counts"),
        ("counts", counts[:-1]),
        ("counts", counts - 1000),
        ("counts", counts + 2000),
        ("counts", counts.astype(np.float64)),
        ("spectra", np.array([-1])),
        ("spectra", np.array([2**62])),
        ("value", value + 1),
        ("value", -value),
        ("surplus", counts),
        ("reference", np.zeros((3, 12), np.int32)),
    ]:
        with pytest.raises(ValueError, match=r"array|leaf counts|share of real"):
            UnsupervisedForest.from_arrays(linear.settings, GRID, damaged(arrays, name, values))
    with pytest.raises(ValueError, match="on a grid of 30"):
        UnsupervisedForest.from_arrays(linear.settings, WaveGrid.between("log", 3600.0, 7200.0, 30), arrays)


def test_references_that_are_no_leaves_are_refused(sample: Spectra) -> None:
    detector = fitted(forest(similarity="neighbour", neighbour=5), sample)
    arrays = detector.to_arrays()
    good = arrays["reference"]
    for values in (good[:5], good[:, :-1], good * 0, good[:, ::-1].copy(), good + 10**6, -good):
        with pytest.raises(ValueError, match="reference"):
            UnsupervisedForest.from_arrays(detector.settings, GRID, damaged(arrays, "reference", values))
    with pytest.raises(ValueError, match="expected"):
        UnsupervisedForest.from_arrays(forest(), GRID, arrays)
