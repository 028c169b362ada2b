"""The isolation forest against scikit-learn's on the same ranks, and the laws of ranks, masks and batches."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.ensemble import IsolationForest

from distspec.config import Isolation
from distspec.detectors.classical.isolation import IsolationDetector, average_path, cuts_in_flux, ranks
from distspec.detectors.classical.saved import load_detector, save_detector
from distspec.detectors.classical.trees import Trees
from distspec.errors import ConfigError, LayoutError
from distspec.spectra import Spectra, WaveGrid

pytestmark = pytest.mark.numeric

PIXELS = 20
GRID = WaveGrid.between("linear", 4000.0, 5000.0, PIXELS)


def survey(rng: np.random.Generator, count: int, masked: float = 0.0) -> Spectra:
    """Lognormal fluxes around a common level; masked pixels hold garbage."""
    flux = np.exp(0.3 * rng.normal(size=(count, 1)) + 0.3 * rng.normal(size=(count, PIXELS)))
    good = rng.random(flux.shape) >= masked
    flux = np.where(good, flux, rng.choice([np.nan, np.inf, -1e30], flux.shape))
    return Spectra(np.arange(count), flux.astype(np.float32), np.where(good, 9, 0).astype(np.float32), GRID)


def of(flux: np.ndarray) -> Spectra:
    return Spectra(np.arange(len(flux)), flux.astype(np.float32), np.ones(flux.shape, np.float32), GRID)


def isolation(**changes: Any) -> Isolation:
    return Isolation.model_validate({"trees": 50, "subsample": 128, **changes})


def fitted(settings: Isolation, sample: Spectra, seed: int = 3) -> IsolationDetector:
    assert IsolationDetector.parts(settings) == 1
    return IsolationDetector.assemble(settings, sample.grid, [IsolationDetector.grow(settings, sample, seed, 0)])


def of_scikit_learn(settings: Isolation, shares: np.ndarray, seed: int = 3) -> IsolationForest:
    """The forest that the detector grows."""
    state = int(np.random.SeedSequence(seed, spawn_key=(0,)).generate_state(1)[0])
    subsample = min(settings.subsample, len(shares))
    return IsolationForest(n_estimators=settings.trees, max_samples=subsample, random_state=state).fit(shares)


def interpolated_ranks(sample: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Ranks among the sample, linear between its values, 0 and 1 beyond them, in plain numpy."""
    shares = np.empty(x.shape)
    for column in range(x.shape[1]):
        values, first, counts = np.unique(sample[:, column], return_index=True, return_counts=True)
        middle = (np.cumsum(counts) - 0.5 * counts) / len(sample)
        shares[:, column] = np.interp(x[:, column], values, middle, left=0, right=1)
    return shares.astype(np.float32)


# --- agreement with scikit-learn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, 1500])
def test_scores_are_those_of_scikit_learn_on_ranks(rng: np.random.Generator, count: int) -> None:
    sample, later = survey(rng, count), survey(rng, 1000)
    settings = isolation()
    detector = fitted(settings, sample)
    oracle = of_scikit_learn(settings, interpolated_ranks(sample.flux, sample.flux))
    for spectra in (sample, later, of(10 * later.flux - 5)):
        shares = interpolated_ranks(sample.flux, spectra.flux)
        expected = -oracle.score_samples(shares)
        sure = np.full(len(spectra), True) if spectra is sample else ~near_a_cut(oracle, shares)
        assert sure.mean() > 0.95
        np.testing.assert_allclose(detector.score(spectra)[sure], expected[sure], rtol=0, atol=1e-6)
        assert np.ptp(expected[sure]) > 0.02


def near_a_cut(oracle: IsolationForest, shares: np.ndarray) -> np.ndarray:
    """Which rows have a rank so near to a cut that the rounding of ranks may decide."""
    near = np.zeros(len(shares), bool)
    for tree in oracle.estimators_:
        inner = tree.tree_.feature >= 0
        feature, cuts = tree.tree_.feature[inner], tree.tree_.threshold[inner]
        near |= (np.abs(shares[:, feature] - cuts) < 3e-7).any(axis=1)
    return near


@pytest.mark.parametrize("subsample", [2, 3, 64])
def test_scores_are_those_of_scikit_learn_on_fluxes(rng: np.random.Generator, subsample: int) -> None:
    sample, later = survey(rng, 300), survey(rng, 300)
    settings = isolation(ranks=False, subsample=subsample)
    expected = -of_scikit_learn(settings, sample.flux).score_samples(later.flux)
    np.testing.assert_allclose(fitted(settings, sample).score(later), expected, rtol=0, atol=1e-6)


def test_average_path_has_its_known_values() -> None:
    assert average_path(np.array([0, 1, 2])).tolist() == [0.0, 0.0, 1.0]
    harmonic = np.log(255) + np.euler_gamma
    np.testing.assert_allclose(average_path(np.array([256])), [2 * harmonic - 2 * 255 / 256])
    # c(n) is nearly that of exact harmonic numbers.
    exact = 2 * np.sum(1 / np.arange(1, 256)) - 2 * 255 / 256
    np.testing.assert_allclose(average_path(np.array([256])), [exact], rtol=1e-3)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_are_the_middle_of_ties(rng: np.random.Generator) -> None:
    x = np.round(rng.normal(size=(200, 130)), 1).astype(np.float32)
    expected = np.stack([(rankdata(column) - 0.5) / 200 for column in x.T], axis=1)
    np.testing.assert_allclose(ranks(x), expected, rtol=1e-6)
    np.testing.assert_allclose(ranks(x), interpolated_ranks(x, x), rtol=1e-6)
    assert ranks(np.array([[3], [1], [3], [2]], np.float32)).tolist() == [[0.75], [0.125], [0.75], [0.375]]


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=30), st.integers(0, 2**32 - 1))
def test_cuts_in_flux_part_the_sample_as_cuts_in_ranks_do(values: list[int], seed: int) -> None:
    x = np.array(values, np.float32)[:, None] * np.float32([1, 1e-44, 1e37])
    shares = ranks(x)
    forest = IsolationForest(n_estimators=5, max_samples=len(x), random_state=seed).fit(shares)
    trees = Trees.of(forest.estimators_, lambda estimator: estimator.tree_.n_node_samples)
    cut = cuts_in_flux(trees, x, shares)
    np.testing.assert_array_equal(cut.leaves(x), trees.leaves(shares))
    assert np.isfinite(cut.threshold).all()


@pytest.mark.parametrize("level", [1e-45, 1.0, -1.0, 1e30, -1e30])
def test_neighbouring_numbers_are_parted_too(level: float) -> None:
    low = np.float32(level)
    x = np.stack([low, np.nextafter(low, np.float32(np.inf)), np.float32(1e30)])[:, None]
    highest = np.nextafter(ranks(x)[1], np.float32(0))[0]
    leaf, threshold = np.array([1, 1, 2], np.int32), np.array([highest, 0, 0], np.float32)
    right = np.array([2, 1, 2], np.int32)
    trees = Trees(np.zeros(3, np.int32), threshold, leaf, right, threshold, np.array([0, 3]), 1)
    assert cuts_in_flux(trees, x, ranks(x)).leaves(x)[:2].tolist() == [[1], [2]]


def test_a_cut_lies_between_two_fluxes_as_it_lay_between_their_ranks() -> None:
    x = np.array([[1], [2], [10], [10]], np.float32)  # ranks 1/8, 3/8, 3/4, 3/4
    node = {"feature": [0, 0, 0], "left": [1, 1, 2], "right": [2, 1, 2]}
    arrays = {name: np.array(values, np.int32) for name, values in node.items()}
    for share, flux in [(1 / 8, 1.0), (1 / 4, 1.5), (3 / 8, 2.0), (9 / 16, 6.0)]:
        threshold = np.array([share, 0, 0], np.float32)
        trees = Trees(**arrays, threshold=threshold, value=threshold, roots=np.array([0, 3]), features=1)
        assert cuts_in_flux(trees, x, ranks(x)).threshold.tolist() == [flux, 0, 0]


def test_another_unit_of_flux_changes_no_score(rng: np.random.Generator) -> None:
    """Ranks do not know the scale; cuts of the sample's own spectra are the same, so are their scores."""
    sample = survey(rng, 501)
    steep = of(np.exp(sample.flux))
    one, two = fitted(isolation(), sample), fitted(isolation(), steep)
    assert one.score(sample).tobytes() == two.score(steep).tobytes()
    # Other spectra fall between those of the sample, at other places of a straight line: hardly any cut differs.
    later = survey(rng, 300)
    np.testing.assert_allclose(one.score(later), two.score(of(np.exp(later.flux))), atol=5e-3)
    raw = isolation(ranks=False)
    assert np.abs(fitted(raw, sample).score(sample) - fitted(raw, steep).score(steep)).max() > 0.02


def test_planted_spectra_are_the_oddest(rng: np.random.Generator) -> None:
    spectra = survey(rng, 1000)
    flux = spectra.flux.copy()
    flux[:10] *= np.where(np.arange(PIXELS) % 2, 3, 0.3)
    scores = fitted(isolation(trees=100), of(flux)).score(of(flux))
    assert set(np.argsort(-scores)[:10]) == set(range(10))


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [None, 7])
def test_what_a_masked_pixel_holds_does_not_matter(rng: np.random.Generator, bins: int | None) -> None:
    sample = survey(rng, 400, masked=0.2)
    other = Spectra(sample.rows, np.where(sample.good, sample.flux, 3.0), sample.ivar, GRID)
    one, two = fitted(isolation(bins=bins), sample), fitted(isolation(bins=bins), other)
    for name, values in one.to_arrays().items():
        assert two.to_arrays()[name].tobytes() == values.tobytes()
    assert one.score(sample).tobytes() == two.score(other).tobytes()
    assert one.facts["features"] == (bins or PIXELS)


def test_a_spectrum_without_a_good_pixel_teaches_nothing_and_has_no_score(rng: np.random.Generator) -> None:
    sample = survey(rng, 300)
    ivar = sample.ivar.copy()
    ivar[::3] = 0
    holes = Spectra(sample.rows, sample.flux, ivar, GRID)
    seen = np.arange(300) % 3 > 0
    one, two = fitted(isolation(), holes), fitted(isolation(), holes[seen])
    assert one.score(holes)[seen].tobytes() == two.score(holes[seen]).tobytes()
    np.testing.assert_array_equal(np.isnan(one.score(holes)), ~seen)


def test_scores_do_not_depend_on_the_batch(rng: np.random.Generator) -> None:
    sample = survey(rng, 1200, masked=0.1)
    detector = fitted(isolation(), sample)
    whole = detector.score(sample)
    for cut in (1, 511, 1000):
        assert np.concatenate([detector.score(sample[:cut]), detector.score(sample[cut:])]).tobytes() == whole.tobytes()
    assert detector.score(sample[:0]).shape == (0,)


def test_growing_is_repeatable(rng: np.random.Generator) -> None:
    sample = survey(rng, 200)
    one, same, other = (IsolationDetector.grow(isolation(), sample, seed, 0) for seed in (1, 1, 2))
    for name, values in one.items():
        assert same[name].tobytes() == values.tobytes()
    assert other["threshold"].tobytes() != one["threshold"].tobytes()


@pytest.mark.parametrize("use_ranks", [True, False])
@pytest.mark.parametrize("what", ["constant", "duplicated", "huge", "two"])
def test_simple_samples_have_scores(rng: np.random.Generator, what: str, use_ranks: bool) -> None:
    count = 2 if what == "two" else 30
    flux = rng.normal(size=(count, PIXELS)).astype(np.float32)
    if what == "constant":
        flux[:] = 2
    if what == "duplicated":
        flux[:] = flux[np.arange(count) % 3]
    if what == "huge":
        flux[:15] = np.where(flux[:15] > 0, np.inf, -3e38)
    spectra = Spectra(np.arange(count), flux, np.ones_like(flux), GRID)
    scores = fitted(isolation(ranks=use_ranks), spectra).score(spectra)
    assert ((scores > 0) & (scores <= 1)).all()
    if what == "constant":
        np.testing.assert_allclose(scores, 0.5, rtol=1e-6)  # every path is as long as the mean
    if what == "duplicated":
        np.testing.assert_array_equal(scores, scores[np.arange(count) % 3])


def test_samples_that_cannot_be_used_are_refused(rng: np.random.Generator) -> None:
    sample = survey(rng, 5)
    with pytest.raises(ConfigError, match="1 spectra of the sample have a good pixel"):
        IsolationDetector.grow(isolation(), sample[:1], 0, 0)
    with pytest.raises(ConfigError, match="bins = 21"):
        IsolationDetector.grow(isolation(bins=21), sample, 0, 0)


def test_an_isolation_forest_never_looks(rng: np.random.Generator) -> None:
    detector = fitted(isolation(), survey(rng, 50))
    assert not detector.looking
    for refused in (detector.look, detector.learn):
        with pytest.raises(ValueError, match="needs no look"):
            refused(survey(rng, 5))


def test_spectra_on_another_grid_are_refused(rng: np.random.Generator) -> None:
    sample = survey(rng, 50)
    other = Spectra(sample.rows, sample.flux, sample.ivar, WaveGrid.between("linear", 4100.0, 5000.0, PIXELS))
    with pytest.raises(LayoutError, match="fit it on these spectra"):
        fitted(isolation(), sample).score(other)


def test_fields_and_facts_tell_what_is_kept(rng: np.random.Generator) -> None:
    detector = fitted(isolation(name="lonely"), survey(rng, 60))
    details = detector.details(survey(rng, 7))
    assert detector.fields == {"lonely": ("f4", ())}
    assert list(details) == ["lonely"]
    assert details["lonely"].dtype == np.float32
    facts = json.loads(json.dumps(detector.facts))
    assert (facts["trees"], facts["subsample"], facts["ranks"]) == (50, 60, True)
    assert repr(detector).startswith("IsolationDetector('lonely', Trees(50 trees")


# --- as arrays --------------------------------------------------------------------------------------------------------


def test_a_detector_is_kept_on_disk(rng: np.random.Generator, tmp_path: Any) -> None:
    sample = survey(rng, 100, masked=0.1)
    detector = fitted(isolation(), sample)
    sha256 = save_detector(detector, tmp_path / "detector", "recipe")
    again, found = load_detector(tmp_path / "detector")
    assert found == sha256
    assert again.settings == detector.settings
    assert again.score(sample).tobytes() == detector.score(sample).tobytes()


def test_arrays_that_are_no_isolation_forest_are_refused(rng: np.random.Generator) -> None:
    detector = fitted(isolation(), survey(rng, 100))
    arrays = detector.to_arrays()
    for name in arrays:
        with pytest.raises(ValueError, match="absent"):
            IsolationDetector.from_arrays(isolation(), GRID, {key: arrays[key] for key in arrays if key != name})
    for changes in (
        {"subsample": np.array([1])},
        {"subsample": np.array([128.0])},
        {"value": arrays["value"] - 100},
        {"surplus": arrays["value"]},
        {"left": arrays["left"][::-1].copy()},
    ):
        with pytest.raises(ValueError, match=r"isolate|array|path|tree"):
            IsolationDetector.from_arrays(isolation(), GRID, {**arrays, **changes})
    with pytest.raises(ValueError, match="on a grid of 30"):
        IsolationDetector.from_arrays(isolation(), WaveGrid.between("linear", 4000.0, 5000.0, 30), arrays)
    with pytest.raises(ValueError, match="2 parts"):
        IsolationDetector.assemble(isolation(), GRID, [arrays, arrays])
