"""Planted anomalies have their known places and sizes on the grid, at rest and as observed."""

import numpy as np
import pytest

from distspec.config import Cuts, Grid, Prepare
from distspec.prepare.rebin import rebin
from distspec.sources.simulation.anomalies import ANOMALIES, spoil
from distspec.sources.simulation.instrument import DICHROIC, OH_BANDS
from distspec.sources.simulation.survey import SDSS_GRID
from distspec.spectra import LIGHT_SPEED, Spectra
from distspec.stages.evaluate.injection import inject
from distspec.statistics.summaries import row_mean, row_median
from tests.stages.evaluate.test_injection import FRAMES, flat, made, plain


@pytest.mark.parametrize("frame", FRAMES)
def test_extreme_lines_are_at_their_places_and_as_wide_as_stated(frame: str) -> None:
    settings = plain(frame)
    z = np.linspace(0.02, 0.35, 30)
    hosts = flat(settings, z, level=3.0)
    shift = np.ones(30) if frame == "rest" else 1.0 + z
    wave, width = hosts[0].grid.wave, np.diff(hosts[0].grid.edges)
    planted = made("extreme-lines", hosts, 1.0, settings)
    for line in (5008.24, 6564.61):
        pixel = np.abs(wave - line * shift[:, None]).argmin(axis=1)
        assert planted.region[np.arange(30), pixel].all()
    assert not planted.region[np.abs(wave - 5500.0 * shift[:, None]) < 200].any()
    near = np.abs(wave - 6564.61 * shift[:, None]) < 60 * shift[:, None]
    total = np.where(near, (planted.spectra.flux / 3.0 - 1.0) * width, 0.0).sum(axis=1) / shift
    # [N II] adds 3-6 %.
    assert (total > 600).all()
    assert (total < 1300 * 1.07).all()
    assert total.max() > 1.5 * total.min()
    half = made("extreme-lines", hosts, 0.5, settings).spectra.flux
    np.testing.assert_allclose(2 * (half - 3.0), planted.spectra.flux - 3.0, rtol=1e-4, atol=1e-5)


def test_double_peaks_are_two() -> None:
    fine = plain(grid=Grid(first=4900.0, last=5900.0, pixels=800))
    hosts = flat(fine, np.full(20, 0.1))
    planted = made("double-peaked", hosts, 1.0, fine)
    wave = hosts[0].grid.wave
    flux = planted.spectra.flux[:, np.abs(wave - 5008.24) < 14]
    inner = flux[:, 1:-1]
    peaks = ((inner > flux[:, :-2]) & (inner > flux[:, 2:]) & (inner > 1.2)).sum(axis=1)
    np.testing.assert_array_equal(peaks, 2)
    # Neither peak is where the line should be, and the region holds both.
    middle = planted.spectra.flux[:, np.abs(wave - 5008.24).argmin()]
    assert (middle < 0.9 * inner.max(axis=1)).all()
    for side in (wave < 5008.24, wave >= 5008.24):
        pixel = np.where(side, planted.spectra.flux, 0.0)[:, np.abs(wave - 5008.24) < 14].argmax(axis=1)
        assert planted.region[:, np.abs(wave - 5008.24) < 14][np.arange(20), pixel].all()


def test_sodium_is_absorbed_blueward_and_optical_depths_scale() -> None:
    hosts = flat(plain(), np.linspace(0.05, 0.2, 30))
    one, two = (made("blueshifted-na-d", hosts, strength, plain()) for strength in (1.0, 2.0))
    wave = hosts[0].grid.wave
    deepest = wave[one.spectra.flux.argmin(axis=1)]
    velocity = (deepest / 5894.5 - 1) * LIGHT_SPEED
    # Between the two lines of the doublet, 300 km/s apart, on pixels of 270 km/s.
    assert (velocity > -800 - 300).all()
    assert (velocity < -350 + 300).all()
    np.testing.assert_allclose(two.spectra.flux, one.spectra.flux**2, rtol=1e-5)
    depth = 1 - one.spectra.flux.min(axis=1)
    assert (depth > 0.25).all()
    assert (depth < 0.85).all()
    assert one.region[np.arange(30), one.spectra.flux.argmin(axis=1)].all()
    np.testing.assert_array_equal(one.spectra.ivar, hosts[0].ivar)


@pytest.mark.parametrize("frame", FRAMES)
def test_an_arm_is_scaled_at_the_dichroic_with_its_errors(frame: str) -> None:
    settings = plain(frame)
    z = np.linspace(0.02, 0.3, 20)
    hosts = flat(settings, z, level=2.0)
    at = DICHROIC / (1 + z) if frame == "rest" else np.full(20, DICHROIC)
    wave = hosts[0].grid.wave
    red = wave >= at[:, None]
    one, half = (made("arm-step", hosts, strength, settings) for strength in (1.0, 0.5))
    small = np.where((red.sum(axis=1) <= wave.size / 2)[:, None], red, ~red)
    assert (one.spectra.flux[~small] == 2).all()
    factor = one.spectra.flux.max(axis=1) / one.spectra.flux.min(axis=1)
    assert (factor >= 1.4 - 1e-6).all()
    assert (factor <= 1.8 + 1e-6).all()
    assert {True, False} == set((np.where(small, one.spectra.flux, 2).max(axis=1) > 2).tolist())  # up and down
    np.testing.assert_allclose(half.spectra.flux / 2, np.sqrt(one.spectra.flux / 2), rtol=1e-6)
    np.testing.assert_allclose(one.spectra.flux * np.sqrt(one.spectra.ivar), 2 * 20.0, rtol=1e-6)
    assert one.region[small].all()
    beyond = np.where(small, 0.0, np.abs(wave - at[:, None]) * (wave / wave if frame == "observed" else 1 + z[:, None]))
    assert not one.region[beyond > 110].any()
    assert one.region[~small & (beyond > 0) & (beyond < 95)].all()


def test_a_calibration_step_is_where_it_is_at_every_strength() -> None:
    hosts = flat(plain("observed"), np.full(40, np.nan))
    places = []
    for strength in (0.25, 1.0):
        planted = made("calibration-step", hosts, strength, plain("observed"))
        assert planted.possible.all()
        places.append(np.abs(np.diff(planted.spectra.flux, axis=1)).argmax(axis=1) / hosts[0].grid.pixels)
    np.testing.assert_array_equal(*places)
    assert places[0].min() >= 0.19
    assert places[0].max() <= 0.81
    assert np.ptp(places[0]) > 0.4


def test_a_cosmic_ray_is_as_wide_as_a_detector_pixel_on_every_grid() -> None:
    for pixels in (300, 1000, 8000):
        settings = plain(grid=Grid(pixels=pixels))
        hosts = flat(settings, np.full(30, 0.1), level=2.0)
        planted = made("cosmic-ray", hosts, 1.0, settings)
        change, wave = planted.spectra.flux - 2.0, hosts[0].grid.wave
        highest = change.argmax(axis=1)
        # 25-60 levels on a pixel of 1e-4 in log λ, and up to two more beside it.
        area = (change * np.diff(hosts[0].grid.edges)).sum(axis=1) / (2.0 * wave[highest] * np.log(10) * 1e-4)
        inside = (highest > 3) & (highest < pixels - 4)
        assert (area[inside] >= 25).all()
        assert (area[inside] <= 180).all()
        assert planted.region[np.arange(30), highest].all()
        lit = (change > 0).sum(axis=1)
        assert (lit <= np.ceil(3e-4 / hosts[0].grid.step) + 1).all()


def test_sky_residuals_are_those_of_the_simulator() -> None:
    settings = plain("observed")
    hosts = flat(settings, np.full(50, 0.1))
    planted = made("sky-residual", hosts, 1.0, settings)
    wave = hosts[0].grid.wave
    dice = np.random.default_rng(1).random((50, 4))
    theirs = np.ones((50, SDSS_GRID.pixels), np.float32)
    spoil(theirs, SDSS_GRID.wave, np.full(50, ANOMALIES.index("sky-residual")), dice, np.full(50, 0.1))
    pattern = rebin(theirs - 1.0, np.ones_like(theirs), SDSS_GRID, hosts[0].grid, np.zeros(50))[0]
    # Up to the height that dice decide, each is the same comb.
    assert np.corrcoef(planted.spectra.flux[0] - 1.0, pattern[0])[0, 1] > 0.95
    ratio = planted.spectra.flux.std(axis=1).mean() / pattern.std(axis=1).mean()
    assert ratio == pytest.approx(1.0, abs=0.15)
    bands = np.zeros(wave.size, dtype=bool)
    for low, high in OH_BANDS:
        bands |= (wave > low - 5) & (wave < high + 5)
    assert (planted.spectra.flux[:, ~bands] == 1).all()
    assert not planted.region[:, ~bands].any()


def test_the_red_end_runs_away_where_the_data_end() -> None:
    hosts, z = flat(plain(), np.linspace(0.05, 0.3, 20))
    end = 8000.0
    ivar = np.where(hosts.grid.wave > end, np.float32(0), hosts.ivar)
    planted = made("red-runaway", (Spectra(hosts.rows, hosts.flux, ivar, hosts.grid), z), 1.0, plain())
    flux, wave = planted.spectra.flux, hosts.grid.wave
    last = np.flatnonzero(wave <= end)[-1]
    assert (flux[:, last] >= 3.4).all()
    assert (flux[:, last] <= 6.6).all()
    assert (np.diff(flux[:, : last + 1], axis=1) >= 0).all()
    start = end - 1000.0 / (1 + z)
    assert (flux[wave < start[:, None] - 10] == 1).all()
    assert (planted.region[:, last]).all()
    assert not planted.region[wave < start[:, None]].any()


def one_line(settings: Prepare, z: float, line: float) -> Spectra:
    """A flat companion with one strong, narrow line, line in Å on the grid."""
    spectra = flat(settings, [z], level=5.0)[0]
    spectra.flux[0] += 25.0 * np.exp(-0.5 * ((spectra.grid.wave - line) / 8.0) ** 2)
    return spectra


def test_a_blend_puts_the_companions_lines_where_they_belong() -> None:
    host, companion = 0.1, 0.18
    hosts, z = flat(plain(), [host], level=2.0)
    beside = one_line(plain(), companion, 5000.0)
    planted = inject("blend", hosts, z, 0.5, 1, plain(), beside, np.array([companion]))
    expected = 5000.0 * (1 + companion) / (1 + host)
    wave, flux = hosts.grid.wave, planted.spectra.flux[0]
    good = planted.spectra.good[0]
    assert wave[flux.argmax()] == pytest.approx(expected, abs=5.0)
    assert planted.region[0, flux.argmax()]
    assert np.abs(wave[planted.region[0]] - expected).max() < 30
    # As bright as the host, times the strength.
    assert np.median(flux[good]) == pytest.approx(3.0, rel=1e-3)
    # The companion's blue end was not observed.
    unknown = wave < 3388.0 * (1 + companion) / (1 + host) - 10
    assert unknown.any()
    assert not good[unknown].any()
    assert good[~unknown][10:].all()


def test_a_blend_adds_variances() -> None:
    settings = plain("observed")
    hosts, z = flat(settings, [np.nan], level=2.0, ivar=100.0)
    beside = flat(settings, [np.nan], level=5.0, ivar=4.0)[0]
    planted = inject("blend", hosts, z, 0.5, 1, settings, beside)
    assert planted.possible.all()
    # The companion is brought from 5 to half of 2, and its error with it.
    np.testing.assert_allclose(planted.spectra.flux, 3.0, rtol=1e-6)
    np.testing.assert_allclose(1 / planted.spectra.ivar, 1 / 100 + 0.2**2 / 4, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_a_redshift_error_moves_lines_by_its_velocity(strength: float) -> None:
    z = np.linspace(0.06, 0.2, 12)
    hosts = flat(plain(), z)[0]
    hosts.flux[:] += 5.0 * np.exp(-0.5 * ((hosts.grid.wave - 5008.24) / 10.0) ** 2).astype(np.float32)
    planted = made("redshift-error", (hosts, z), strength, plain())
    change = np.where(planted.spectra.good, planted.spectra.flux - 1.0, 0.0)
    center = (change * hosts.grid.wave).sum(axis=1) / change.sum(axis=1)
    velocity = np.log(center / 5008.24) * LIGHT_SPEED
    np.testing.assert_allclose(np.abs(velocity), np.log1p(3000 * strength / LIGHT_SPEED) * LIGHT_SPEED, atol=15)
    assert {-1.0, 1.0} == set(np.sign(velocity).tolist())
    for wave in (5008.24, center):
        pixel = np.broadcast_to(np.abs(hosts.grid.wave - np.atleast_1d(wave)[:, None]).argmin(axis=1), 12)
        assert planted.region[np.arange(12), pixel].all()
    # In the observed frame flux stays; what a detector is told of the redshift does not.
    seen = flat(plain("observed"), z)
    told = made("redshift-error", seen, strength, plain("observed")).spectra
    assert told.flux.tobytes() == seen[0].flux.tobytes()
    assert told.redshift is not None
    np.testing.assert_allclose((1 + told.redshift) / (1 + z), 5008.24 / center, rtol=5e-5)


def test_a_confused_line_stays_in_the_recipes_range_of_redshifts() -> None:
    settings = plain("observed", cuts=Cuts(z_min=0.02, z_max=0.3))
    hosts = flat(settings, np.linspace(0.03, 0.29, 60))
    planted = made("wrong-redshift", hosts, 1.0, settings)
    wrong = planted.spectra.redshift
    assert wrong is not None
    assert wrong[planted.possible].min() > 0.02
    assert wrong[planted.possible].max() <= 0.3
    ratio = ((1 + wrong) / (1 + hosts[1]))[planted.possible]
    known = np.array([6564.61 / 5008.24, 4862.683 / 5008.24, 6564.61 / 6732.67])
    known = np.concatenate([known, 1 / known])
    distance = np.abs(ratio[:, None] - known)
    np.testing.assert_allclose(distance.min(axis=1), 0.0, atol=1e-6)
    assert len(np.unique(distance.argmin(axis=1))) >= 4
    np.testing.assert_array_equal(wrong[~planted.possible], hosts[1][~planted.possible])


@pytest.mark.parametrize(
    ("kind", "feature"), [("e+a", 4341.7), ("sn-ia", 6140.0), ("two-galaxies", None), ("featureless-blue", None)]
)
def test_a_second_object_is_as_bright_as_the_host(kind: str, feature: float | None) -> None:
    hosts = flat(plain(), np.linspace(0.05, 0.3, 20), level=2.0)
    planted = made(kind, hosts, 1.0, plain())
    np.testing.assert_allclose(row_median(planted.spectra.flux - 2.0, planted.spectra.good), 2.0, rtol=1e-5)
    if feature is not None:
        wave, flux = hosts[0].grid.wave, planted.spectra.flux
        middle, beside = np.abs(wave - feature) < 12, np.abs(np.abs(wave - feature) - 130) < 12
        assert (flux[:, middle].mean(axis=1) < 0.9 * flux[:, beside].mean(axis=1)).all()
        assert planted.region[:, middle].all()


def test_an_m_star_stays_on_earth() -> None:
    """Its band head at 7056 Å is found there in the observer's frame, whatever the host's redshift."""
    z = np.linspace(0.05, 0.3, 20)
    hosts = flat(plain(), z)
    planted = made("m-star-overlap", hosts, 1.0, plain())
    observed = hosts[0].grid.wave * (1 + z)[:, None]
    before, after = (observed > 7020) & (observed < 7050), (observed > 7065) & (observed < 7095)
    drop = row_mean(planted.spectra.flux, after) / row_mean(planted.spectra.flux, before)
    assert (drop < 0.85).all()
    assert planted.region[after].all()
