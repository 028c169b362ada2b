"""Rebinning: against spectres, np.interp and plain loops, and the laws that hold for every method."""

import sys
from typing import Any, get_args

import numpy as np
import pytest
import spectres
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.prepare.rebin import Method, rebin
from distspec.spectra import WaveGrid

pytestmark = pytest.mark.numeric

SOURCE = WaveGrid("log", 3600.0, 1e-4, 4000)
LINEAR = WaveGrid("linear", 3600.0, 0.8, 7000)
METHODS = get_args(Method)

GRID = WaveGrid.between("log", 3800.0, 6000.0, 300)

grids = st.builds(
    lambda scale, first, span, pixels: WaveGrid.between(scale, first, first * span, pixels),
    st.sampled_from(["log", "linear"]),
    st.floats(2000, 9000),
    st.floats(1.05, 2.5),
    st.integers(20, 300),
)


def covering(scale: str, low: float, high: float, pixels: int) -> WaveGrid:
    """Grid whose outer edges are exactly low and high."""
    if scale == "log":
        step = np.log10(high / low) / pixels
        return WaveGrid("log", float(low * 10 ** (step / 2)), float(step), pixels)
    step = (high - low) / pixels
    return WaveGrid("linear", float(low + step / 2), float(step), pixels)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (SOURCE, WaveGrid.between("log", 3800.0, 6500.0, 700)),
        (LINEAR, WaveGrid.between("linear", 3800.0, 6500.0, 900)),
        (LINEAR, WaveGrid.between("log", 3800.0, 6500.0, 500)),
        (SOURCE, WaveGrid.between("linear", 3800.0, 6500.0, 6000)),
    ],
    ids=["log-log", "linear-linear", "linear-log", "finer"],
)
def test_rebin_agrees_with_spectres(
    source: WaveGrid, target: WaveGrid, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = np.array([0.0, 0.013, 0.05, 0.11, 0.2, 0.31])
    flux = rng.normal(5, 1, (len(z), source.pixels))
    ivar = rng.uniform(0.5, 3, flux.shape)
    ours, weights = rebin(flux, ivar, source, target, z)
    for i in range(len(z)):
        edges = {len(source.wave): source.edges, len(target.wave): target.edges * (1 + z[i])}

        def make_bins(wave: Any, edges: Any = edges) -> Any:
            # SpectRes puts edges midway between centers in Å, a WaveGrid midway in its own scale.
            return edges[len(wave)], np.diff(edges[len(wave)])

        if not source.scale == target.scale == "linear":
            monkeypatch.setattr(sys.modules["spectres.spectral_resampling"], "make_bins", make_bins)
        theirs, error = spectres.spectres(
            target.wave * (1 + z[i]), source.wave, flux[i], ivar[i] ** -0.5, fill=0.0, verbose=False
        )
        inside = theirs != 0
        assert inside.mean() > 0.6
        np.testing.assert_allclose(ours[i, inside], theirs[inside], rtol=1e-8)
        np.testing.assert_allclose(weights[i, inside] ** -0.5, error[inside], rtol=1e-8)


def slow_rebin(flux: Any, ivar: Any, source: WaveGrid, target: WaveGrid, z: float) -> tuple[Any, Any]:
    """The definition, from the dense matrix of all overlaps of one spectrum."""
    edges, bins = source.edges, target.edges * (1 + z)
    w = np.minimum(edges[None, 1:], bins[1:, None]) - np.maximum(edges[None, :-1], bins[:-1, None])
    w = np.maximum(w, 0) * (ivar > 0)
    good = w.sum(1) >= 0.5 * np.diff(bins)
    variance = (w**2) @ np.where(ivar > 0, 1 / np.where(ivar > 0, ivar, 1), 0)
    total = np.where(good, w.sum(1), 1)
    return np.where(good, w @ flux / total, 0), np.where(good, total**2 / np.where(good, variance, 1), 0)


@settings(max_examples=150, deadline=None)
@given(source=grids, target=grids, z=st.floats(-0.2, 3.0), seed=st.integers(0, 2**32 - 1))
def test_rebin_is_the_sum_over_all_overlaps(source: WaveGrid, target: WaveGrid, z: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    flux = rng.normal(1, 1, source.pixels)
    ivar = rng.uniform(0.5, 2, source.pixels) * (rng.random(source.pixels) > 0.2)
    ours, weights = rebin(flux[None], ivar[None], source, target, np.array([z]))
    theirs, expected = slow_rebin(flux, ivar, source, target, z)
    both = (weights[0] > 0) & (expected > 0)
    assert ((weights[0] > 0) != (expected > 0)).sum() <= 1  # a bin covered by half may round either way
    np.testing.assert_allclose(ours[0, both], theirs[both], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights[0, both], expected[both], rtol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    source=grids,
    scale=st.sampled_from(["log", "linear"]),
    pixels=st.integers(2, 400),
    z=st.floats(-0.5, 6.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_rebin_conserves_flux(source: WaveGrid, scale: str, pixels: int, z: float, seed: int) -> None:
    target = covering(scale, source.edges[0] / (1 + z), source.edges[-1] / (1 + z), pixels)
    flux = np.random.default_rng(seed).uniform(0.5, 2, (1, source.pixels))
    ours, weights = rebin(flux, np.ones_like(flux), source, target, np.array([z]))
    before = (flux * np.diff(source.edges)).sum()
    assert (weights > 0).all()
    assert (ours * np.diff(target.edges) * (1 + z)).sum() == pytest.approx(before, rel=1e-10)


def test_variance_of_the_sum_is_that_of_independent_pixels() -> None:
    source, target = WaveGrid("linear", 4000.5, 1.0, 100), WaveGrid("linear", 4002.0, 4.0, 25)
    flux, ivar = rebin(np.full((1, 100), 3.0), np.full((1, 100), 0.25), source, target, np.zeros(1))
    np.testing.assert_allclose(flux, 3.0, rtol=1e-12)
    np.testing.assert_allclose(ivar, 1.0, rtol=1e-8)  # four pixels of variance 4


def test_half_covered_bins_are_kept_and_emptier_ones_masked() -> None:
    source, target = WaveGrid("linear", 4000.5, 1.0, 12), WaveGrid("linear", 4002.0, 4.0, 4)
    ivar = np.ones((1, 12))
    ivar[0, [0, 1, 4, 5, 6]] = 0
    flux, weights = rebin(np.arange(12.0)[None], ivar, source, target, np.zeros(1))
    np.testing.assert_allclose(flux, [[2.5, 0, 9.5, 0]], atol=1e-12)
    np.testing.assert_allclose(weights, [[2, 0, 4, 0]], atol=1e-12)


def test_coinciding_edges_leak_nothing() -> None:
    source = WaveGrid("log", 3600.0, 1e-4, 3000)
    target = WaveGrid("log", float(source.wave[200]), 1e-4, 2500)
    flux = np.ones((1, 3000))
    flux[0, 1000] = 1e30
    out, _ = rebin(flux, np.ones_like(flux), source, target, np.zeros(1))
    assert out[0, 800] == pytest.approx(1e30)
    np.testing.assert_allclose(np.delete(out[0], 800), 1.0, rtol=1e-9)


# --- plain mean of the pixels inside ----------------------------------------------------------------------------------


def slow_average(flux: Any, ivar: Any, source: WaveGrid, target: WaveGrid, z: float) -> tuple[Any, Any]:
    """The definition, bin by bin."""
    values, weights = np.zeros((2, target.pixels))
    edges = target.edges * (1 + z)
    for j in range(target.pixels):
        inside = (source.wave >= edges[j]) & (source.wave < edges[j + 1]) & (ivar > 0)
        if inside.any():
            values[j] = flux[inside].mean()
            weights[j] = inside.sum() ** 2 / (1 / ivar[inside]).sum()
    return values, weights


@settings(max_examples=150, deadline=None)
@given(source=grids, target=grids, z=st.floats(-0.2, 3.0), seed=st.integers(0, 2**32 - 1))
def test_average_is_the_mean_of_the_pixels_inside(source: WaveGrid, target: WaveGrid, z: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    flux = rng.normal(1, 1, source.pixels)
    ivar = rng.uniform(0.5, 2, source.pixels) * (rng.random(source.pixels) > 0.2)
    ours, weights = rebin(flux[None], ivar[None], source, target, np.array([z]), "average")
    theirs, expected = slow_average(flux, ivar, source, target, z)
    position = source.position(target.edges * (1 + z))
    near = np.abs(position - np.rint(position)) < 1e-6  # a center on an edge may round into either bin
    sure = ~(near[1:] | near[:-1])
    np.testing.assert_allclose(ours[0, sure], theirs[sure], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights[0, sure], expected[sure], rtol=1e-9)


def test_average_by_hand() -> None:
    source, target = WaveGrid("linear", 4000.0, 1.0, 12), WaveGrid("linear", 4001.5, 4.0, 4)
    ivar = np.full((1, 12), 0.25)
    ivar[0, [0, 4, 5, 6, 7]] = 0
    flux, weights = rebin(np.arange(12.0)[None], ivar, source, target, np.zeros(1), "average")
    # Bins 3999.5-4003.5-4007.5-4011.5-4015.5: pixels 1, 2, 3; none that is good; 8 to 11; none at all.
    assert flux.tolist() == [[2.0, 0.0, 9.5, 0.0]]
    np.testing.assert_allclose(weights, [[0.75, 0, 1.0, 0]], rtol=1e-12)


def test_a_center_on_an_edge_belongs_to_the_redder_bin_only() -> None:
    source, target = WaveGrid("linear", 4000.0, 1.0, 9), WaveGrid("linear", 4001.0, 2.0, 4)  # edges at 4000, 4002 ...
    flux, _ = rebin(np.arange(9.0)[None], np.ones((1, 9)), source, target, np.zeros(1), "average")
    assert flux.tolist() == [[0.5, 2.5, 4.5, 6.5]]
    log = WaveGrid("log", 3600.0, 1e-4, 4000)
    shifted = WaveGrid("log", float(10 ** (np.log10(3600.0) + 1.5e-4)), 4e-4, 900)
    flux, weights = rebin(np.ones((1, 4000)), np.ones((1, 4000)), log, shifted, np.zeros(1), "average")
    assert (flux == 1).all()
    assert (weights == 4).all()


# --- linear interpolation ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(source=grids, target=grids, z=st.floats(-0.2, 3.0), seed=st.integers(0, 2**32 - 1))
def test_linear_is_numpy_interp(source: WaveGrid, target: WaveGrid, z: float, seed: int) -> None:
    """interpolate.py: NaN where masked, np.interp of flux and variance at the shifted centers, NaN outside."""
    rng = np.random.default_rng(seed)
    flux = rng.normal(1, 1, source.pixels)
    ivar = rng.uniform(0.5, 2, source.pixels) * (rng.random(source.pixels) > 0.2)
    ours, weights = rebin(flux[None], ivar[None], source, target, np.array([z]), "linear")
    wave = target.wave * (1 + z)
    variance = np.where(ivar > 0, 1 / np.where(ivar > 0, ivar, 1), np.nan)
    expected = np.interp(wave, source.wave, np.where(ivar > 0, flux, np.nan), left=np.nan, right=np.nan)
    spread = np.interp(wave, source.wave, variance, left=np.nan, right=np.nan)
    position = source.position(wave)
    sure = np.abs(position - np.rint(position)) > 1e-6  # on a node, rounding decides which neighbor counts
    assert ((weights[0] > 0) == np.isfinite(expected))[sure].all()
    both = sure & (weights[0] > 0)
    np.testing.assert_allclose(ours[0, both], expected[both], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(1 / weights[0, both], spread[both], rtol=1e-8)


def test_linear_on_a_node_needs_no_neighbor() -> None:
    source, target = WaveGrid("linear", 4000.0, 1.0, 5), WaveGrid("linear", 4000.0, 2.0, 4)
    ivar = np.array([[1.0, 0.0, 1.0, 0.0, 1.0]])
    flux, weights = rebin(np.arange(5.0)[None], ivar, source, target, np.zeros(1), "linear")
    assert flux.tolist() == [[0.0, 2.0, 4.0, 0.0]]  # the last is outside
    assert weights.tolist() == [[1.0, 1.0, 1.0, 0.0]]


# --- laws of all methods ----------------------------------------------------------------------------------------------


def measured(rng: np.random.Generator, n: int, source: WaveGrid) -> tuple[Any, Any]:
    flux = rng.normal(5, 1, (n, source.pixels))
    return flux, rng.uniform(0.5, 3, flux.shape) * (rng.random(flux.shape) > 0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [SOURCE, LINEAR], ids=["log", "linear"])
def test_its_own_grid_changes_no_bit(method: Method, grid: WaveGrid, rng: np.random.Generator) -> None:
    flux, ivar = measured(rng, 40, grid)
    flux[ivar == 0] = np.nan
    out, weights = rebin(flux, ivar, grid, grid, np.zeros(40), method)
    assert out.tobytes() == np.where(ivar > 0, flux, 0.0).tobytes()
    assert weights.tobytes() == ivar.tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [SOURCE, WaveGrid.between("linear", 3900.0, 6000.0, 1300)], ids=["own", "other"])
def test_a_row_depends_on_nothing_else(method: Method, target: WaveGrid, rng: np.random.Generator) -> None:
    flux, ivar = measured(rng, 70, SOURCE)
    z = rng.uniform(0, 0.2, 70)
    z[::9], z[5] = 0.0, np.nan
    whole = rebin(flux, ivar, SOURCE, target, z, method)
    for index in (np.array([0]), np.array([5]), np.array([69, 3, 9]), slice(20, 60)):
        part = rebin(flux[index], ivar[index], SOURCE, target, z[index], method)
        assert all(a.tobytes() == b[index].tobytes() for a, b in zip(part, whole, strict=True))
    flux[ivar == 0] = 1e30
    assert rebin(flux, ivar, SOURCE, target, z, method)[0].tobytes() == whole[0].tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("z", [np.nan, np.inf, -1.0, -3.0])
@pytest.mark.parametrize("target", [SOURCE, GRID], ids=["own", "other"])
def test_a_spectrum_without_a_place_is_masked(method: Method, z: float, target: WaveGrid) -> None:
    out, weights = rebin(np.ones((2, 4000)), np.ones((2, 4000)), SOURCE, target, np.array([z, 0.0]), method)
    assert not out[0].any()
    assert not weights[0].any()
    assert weights[1].all()


@pytest.mark.parametrize("method", METHODS)
def test_out_of_reach_is_masked(method: Method) -> None:
    for target in (WaveGrid("log", 9500.0, 1e-4, 50), WaveGrid("linear", 900.0, 2.0, 50)):
        out, weights = rebin(np.ones((1, 4000)), np.ones((1, 4000)), SOURCE, target, np.zeros(1), method)
        assert not out.any()
        assert not weights.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_level_stays_a_level(method: Method) -> None:
    out, weights = rebin(np.full((3, 4000), 7.0), np.ones((3, 4000)), SOURCE, GRID, np.array([0, 0.1, 0.3]), method)
    assert (weights > 0).any(axis=1).all()
    np.testing.assert_allclose(out[weights > 0], 7.0, rtol=1e-12)
