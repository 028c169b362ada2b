from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.special import ndtr

from distspec.spectra import LIGHT_SPEED, Spectra, WaveGrid
from distspec.spectra.lines.fits import LINES, OXYGEN, measure
from distspec.spectra.lines.tables import LineTable, indices
from distspec.spectra.lines.wavelengths import EMISSION

pytestmark = pytest.mark.numeric

GRID = WaveGrid.between("log", 3388.0, 8318.0, 1000)
FLUXES = {
    "[O II] 3727": 8.0,
    "[O II] 3730": 10.0,
    "H gamma": 3.0,
    "H beta": 7.0,
    "[O III] 5008": 14.0,
    "H alpha": 20.0,
    "[O III] 4960": 14 / 2.98,
    "[N II] 6585": 9.0,
    "[N II] 6550": 9 / 2.94,
    "[S II] 6718": 3.0,
    "[S II] 6733": 2.5,
}


def gaussian(grid: WaveGrid, wave: float, flux: float, velocity: float, sigma: float, z: float = 0.0) -> np.ndarray:
    center, width = wave * (1 + z) * (1 + velocity / LIGHT_SPEED), wave * (1 + z) * sigma / LIGHT_SPEED
    return np.asarray(flux * np.diff(ndtr((grid.edges - center) / width)) / np.diff(grid.edges))


def lined(grid: WaveGrid, fluxes: dict[str, float], velocity: float, sigma: float, z: float = 0.0) -> np.ndarray:
    """A continuum of 1 with lines of the given fluxes (Å at the observer)."""
    parts = (gaussian(grid, EMISSION[name], flux, velocity, sigma, z) for name, flux in fluxes.items())
    return np.asarray(1.0 + sum(parts))


def noisy(grid: WaveGrid, flux: np.ndarray, count: int, noise: float, z: float | None = None) -> Spectra:
    drawn = flux + noise * np.random.default_rng(4).normal(size=(count, grid.pixels))
    redshift = None if z is None else np.full(count, z)
    ivar = np.full(drawn.shape, noise**-2, np.float32)
    return Spectra(np.arange(count), drawn.astype(np.float32), ivar, grid, redshift)


def same(first: LineTable, second: LineTable) -> bool:
    names = ("flux", "flux_error", "width", "width_error", "continuum", "velocity", "sigma", "broad_sigma", "chi2")
    return all(np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True) for name in names)


@pytest.mark.parametrize(
    ("grid", "z"),
    [(GRID, None), (WaveGrid("linear", 3700.0, 2.0, 2200), 0.11), (WaveGrid("log", 3600.0, 2e-4, 1800), 0.05)],
    ids=["log at rest", "linear observed", "log observed"],
)
def test_errors_are_those_that_noise_makes(grid: WaveGrid, z: float | None) -> None:
    spectra = noisy(grid, lined(grid, FLUXES, 60.0, 190.0, z or 0.0), 500, 0.05, z)
    table = measure(spectra)
    pulls = {
        "velocity": (table.velocity - 60) / table.velocity_error,
        "sigma": (table.sigma - 190) / table.sigma_error,
    }
    for name, flux in (FLUXES | {OXYGEN: 18.0, "[O I] 6302": 0.0, "He II 4687": 0.0}).items():
        got, error = table.of(name)
        width, width_error = table.width_of(name)
        pulls[name] = (got - flux) / error
        pulls[f"width of {name}"] = (width - flux / (1 + (z or 0.0))) / width_error
    for name, pull in pulls.items():
        assert abs(pull.mean()) < 0.18, name
        assert 0.9 < pull.std() < 1.1, name
    assert abs(table.chi2.mean() - 1) < 0.02
    assert np.isnan(table.broad_sigma).mean() > 0.99
    assert np.nanmax(abs(table.continuum - 1)) < 0.1


def test_it_is_the_fit_that_a_general_least_squares_makes(rng: np.random.Generator) -> None:
    grid = WaveGrid.between("linear", 6482.0, 6648.0, 120)  # nothing but the complex of H alpha
    truth = (120.0, 180.0, 20.0, 9.0, 1.0, 0.2)

    def model(_: Any, velocity: float, sigma: float, alpha: float, nitrogen: float, low: float, slope: float) -> Any:
        ratio = {"H alpha": alpha, "[N II] 6585": nitrogen, "[N II] 6550": nitrogen / 2.94}
        return lined(grid, ratio, velocity, sigma) - 1 + low + slope * (grid.wave - 6565.0) / 85.0

    noise = rng.uniform(0.03, 0.1, grid.pixels)
    flux = (model(None, *truth) + noise * rng.normal(size=grid.pixels)).astype(np.float32)
    ivar = (noise**-2).astype(np.float32)
    table = measure(Spectra(np.arange(1), flux[None], ivar[None], grid))
    best, covariance = curve_fit(model, grid.wave, flux, truth, ivar**-0.5, absolute_sigma=True, xtol=1e-12, ftol=1e-12)
    errors = np.sqrt(np.diag(covariance))
    found = [table.velocity[0], table.sigma[0], table.of("H alpha")[0][0], table.of("[N II] 6585")[0][0]]
    found_errors = [table.velocity_error[0], table.sigma_error[0], table.of("H alpha")[1][0]]
    np.testing.assert_allclose((np.array(found) - best[:4]) / errors[:4], 0, atol=0.02)
    np.testing.assert_allclose(found_errors, errors[:3], rtol=0.01)
    residual = (flux - model(None, *best)) ** 2 * ivar
    assert table.chi2[0] == pytest.approx(residual.sum() / (grid.pixels - 6), rel=1e-3)
    jacobian = np.zeros(6)
    jacobian[[2, 4]] = 1 / best[4], -best[2] / best[4] ** 2
    width, error = table.width_of("H alpha")
    assert width[0] == pytest.approx(best[2] / best[4], rel=2e-3)
    assert error[0] == pytest.approx(np.sqrt(jacobian @ covariance @ jacobian), rel=0.01)


def test_lines_without_noise_are_recovered_and_doublets_keep_their_ratio() -> None:
    flux = lined(GRID, FLUXES, -150.0, 200.0).astype(np.float32)[None]
    table = measure(Spectra(np.arange(1), flux, np.full_like(flux, 1e4), GRID))
    for name, expected in FLUXES.items():
        assert table.of(name)[0][0] == pytest.approx(expected, abs=0.02), name
        assert table.width_of(name)[0][0] == pytest.approx(expected, abs=0.02), name
    assert table.velocity[0] == pytest.approx(-150, abs=0.5)
    assert table.sigma[0] == pytest.approx(200, abs=0.5)
    assert table.of("[O III] 5008")[0][0] == pytest.approx(2.98 * table.of("[O III] 4960")[0][0])
    assert table.of("[N II] 6585")[1][0] == pytest.approx(2.94 * table.of("[N II] 6550")[1][0])


def test_the_observed_frame_gives_the_same_and_fluxes_of_its_own_axis() -> None:
    rest = noisy(GRID, lined(GRID, FLUXES, 60.0, 190.0), 20, 0.05)
    z = 0.35
    moved = WaveGrid("log", GRID.first * (1 + z), GRID.step, GRID.pixels)
    first, second = measure(rest), measure(Spectra(rest.rows, rest.flux, rest.ivar, moved, np.full(20, z)))
    np.testing.assert_allclose(second.flux, first.flux * (1 + z), rtol=1e-5, atol=1e-5)
    for name in ("width", "width_error", "continuum", "velocity", "sigma", "velocity_error", "chi2"):
        np.testing.assert_allclose(getattr(second, name), getattr(first, name), rtol=1e-4, atol=1e-4)
    a, b = indices(rest), indices(Spectra(rest.rows, rest.flux, rest.ivar, moved, np.full(20, z)))
    np.testing.assert_allclose(a.d4000, b.d4000, rtol=1e-6)
    np.testing.assert_allclose(a.h_delta, b.h_delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [1e-17, 1e6])
def test_any_unit_of_flux_will_do(unit: float) -> None:
    spectra = noisy(GRID, lined(GRID, FLUXES, 60.0, 190.0), 30, 0.05)
    scaled = Spectra(spectra.rows, spectra.flux * np.float32(unit), spectra.ivar * np.float32(unit**-2), GRID)
    first, second = measure(spectra), measure(scaled)
    np.testing.assert_allclose(second.flux / unit, first.flux, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(second.flux_error / unit, first.flux_error, rtol=1e-3)
    for name in ("width", "velocity", "sigma_error", "chi2"):
        np.testing.assert_allclose(getattr(second, name), getattr(first, name), rtol=1e-3, atol=1e-3)


def test_masked_pixels_have_no_influence(rng: np.random.Generator) -> None:
    spectra = noisy(GRID, lined(GRID, FLUXES, 60.0, 190.0), 60, 0.05)
    masked = rng.random(spectra.flux.shape) < 0.1
    ivar = np.where(masked, np.float32(0), spectra.ivar)
    tables = []
    for garbage in (0.0, np.nan, 1e30, -np.inf):
        flux = np.where(masked, np.float32(garbage), spectra.flux)
        part = Spectra(spectra.rows, flux, ivar, GRID)
        tables.append((measure(part), indices(part)))
    for table, index in tables[1:]:
        assert same(table, tables[0][0])
        assert np.array_equal(index.h_delta, tables[0][1].h_delta, equal_nan=True)
        assert np.array_equal(index.d4000_error, tables[0][1].d4000_error, equal_nan=True)
    pull = (tables[0][0].of("H alpha")[0] - 20) / tables[0][0].of("H alpha")[1]
    assert abs(np.nanmean(pull)) < 0.5 and 0.75 < np.nanstd(pull) < 1.25


def test_a_line_off_the_good_pixels_is_not_measured_and_others_are() -> None:
    spectra = noisy(GRID, lined(GRID, FLUXES, 0.0, 190.0), 3, 0.02)
    spectra.ivar[1, abs(GRID.wave - EMISSION["H alpha"]) < 7] = 0
    spectra.ivar[2, GRID.wave > EMISSION["[O III] 5008"]] = 0
    table = measure(spectra)
    assert np.isfinite(table.of("H alpha")[0]).tolist() == [True, False, False]
    assert np.isfinite(table.width_of("H alpha")[1]).tolist() == [True, False, False]
    assert np.isfinite(table.of("[O III] 5008")[0]).tolist() == [True, True, False]
    assert np.isfinite(table.of("[O III] 4960")[0]).all()
    assert table.of("[O III] 4960")[0][2] == pytest.approx(14 / 2.98, abs=1)
    assert np.isfinite(table.of("[N II] 6585")[0]).tolist() == [True, True, False]
    assert np.isnan(table.of("C IV 1549")[0]).all()


def test_noise_alone_holds_no_line() -> None:
    table = measure(noisy(GRID, np.ones(GRID.pixels), 800, 0.1))
    assert np.isnan(table.velocity).mean() > 0.99 and np.isnan(table.sigma).mean() > 0.99
    assert np.isnan(table.broad_sigma).all()
    still = table[np.isnan(table.velocity)]
    for name in LINES[:18]:
        flux, error = still.of(name)
        assert abs((flux / error).mean()) < 0.15, name
        assert 0.9 < (flux / error).std() < 1.1, name


def test_a_wrong_redshift_shows_as_a_velocity() -> None:
    for velocity in (-1200.0, 800.0):
        table = measure(noisy(GRID, lined(GRID, FLUXES, velocity, 190.0), 30, 0.05))
        assert (abs(table.velocity - velocity) < 5 * table.velocity_error).all()


def test_a_broad_component_is_found_where_there_is_one() -> None:
    flux = lined(GRID, FLUXES, 30.0, 190.0)
    flux = flux + gaussian(GRID, EMISSION["H alpha"], 60.0, 100.0, 2300.0)
    flux = flux + gaussian(GRID, EMISSION["H beta"], 20.0, 100.0, 2300.0)
    table = measure(noisy(GRID, flux, 100, 0.03))
    assert np.isfinite(table.broad_sigma).mean() > 0.95
    for pull in (
        (table.broad_sigma - 2300) / table.broad_sigma_error,
        (table.of("broad H alpha")[0] - 60) / table.of("broad H alpha")[1],
        (table.of("H alpha")[0] - 20) / table.of("H alpha")[1],
        (table.velocity - 30) / table.velocity_error,
    ):
        assert abs(np.nanmean(pull)) < 0.4 and 0.75 < np.nanstd(pull) < 1.25
    plain = measure(noisy(GRID, lined(GRID, FLUXES, 30.0, 190.0), 300, 0.01))
    assert np.isnan(plain.broad_sigma).all()
    assert np.isnan(plain.of("broad H beta")[0]).all()


def test_broad_ultraviolet_lines_have_widths_of_their_own() -> None:
    grid = WaveGrid.between("log", 3600.0, 9800.0, 2000)
    flux = 1 + gaussian(grid, EMISSION["C IV 1549"], 150.0, -400.0, 2000.0, 2.2)
    flux = flux + gaussian(grid, EMISSION["C III] 1909"], 80.0, 200.0, 3000.0, 2.2)
    table = measure(noisy(grid, flux, 100, 0.1, 2.2))
    for name, expected in (("C IV 1549", 150.0), ("C III] 1909", 80.0)):
        pull = (table.of(name)[0] - expected) / table.of(name)[1]
        assert abs(pull.mean()) < 0.4 and 0.8 < pull.std() < 1.2
        assert np.median(table.width_of(name)[0]) == pytest.approx(expected / 3.2, rel=0.05)
    assert np.isnan(table.velocity).all() and np.isnan(table.of("H alpha")[0]).all()


def test_absorption_has_negative_width_and_no_velocity() -> None:
    flux = lined(GRID, {"H beta": -4.0, "H delta": -4.0, "H gamma": -4.0, "H alpha": -3.0}, 0.0, 300.0)
    table = measure(noisy(GRID, flux, 50, 0.05))
    assert np.isnan(table.velocity).mean() > 0.95
    assert (table.width_of("H beta")[0] < -1).all()


def test_spectra_do_not_depend_on_their_neighbours_and_unknown_redshifts_give_nothing() -> None:
    spectra = noisy(GRID, lined(GRID, FLUXES, 60.0, 190.0, 0.02), 300, 0.05, 0.02)
    assert spectra.redshift is not None
    spectra.redshift[[3, 7]] = np.nan, -1.0
    spectra.ivar[5] = 0
    table, alone = measure(spectra), measure(spectra[290:291])
    for name in ("flux", "flux_error", "velocity", "width", "sigma_error", "chi2"):
        np.testing.assert_allclose(getattr(table, name)[290:291], getattr(alone, name), rtol=1e-6)
    nothing = table[[3, 5, 7]]
    assert np.isnan(nothing.flux).all() and np.isnan(nothing.velocity).all() and np.isnan(nothing.chi2).all()
    assert np.isnan(indices(spectra).d4000[[3, 5, 7]]).all()
    assert len(measure(spectra[:0])) == 0 and measure(spectra[:0]).flux.shape == (0, len(LINES))


def test_a_spectrum_measures_the_same_beside_others_at_any_redshift() -> None:
    grid = WaveGrid.between("log", 3700.0, 9000.0, 1600)
    redshifts, parts = np.array([0.02, 0.45, 0.8, 1.9]), []
    for z in redshifts:
        flux = lined(grid, FLUXES | {"Mg II 2799": 8.0}, 60.0, 190.0, z)
        flux = flux + gaussian(grid, EMISSION["H beta"], 40.0, 0.0, 1800.0, z)
        parts.append(noisy(grid, flux + gaussian(grid, EMISSION["H alpha"], 90.0, 0.0, 1800.0, z), 1, 0.03, z))
    flux, ivar = (np.concatenate([getattr(part, name) for part in parts]) for name in ("flux", "ivar"))
    table = measure(Spectra(np.arange(4), flux, ivar, grid, redshifts))
    for row, part in enumerate(parts):
        alone = measure(part)
        for name in ("flux", "flux_error", "width", "velocity", "sigma_error", "broad_sigma", "chi2"):
            np.testing.assert_allclose(getattr(table, name)[row : row + 1], getattr(alone, name), rtol=1e-5, atol=1e-8)
    assert np.isfinite(table.broad_sigma).tolist() == [True, True, True, False]
    assert np.isfinite(table.of("Mg II 2799")[0]).tolist() == [False, True, True, True]


def test_the_break_of_a_step_is_its_height() -> None:
    grid = WaveGrid("linear", 3800.0, 1.5, 300)
    per_frequency = np.where(grid.wave < 3975, 1.0, 1.7)
    flux = per_frequency / grid.wave**2 * 1e7
    spectra = noisy(grid, flux, 400, 0.05)
    found = indices(spectra)
    pull = (found.d4000 - 1.7) / found.d4000_error
    assert abs(pull.mean()) < 0.2 and 0.9 < pull.std() < 1.1
    exact = indices(Spectra(np.arange(1), flux[None].astype(np.float32), np.ones((1, 300), np.float32), grid))
    assert exact.d4000[0] == pytest.approx(1.7, rel=1e-5)


def test_the_index_of_an_absorption_line_is_its_width_in_the_band() -> None:
    grid = WaveGrid.between("log", 3900.0, 4300.0, 500)
    slope = 1 + (grid.wave - 4100) / 800
    hole = gaussian(grid, EMISSION["H delta"], 5.0, 0.0, 300.0)  # 4.1 Å wide: all of it lies inside the band
    spectra = noisy(grid, slope * (1 - hole), 400, 0.05)
    found = indices(spectra)
    assert found.h_delta.mean() == pytest.approx(5.0, abs=0.1)
    pull = (found.h_delta - 5.0) / found.h_delta_error
    assert abs(pull.mean()) < 0.2 and 0.9 < pull.std() < 1.1
    spectra.ivar[0, (grid.wave > 4090) & (grid.wave < 4110)] = 0
    spectra.ivar[1, grid.wave < 4070] = 0
    again = indices(spectra)
    assert np.isnan(again.h_delta[:2]).all() and np.isfinite(again.h_delta[2:]).all()


def test_the_bands_of_h_delta_are_those_published_in_air() -> None:
    from distspec.spectra.lines.tables import _H_DELTA

    published = np.array([[4041.6, 4081.5], [4083.5, 4122.25], [4128.5, 4161.0]])
    wavenumber2 = (1e4 / np.array(_H_DELTA)) ** 2  # Ciddor 1996
    refraction = 1 + 5.792105e-2 / (238.0185 - wavenumber2) + 1.67917e-3 / (57.362 - wavenumber2)
    np.testing.assert_allclose(np.array(_H_DELTA) / refraction, published, atol=0.002)


PIPELINE = {
    "[Ne_III] 3868": "[Ne III] 3869",
    "[O_III] 4959": "[O III] 4960",
    "[O_III] 5007": "[O III] 5008",
    "[O_I] 6300": "[O I] 6302",
    "[N_II] 6583": "[N II] 6585",
    "[S_II] 6716": "[S II] 6718",
    "[S_II] 6730": "[S II] 6733",
    "[O_II] 3725": "[O II] 3727",
    "[O_II] 3727": "[O II] 3730",
}


def read_sdss(folder: Path) -> tuple[Spectra, list[dict[str, tuple[float, float]]]]:
    """Spectra with the line fits of the survey's own pipeline."""
    from astropy.io import fits

    grid, flux, ivar, redshift, lines = WaveGrid("log", 10**3.5, 1e-4, 5400), [], [], [], []
    for path in sorted(set(folder.glob("*.fits")) - set(folder.glob("spec-3655-*.fits"))):  # quasars
        with fits.open(path, memmap=False) as file:
            found = [unit for unit in file[1:] if "LINENAME" in (unit.columns.names if unit.data is not None else [])]
            if not found or str(file[2].data["CLASS"][0]).strip() == "STAR":
                continue
            pixel = np.rint((file[1].data["loglam"] - 3.5) / 1e-4).astype(int)
            rows = np.zeros((2, grid.pixels), np.float32)
            rows[:, pixel] = file[1].data["flux"], file[1].data["ivar"]
            flux.append(rows[0])
            ivar.append(rows[1])
            redshift.append(float(file[2].data["Z"][0]))
            table = found[0].data
            names = (str(name).strip() for name in table["LINENAME"])
            lines.append(dict(zip(names, zip(table["LINEAREA"], table["LINEAREA_ERR"], strict=True), strict=True)))
    return Spectra(np.arange(len(flux)), np.array(flux), np.array(ivar), grid, np.array(redshift)), lines


def test_real_forbidden_lines_are_as_bright_as_the_survey_says(real_data: Path) -> None:
    spectra, lines = read_sdss(real_data / "sdss")
    table = measure(spectra)
    seen = np.isfinite(table.velocity) & (abs(table.velocity) < 300)
    ours, theirs = [], []
    for name, own in PIPELINE.items():
        area, error = np.array([row.get(name, (np.nan, -1.0)) for row in lines], np.float64).T
        flux, flux_error = table.of(own)
        bright = seen & (error > 0) & (area > 10 * error) & (flux > 5 * flux_error)
        ours.append(flux[bright])
        theirs.append(area[bright])
    ratio = np.concatenate(ours) / np.concatenate(theirs)
    assert len(ratio) > 25
    print(f"{len(ratio)} lines: median {np.median(ratio):.3f}, scatter {np.std(ratio):.3f}")
    assert 0.93 < np.median(ratio) < 1.03  # the pipeline takes stars away, which fills in a little
    assert 1.4826 * np.median(abs(ratio - np.median(ratio))) < 0.08
