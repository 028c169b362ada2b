"""The Fisher vector equals scikit-image's and its own derivatives; its length is what theory says."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

from distspec.config import Fisher
from distspec.detectors.classical.fisher import FisherDetector, Mixture
from distspec.detectors.classical.principal_components import Components
from distspec.errors import ConfigError, LayoutError
from distspec.spectra import Spectra, WaveGrid

pytestmark = pytest.mark.numeric

GRID = WaveGrid.between("log", 3600.0, 7200.0, 200)
SETTINGS = Fisher(components=4, gaussians=3)


def three_kinds(rng: np.random.Generator, rows: int = 600) -> Spectra:
    """Three kinds of spectra, each with a spread of its own, noise, and masked pixels that hold garbage."""
    phase = np.linspace(0, 1, GRID.pixels)
    shapes = np.stack([np.sin(3 * phase), np.cos(7 * phase), phase**2, np.sin(11 * phase)])
    kind = rng.integers(0, 3, rows)
    centres = np.array([[2, 0, 0, 0], [-2, 1, 0, 0], [0, -2, 1, 0]])
    weights = centres[kind] + rng.normal(size=(rows, 4)) * np.array([0.1, 0.2, 0.3])[kind, None]
    flux = (3 + weights @ shapes + 0.02 * rng.normal(size=(rows, GRID.pixels))).astype(np.float32)
    ivar = np.full_like(flux, 2_500)
    bad = rng.random(flux.shape) < 0.05
    flux[bad], ivar[bad] = np.nan, 0
    return Spectra(np.arange(rows), flux, ivar, GRID)


def fitted(sample: Spectra, settings: Fisher = SETTINGS, seed: int = 0) -> FisherDetector:
    return FisherDetector.assemble(settings, sample.grid, [FisherDetector.grow(settings, sample, seed, 0)])


def known(weights: list[float], means: np.ndarray, variances: np.ndarray) -> FisherDetector:
    """A detector whose components are the pixels themselves, so that fluxes are coordinates."""
    axes = means.shape[1]
    components = Components(np.zeros(axes), np.eye(axes), np.ones(axes), 1.0, 1.0)
    grid = WaveGrid("linear", 4000.0, 1.0, axes)
    return FisherDetector(Fisher(), grid, components, Mixture(np.array(weights), means, variances))


def at(points: np.ndarray) -> Spectra:
    flux = points.astype(np.float32)
    return Spectra(np.arange(len(flux)), flux, np.ones_like(flux), WaveGrid("linear", 4000.0, 1.0, points.shape[1]))


# --- the vector -------------------------------------------------------------------------------------------------------


def test_the_vector_is_that_of_scikit_image(rng: np.random.Generator) -> None:
    feature = pytest.importorskip("skimage.feature")
    points = np.concatenate([rng.normal(0, 1, (200, 3)), rng.normal(2, [0.5, 1, 2], (100, 3))])
    theirs = GaussianMixture(4, covariance_type="diag", random_state=0).fit(points)
    ours = Mixture(theirs.weights_, theirs.means_, theirs.covariances_)
    weights, means, widths = ours.gradients(points[::10])
    for row, point in enumerate(points[::10]):
        vector = feature.fisher_vector(point[None], theirs, improved=False)
        # All three blocks agree; that of the widths has the other sign there, which no square knows.
        expected = np.concatenate([weights[row], means[row].ravel(), -widths[row].ravel()])
        np.testing.assert_allclose(vector, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(ours.density(points), theirs.score_samples(points), rtol=1e-10)


def test_the_vector_is_the_gradient_of_the_density(rng: np.random.Generator) -> None:
    weights, means, sigma = np.array([0.2, 0.5, 0.3]), rng.normal(size=(3, 2)), rng.uniform(0.5, 2, (3, 2))
    points = rng.normal(size=(20, 2))
    by_weight, by_mean, by_width = Mixture(weights, means, sigma**2).gradients(points)

    def log_p(a: np.ndarray, mean: np.ndarray, width: np.ndarray) -> np.ndarray:
        w = np.exp(a) / np.exp(a).sum()
        parts = [w[k] * multivariate_normal(mean[k], np.diag(width[k] ** 2)).pdf(points) for k in range(3)]
        return np.asarray(np.log(sum(parts)))

    step = 1e-5
    for k in range(3):
        # Weights are those of a softmax, as in Sánchez et al.; its Fisher information is w_k, but for the last order.
        move = np.eye(3)[k] * step
        slope = (log_p(np.log(weights) + move, means, sigma) - log_p(np.log(weights) - move, means, sigma)) / (2 * step)
        np.testing.assert_allclose(by_weight[:, k], slope / np.sqrt(weights[k]), atol=1e-8)
        for d in range(2):
            move = np.zeros((3, 2))
            move[k, d] = step
            a = np.log(weights)
            slope = (log_p(a, means + move, sigma) - log_p(a, means - move, sigma)) / (2 * step)
            np.testing.assert_allclose(by_mean[:, k, d], slope * sigma[k, d] / np.sqrt(weights[k]), atol=1e-7)
            slope = (log_p(a, means, sigma + move) - log_p(a, means, sigma - move)) / (2 * step)
            np.testing.assert_allclose(by_width[:, k, d], slope * sigma[k, d] / np.sqrt(2 * weights[k]), atol=1e-7)


def test_score_of_a_single_gaussian_is_known() -> None:
    detector = known([1.0], np.array([[1.0, -1.0]]), np.array([[4.0, 0.25]]))
    points = np.array([[1.0, -1.0], [3.0, -1.0], [1.0, 0.5]])  # at the mean, 1 σ off, 3 σ off
    details = detector.details(at(points))
    # Σ u² + Σ (u² - 1)² / 2; the only weight is 1, whatever the data.
    np.testing.assert_allclose(details["fisher"], [1.0, 1 + 0.5, 9 + 32 + 0.5], rtol=1e-6)
    expected = -multivariate_normal([1, -1], np.diag([4.0, 0.25])).logpdf(points)
    np.testing.assert_allclose(details["fisher_mixture"], expected, rtol=1e-6)


def test_mean_score_is_the_number_of_parameters(rng: np.random.Generator) -> None:
    # Where Gaussians are well apart the diagonal approximation of the Fisher information is exact.
    weights, axes = np.array([0.5, 0.3, 0.2]), 4
    means, sigma = 50.0 * np.eye(3, axes), rng.uniform(0.5, 2, (3, axes))
    kind = rng.choice(3, 40_000, p=weights)
    points = means[kind] + sigma[kind] * rng.normal(size=(40_000, axes))
    details = known(list(weights), means, sigma**2).details(at(points))
    assert details["fisher"].mean(dtype=float) == pytest.approx(3 - 1 + 2 * 3 * axes, rel=0.02)
    # Each Gaussian adds 1 - w for its weight, 1 for each mean and each width.
    np.testing.assert_allclose(details["parts"].mean(axis=0, dtype=float), 1 - weights + 2 * axes, rtol=0.04)


def test_score_is_higher_far_from_all_kinds(rng: np.random.Generator) -> None:
    sample = three_kinds(rng)
    detector = fitted(sample)
    usual = detector.score(sample)
    odd = sample[np.arange(20)]
    odd.flux[:] += 3 * np.cos(7 * np.linspace(0, 1, GRID.pixels)).astype(np.float32)
    assert detector.score(odd).min() > np.quantile(usual, 0.99)
    # A spectrum between two kinds has coordinates that none has, though each of them is usual.
    middle = Spectra(
        odd.rows[:1], np.full((1, GRID.pixels), 3, np.float32), np.ones((1, GRID.pixels), np.float32), GRID
    )
    assert detector.score(middle)[0] > np.quantile(usual, 0.95)
    details = detector.details(sample)
    np.testing.assert_allclose(details["parts"].sum(axis=1, dtype=float), details["fisher"], rtol=1e-6)
    assert {name: (array.dtype.str[1:], array.shape[1:]) for name, array in details.items()} == detector.fields
    np.testing.assert_array_equal(detector.score(sample), details["fisher"])


def test_three_kinds_are_found(rng: np.random.Generator) -> None:
    detector = fitted(three_kinds(rng))
    mixture, facts = detector.mixture, detector.facts
    # Coordinates have mean 0 and variance 1, but for what masked pixels take; so has a mixture fitted to them.
    np.testing.assert_allclose(mixture.weights @ mixture.means, 0, atol=0.1)
    np.testing.assert_allclose(mixture.weights @ (mixture.variances + mixture.means**2), 1, rtol=0.2)
    assert facts["components"] == 4
    assert facts["gaussians"] == 3
    assert facts["explained"] > 0.99
    assert facts["raised"] == 0


def test_small_weights_are_raised_to_the_floor(rng: np.random.Generator) -> None:
    points = np.concatenate([rng.normal(0, 1, (500, 2)), rng.normal(20, 0.1, (2, 2))])
    mixture, raised = Mixture.of(points, 2, 0.0, 0)
    assert raised == 0
    assert mixture.weights.min() == pytest.approx(2 / 502, rel=1e-3)
    floored, raised = Mixture.of(points, 2, 0.1, 0)
    assert raised == 1
    np.testing.assert_allclose(np.sort(floored.weights), np.array([0.1, 500 / 502]) / (0.1 + 500 / 502), rtol=1e-3)
    # A floor that all would lie below is one part in K.
    capped = Mixture.of(points, 2, 1.0, 0)[0].weights
    np.testing.assert_allclose(np.sort(capped), np.array([0.5, 500 / 502]) / (0.5 + 500 / 502), rtol=1e-3)
    # The pair is what the floor is for: with it, the two no longer outweigh everything.
    lone = points[-1:]
    scores = [sum((block**2).sum() for block in m.gradients(lone)) for m in (mixture, floored)]
    assert scores[0] > 10 * scores[1]


# --- laws -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_detector(rng: np.random.Generator) -> None:
    sample = three_kinds(rng, 200)
    assert FisherDetector.parts(SETTINGS) == 1
    one, two = (FisherDetector.grow(SETTINGS, sample, 2**40 + 1, 0) for _ in range(2))
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


def test_masked_pixels_may_hold_anything(rng: np.random.Generator) -> None:
    clean = three_kinds(rng, 200)
    flux, bad = clean.flux.copy(), clean.ivar == 0
    flux[bad] = rng.choice(np.array([0, np.inf, 1e30, -3e38], np.float32), bad.sum())
    dirty = Spectra(clean.rows, flux, clean.ivar, GRID)
    one, two = fitted(clean).details(clean), fitted(dirty).details(dirty)
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name])


def test_scores_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    sample = three_kinds(rng, 100)
    detector = fitted(sample)
    scores = detector.score(sample)
    one_by_one = np.concatenate([detector.score(sample[row : row + 1]) for row in range(100)])
    np.testing.assert_allclose(one_by_one, scores, rtol=1e-5)
    monkeypatch.setattr("distspec.detectors.classical.principal_components._ENTRIES", 600)  # three spectra at once
    np.testing.assert_allclose(detector.score(sample), scores, rtol=1e-5)


def test_huge_fluxes_have_finite_scores(rng: np.random.Generator) -> None:
    sample = three_kinds(rng, 300)
    sample.flux[5], sample.ivar[5] = 3e38, 1
    for detector in (fitted(three_kinds(rng, 300)), fitted(sample)):
        details = detector.details(sample)
        assert all(np.isfinite(values).all() for values in details.values())
        assert details["fisher"][5] == np.finfo(np.float32).max
        assert np.median(details["fisher"]) < 100


def test_the_farthest_points_have_finite_vectors() -> None:
    mixture = Mixture(np.array([0.4, 0.6]), np.zeros((2, 3)), np.ones((2, 3)) * [[1], [4]])
    points = np.array([[1e100, 0, 0], [-1e300, 1e300, 1]])
    for block in mixture.gradients(points):
        assert np.isfinite(block**2).all()
    assert np.isfinite(mixture.density(points)).all()


def test_spectra_with_few_good_pixels(rng: np.random.Generator) -> None:
    sample = three_kinds(rng, 300)
    sample.ivar[3] = 0
    sample.ivar[4, 1:] = 0
    sample.flux[4, 0], sample.ivar[4, 0] = 3, 2_500
    detector = fitted(sample)
    details = detector.details(sample)
    for values in details.values():
        assert np.isnan(values[3]).all()
        assert np.isfinite(np.delete(values, 3, axis=0)).all()
    assert detector.score(sample[:0]).shape == (0,)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_spectra_that_do_not_differ_are_refused(rows: int) -> None:
    flat = Spectra(np.arange(rows), np.ones((rows, 200), np.float32), np.ones((rows, 200), np.float32), GRID)
    with pytest.raises(ConfigError, match=f"sample of {rows} spectra .* raise `detect.sample`"):
        FisherDetector.grow(SETTINGS, flat, 0, 0)


def test_fewer_spectra_than_gaussians(rng: np.random.Generator) -> None:
    sample = three_kinds(rng, 5)
    sample = Spectra(sample.rows, np.nan_to_num(sample.flux, nan=3), np.full_like(sample.ivar, 2_500), GRID)
    detector = fitted(sample, Fisher(components=10, gaussians=16))
    assert detector.facts["gaussians"] == 5
    assert detector.facts["components"] <= 4
    assert np.isfinite(detector.score(three_kinds(rng, 50))).all()
    twins = sample[np.repeat([0, 1], 30)]
    detector = fitted(twins, Fisher(components=10, gaussians=16))
    assert detector.facts["components"] == 1
    assert np.isfinite(detector.score(three_kinds(rng, 50))).all()


# --- the life of a detector -------------------------------------------------------------------------------------------


def test_arrays_make_it_again(rng: np.random.Generator) -> None:
    sample = three_kinds(rng, 200)
    detector = fitted(sample)
    again = FisherDetector.from_arrays(SETTINGS, GRID, detector.to_arrays())
    assert again.facts == detector.facts
    assert again.fields == detector.fields
    for name, values in detector.details(sample).items():
        np.testing.assert_array_equal(again.details(sample)[name], values)


DAMAGE: dict[str, list[Any]] = {
    "weights": [lambda a: a * 2, lambda a: a[:-1], lambda a: a * [2, 0, 0] / a[0], lambda a: a[:0]],
    "means": [lambda a: a * np.nan, lambda a: a[:, 1:], lambda a: a.astype(np.float32)],
    "variances": [lambda a: -a, lambda a: a.T],
    "raised": [lambda a: a - 1, lambda a: a + 99, lambda a: a[0]],
    "axes": [lambda a: a * 2, lambda a: a[1:]],
    "mean": [lambda a: a[1:]],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_arrays_are_refused(name: str, rng: np.random.Generator) -> None:
    whole = fitted(three_kinds(rng, 100)).to_arrays()
    for change in DAMAGE[name]:
        with pytest.raises(ValueError, match=r"\w"):
            FisherDetector.from_arrays(SETTINGS, GRID, whole | {name: np.asarray(change(whole[name]))})
    for arrays in ({key: array for key, array in whole.items() if key != name}, whole | {"more": whole[name]}):
        with pytest.raises(ValueError, match="array"):
            FisherDetector.from_arrays(SETTINGS, GRID, arrays)


def test_misuse_is_told(rng: np.random.Generator) -> None:
    sample = three_kinds(rng, 50)
    detector = fitted(sample)
    assert not detector.looking
    for ask in (detector.look, detector.learn):
        with pytest.raises(ValueError, match="needs no look"):
            ask(sample)
    with pytest.raises(LayoutError, match="fit it on these spectra"):
        detector.score(at(np.ones((2, 200))))
