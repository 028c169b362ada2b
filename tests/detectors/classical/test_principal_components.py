"""Components from sums equal those of scikit-learn; what is masked has no influence; projections are least squares."""

from functools import reduce
from operator import add

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from distspec.detectors.classical.principal_components import CoMoments, Components, Origin
from distspec.spectra import Spectra, WaveGrid

pytestmark = pytest.mark.numeric


def batch(flux: np.ndarray, good: np.ndarray | None = None) -> Spectra:
    flux = flux.astype(np.float32)
    ivar = np.ones_like(flux) if good is None else good.astype(np.float32)
    return Spectra(np.arange(len(flux)), flux, ivar, WaveGrid("linear", 4000.0, 2.0, flux.shape[1]))


def smooth(rng: np.random.Generator, rows: int, pixels: int, rank: int = 3, noise: float = 0.05) -> np.ndarray:
    """A mean of 2, `rank` shapes of falling strength, noise."""
    shapes = np.linalg.qr(np.cumsum(rng.normal(size=(pixels, rank)), axis=0))[0].T * np.sqrt(pixels)
    strengths = 0.5 * 0.6 ** np.arange(rank)
    return 2 + rng.normal(size=(rows, rank)) * strengths @ shapes + noise * rng.normal(size=(rows, pixels))


def holes(rng: np.random.Generator, rows: int, pixels: int) -> np.ndarray:
    """One pixel in ten masked, and a run at either end, as a rest-frame grid has."""
    good = rng.random((rows, pixels)) > 0.1
    place = np.arange(pixels)
    good &= (place >= rng.integers(0, pixels // 4, (rows, 1))) & (
        place < rng.integers(3 * pixels // 4, pixels, (rows, 1))
    )
    good[:2] = True
    return good


def fit(spectra: Spectra, wanted: int) -> Components:
    origin = Origin.of(spectra)
    moments = CoMoments.of(spectra, origin)
    return Components.of(moments.mean(origin), moments.covariance, wanted)


def test_unmasked_data_give_the_components_of_scikit_learn(rng: np.random.Generator) -> None:
    data = batch(smooth(rng, 300, 60))
    # The survey is another one than the sample that sums start from.
    moments = CoMoments.of(data, origin := Origin.of(batch(smooth(rng, 50, 60))))
    ours = Components.of(moments.mean(origin), moments.covariance, 5)
    theirs = PCA(5, svd_solver="full").fit(data.flux.astype(np.float64))
    np.testing.assert_allclose(ours.mean, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.values, theirs.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(ours.left, theirs.noise_variance_ * 55 / 60, rtol=1e-9)
    np.testing.assert_allclose(ours.explained, theirs.explained_variance_ratio_.sum(), rtol=1e-9)
    signs = np.sign((ours.axes * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(ours.axes, signs[:, None] * theirs.components_, atol=1e-6)
    c, rest = ours.project(data.flux, data.good)
    np.testing.assert_allclose(c, signs * theirs.transform(data.flux.astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(data.flux - rest, theirs.inverse_transform(signs * c), atol=1e-6)
    # The sign is fixed: the largest entry of each component is positive.
    assert (ours.axes[np.arange(5), np.abs(ours.axes).argmax(axis=1)] > 0).all()


def test_covariance_is_over_spectra_in_which_both_pixels_are_good(rng: np.random.Generator) -> None:
    flux, good = smooth(rng, 2_000, 30), holes(rng, 2_000, 30)
    data = batch(flux, good)
    moments = CoMoments.of(data, origin := Origin.of(data))
    x = np.where(good, data.flux.astype(np.float64), np.nan)
    np.testing.assert_allclose(moments.mean(origin), np.nanmean(x, axis=0), rtol=1e-12)
    # From the text: each pixel's own mean, and all pairs of good pixels. Here shift and mean agree, so it is exact.
    deviation = np.nan_to_num(x - np.nanmean(x, axis=0))
    pairs = good.T.astype(float) @ good
    known = pairs >= 20
    assert 0.9 < known.mean() < 1
    expected = np.where(known, deviation.T @ deviation / np.maximum(pairs - 1, 1), 0)
    np.testing.assert_allclose(moments.covariance, expected, atol=1e-12)
    # pandas takes the means over the same pairs; that differs in the second order of an error of a mean.
    theirs = np.where(known, pd.DataFrame(x).cov().to_numpy(), 0)
    assert (np.abs(moments.covariance - theirs) < 3 / np.maximum(pairs, 1)).all()
    wrong = CoMoments.of(data, Origin(np.zeros(30), origin.reach)).covariance
    assert np.abs(wrong - moments.covariance).max() > 1e-3, "another shift must matter, or this test sees nothing"


def test_moments_do_not_depend_on_the_cut(rng: np.random.Generator) -> None:
    data = batch(smooth(rng, 211, 25), holes(rng, 211, 25))
    origin = Origin.of(data)
    whole = CoMoments.of(data, origin)
    assert (whole.rows, whole.whole) == (211, data.good.all(axis=1).sum())
    for pieces in (2, 7):
        cut = [CoMoments.of(data[part], origin) for part in np.array_split(rng.permutation(211), pieces)]
        for order in (cut, cut[::-1]):
            merged = reduce(add, order)
            np.testing.assert_array_equal(merged.count, whole.count)
            np.testing.assert_allclose(merged.covariance, whole.covariance, atol=1e-13)
            np.testing.assert_allclose(merged.mean(origin), whole.mean(origin), rtol=1e-13)
    # Parts without and with masked pixels are counted in different ways.
    halves = CoMoments.of(data[:2], origin), CoMoments.of(data[2:], origin)
    assert halves[0].pairs is None
    for merged in (halves[0] + halves[1], halves[1] + halves[0]):
        np.testing.assert_allclose(merged.covariance, whole.covariance, atol=1e-13)


def test_runs_of_rows_add_up(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    data = batch(smooth(rng, 90, 20), holes(rng, 90, 20))
    at_once = CoMoments.of(data, origin := Origin.of(data))
    monkeypatch.setattr("distspec.detectors.classical.principal_components._ENTRIES", 140)  # seven rows, or one pixel
    in_runs = CoMoments.of(data, again := Origin.of(data))
    np.testing.assert_allclose(again.shift, origin.shift, rtol=1e-14)
    np.testing.assert_array_equal(again.reach, origin.reach)
    np.testing.assert_allclose(in_runs.covariance, at_once.covariance, atol=1e-13)


def test_masked_pixels_may_hold_anything(rng: np.random.Generator) -> None:
    flux, good = smooth(rng, 60, 20), holes(rng, 60, 20)
    good[:, 3] = False
    good[5] = False
    clean, dirty = batch(np.where(good, flux, 0), good), batch(np.where(good, flux, 0), good)
    dirty.flux[~good] = rng.choice(np.array([np.nan, np.inf, -np.inf, 1e38, -1e30], np.float32), (~good).sum())
    one, two = fit(clean, 4), fit(dirty, 4)
    for name, values in one.to_arrays().items():
        np.testing.assert_array_equal(values, two.to_arrays()[name])
    for ours, theirs in zip(one.project(clean.flux, good), two.project(dirty.flux, good), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_large_fluxes_keep_small_variances(rng: np.random.Generator) -> None:
    data = batch(1e4 + 0.05 * np.round(rng.normal(size=(500, 10)), 1))
    origin = Origin.of(data[:100])
    np.testing.assert_allclose(
        CoMoments.of(data, origin).covariance, np.cov(data.flux.T.astype(np.float64)), rtol=1e-9, atol=1e-12
    )


def test_a_wild_spectrum_costs_one_component_at_most(rng: np.random.Generator) -> None:
    flux = smooth(rng, 1_000, 40)
    clean = fit(batch(flux), 3)
    flux[17] = 1e30
    wild = fit(batch(flux), 4)
    found = np.linalg.norm(clean.axes @ wild.axes.T, axis=1)
    assert (found > 0.99).all()  # the length of each true component inside of the space that was found
    np.testing.assert_allclose(wild.mean, clean.mean, atol=1.5)
    assert np.isfinite(wild.values).all()


def test_pixels_that_are_rarely_good(rng: np.random.Generator) -> None:
    flux, good = smooth(rng, 1_000, 12), np.ones((1_000, 12), bool)
    good[:, 4] = False
    good[:3, 7], good[3:, 7] = True, False
    data = batch(flux, good)
    origin = Origin.of(data[5:])
    assert np.isfinite(origin.shift).all()
    np.testing.assert_allclose(origin.shift[4], origin.shift[[3, 5]].mean())  # as its neighbours are
    moments = CoMoments.of(data, origin)
    covariance = moments.covariance
    # Three spectra of a thousand tell no covariance, but they do tell a mean.
    assert not covariance[[4, 7]].any()
    assert not covariance[:, [4, 7]].any()
    mean = moments.mean(origin)
    np.testing.assert_allclose(mean[7], data.flux[:3, 7].mean(), rtol=1e-6)
    assert mean[4] == origin.shift[4]
    assert np.abs(fit(data, 5).axes[:, [4, 7]]).max() < 1e-12


def test_what_is_left_is_positive_where_eigenvalues_are_too_large(rng: np.random.Generator) -> None:
    flux, good = smooth(rng, 2_000, 80), holes(rng, 2_000, 80)
    model = fit(batch(flux, good), 12)
    assert model.variance * 80 < model.values.sum(), "eigenvalues must be too large, or this test shows nothing"
    assert 0.5 * 0.05**2 < model.left < 4 * 0.05**2  # noise of 0.05, and the error of the covariances
    assert 0.9 < model.explained < 1


# --- projection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [4, 30])  # 30 have 465 products, made in two goes
def test_masked_projection_is_the_least_squares_of_the_text(rng: np.random.Generator, wanted: int) -> None:
    flux, good = smooth(rng, 400, 80), holes(rng, 400, 80)
    model = fit(batch(flux, good), wanted)
    assert len(model.values) == wanted
    c, rest = model.project(flux, good)
    for row in range(20):
        kept, m = good[row], good[row].mean()
        part = model.axes[:, kept]
        normal = part @ part.T + (1 - m) * model.left * np.diag(1 / model.values)
        expected = np.linalg.solve(normal, part @ (flux[row] - model.mean)[kept])
        np.testing.assert_allclose(c[row], expected, rtol=1e-8, atol=1e-10)
        left = flux[row] - model.mean - expected @ model.axes
        np.testing.assert_allclose(rest[row], np.where(kept, left, 0), atol=1e-8)


def test_masked_projection_recovers_what_has_no_noise(rng: np.random.Generator) -> None:
    flux = smooth(rng, 200, 60, noise=0.0)
    model = fit(batch(flux), 8)
    assert len(model.values) == 3, "float32's rounding is no component"
    good = holes(rng, 200, 60)
    full, _ = model.project(flux, np.ones_like(good))
    c, rest = model.project(flux, good)
    np.testing.assert_allclose(c, full, atol=1e-3 * np.sqrt(model.values[0]))
    assert np.abs(rest).max() < 1e-3


def test_projection_moves_little_when_one_pixel_is_lost(rng: np.random.Generator) -> None:
    flux = smooth(rng, 300, 500)
    model = fit(batch(flux), 3)
    good = np.ones(flux.shape, bool)
    whole, _ = model.project(flux, good)
    good[:, 250] = False
    lost, _ = model.project(flux, good)
    assert 0 < np.abs(lost - whole).max() < 0.02 * np.sqrt(model.values[-1])


def test_few_good_pixels_stay_near_the_mean(rng: np.random.Generator) -> None:
    flux = smooth(rng, 300, 100)
    model = fit(batch(flux), 10)
    good = np.zeros(flux.shape, bool)
    good[0, 40] = True  # one pixel for ten components
    c, rest = model.project(flux, good)
    assert (np.abs(c[0]) < 5 * np.sqrt(model.values)).all()
    assert np.count_nonzero(rest[0]) <= 1
    assert np.isnan(c[1:]).all()
    assert not rest[1:].any()


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_spectra_that_do_not_differ_have_no_component(rows: int) -> None:
    data = batch(np.full((rows, 10), 3.0))
    model = fit(data, 4)
    assert model.axes.shape == (0, 10)
    assert (model.variance, model.explained, model.left) == (0, 0, 0)
    c, rest = model.project(data.flux + 1, data.good)
    assert c.shape == (rows, 0)
    np.testing.assert_array_equal(rest, np.ones((rows, 10)))


def test_no_more_components_than_the_rank(rng: np.random.Generator) -> None:
    twins = np.repeat(smooth(rng, 3, 40), 20, axis=0)
    model = fit(batch(twins), 10)
    assert len(model.values) == 2  # three points lie in a plane
    assert model.explained == pytest.approx(1, abs=2e-6)
    assert len(fit(batch(smooth(rng, 50, 6)), 100).values) == 6


def test_arrays_make_it_again(rng: np.random.Generator) -> None:
    model = fit(batch(smooth(rng, 50, 12)), 3)
    again = Components.from_arrays(model.to_arrays(), 12)
    for name, values in model.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], values)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("axes", lambda a: a * 1.1),
        ("axes", lambda a: a[:, :-1]),
        ("axes", lambda a: a.astype(np.float32)),
        ("values", lambda a: a[::-1].copy()),
        ("values", lambda a: -a),
        ("values", lambda a: a[:1]),
        ("mean", lambda a: np.where(a == a[3], np.nan, a)),
        ("variance", lambda a: -a),
        ("variance", lambda a: a * 0),
        ("variance", lambda a: a[:1]),
        ("mean", None),
    ],
)
def test_damaged_arrays_are_refused(rng: np.random.Generator, name: str, damage: object) -> None:
    arrays = fit(batch(smooth(rng, 50, 12)), 3).to_arrays()
    if callable(damage):
        arrays[name] = np.asarray(damage(arrays[name]))
    else:
        del arrays[name]
    with pytest.raises(ValueError, match=r"axes|eigenvalues|variances|array"):
        Components.from_arrays(arrays, 12)


def test_a_reach_of_nothing_is_refused(rng: np.random.Generator) -> None:
    arrays = Origin.of(batch(smooth(rng, 50, 12))).to_arrays()
    assert Origin.from_arrays(arrays, 12).to_arrays() == arrays
    with pytest.raises(ValueError, match="reach"):
        Origin.from_arrays(arrays | {"reach": np.zeros(12)}, 12)
    with pytest.raises(ValueError, match="shift"):
        Origin.from_arrays(arrays, 13)
