"""The recipe: known answers for each step, the laws of rebinning, and every bad spectrum kept as a row."""

import pickle
from pathlib import Path
from typing import Any, get_args

import astropy.units as u
import numpy as np
import pytest
from astropy.cosmology import Planck18
from astropy.io import fits
from dust_extinction.parameter_averages import CCM89, F99, G23, O94

from distspec.config import AtWavelength, Cuts, Distance, DustColumn, DustMap, Grid, Mean, Median, NoScale, Prepare, Sky
from distspec.errors import ConfigError
from distspec.prepare import recipe as prepare
from distspec.prepare.rebin import Method, rebin
from distspec.prepare.recipe import Recipe
from distspec.spectra import Columns, Spectra, Status, WaveGrid
from distspec.statistics.summaries import row_mean, row_median

SOURCE = WaveGrid("log", 3600.0, 1e-4, 4000)
LINEAR = WaveGrid("linear", 3600.0, 0.8, 7000)
OPEN = Cuts(coverage_min=0.0, zwarn=False)
"""No cut but the unavoidable."""
GRID = Grid(first=3800.0, last=6800.0, pixels=300)


def plain(**changes: Any) -> Prepare:
    """A recipe that only rebins, with the changes laid over."""
    neutral: dict[str, Any] = {
        "grid": GRID,
        "sky": Sky(mode="none"),
        "normalize": NoScale(),
        "max_pixel_snr": None,
        "cuts": OPEN,
    }
    return Prepare(**{**neutral, **changes})


def batch(flux: Any, ivar: Any = 1.0, grid: WaveGrid = SOURCE, **columns: Any) -> tuple[Spectra, Columns]:
    """Spectra with the columns that every source gives."""
    flux = np.atleast_2d(np.asarray(flux, dtype=np.float32))
    n = len(flux)
    flux = np.broadcast_to(flux, (n, grid.pixels)).copy()
    ivar = np.broadcast_to(np.asarray(ivar, dtype=np.float32), flux.shape).copy()
    given_columns: Columns = {
        "id": np.arange(n) + 2**60,
        "ra": np.full(n, 150.0),
        "dec": np.full(n, 20.0),
        "z": np.full(n, 0.05),
        "zwarn": np.zeros(n, dtype=np.int64),
        "class": np.full(n, "GALAXY"),
        "subclass": np.full(n, ""),
        "ebv": np.full(n, 0.1, dtype=np.float32),
        "status": np.zeros(n, dtype=np.int32),
    }
    for name, value in columns.items():
        given_columns[name] = np.broadcast_to(np.asarray(value, dtype=given_columns[name].dtype), n).copy()
    return Spectra(np.arange(n), flux, ivar, grid), given_columns


def noisy(rng: np.random.Generator, n: int, grid: WaveGrid = SOURCE) -> tuple[Spectra, Columns]:
    flux = 5 + np.sin(grid.wave / 300) + rng.normal(0, 0.3, (n, grid.pixels))
    ivar = rng.uniform(2, 20, flux.shape)
    ivar[rng.random(flux.shape) < 0.03] = 0
    return batch(flux, ivar, grid, z=rng.uniform(0.0, 0.2, n), ebv=rng.uniform(0, 0.3, n))


# --- laws of the whole recipe -----------------------------------------------------------------------------------------

FULL = [
    Prepare(grid=GRID, dust=DustColumn(scale=1.0), cuts=OPEN),
    Prepare(grid=GRID, dust=DustColumn(scale=1.0, law="G23"), sky=Sky(mode="patch"), normalize=Mean(), cuts=OPEN),
    Prepare(grid=GRID, normalize=AtWavelength(wave=5500.0, width=40.0), max_pixel_snr=None, cuts=OPEN),
    Prepare(grid=GRID, normalize=Distance(), flux_factor=True, cuts=OPEN),
    Prepare(grid=Grid(scale="linear", first=3800.0, last=6800.0, pixels=3000), frame="observed", cuts=OPEN),
    Prepare(grid=GRID, rebin="average", normalize=NoScale(), cuts=OPEN),
    Prepare(grid=GRID, rebin="linear", min_pixel_snr=1.0, dust=DustColumn(scale=1.0), max_pixel_snr=None, cuts=OPEN),
]


def same(first: tuple[Spectra, Columns], second: tuple[Spectra, Columns]) -> bool:
    """Equal in every bit."""
    arrays = [(first[0].flux, second[0].flux), (first[0].ivar, second[0].ivar)]
    arrays += [(first[1][name], second[1][name]) for name in first[1]]
    return first[1].keys() == second[1].keys() and all(a.tobytes() == b.tobytes() for a, b in arrays)


@pytest.mark.parametrize("recipe", FULL)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e30, -3e38])
def test_b2_a_masked_pixel_changes_no_bit(recipe: Prepare, rubbish: float, rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 5)
    prepared = Recipe(recipe, SOURCE)
    before = prepared(spectra, columns)
    flux = spectra.flux.copy()
    flux[spectra.ivar == 0] = rubbish
    assert same(before, prepared(Spectra(spectra.rows, flux, spectra.ivar, SOURCE), columns))


@pytest.mark.parametrize("recipe", FULL)
def test_b12_a_row_does_not_depend_on_its_batch(recipe: Prepare, rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 75)
    prepared = Recipe(recipe, SOURCE)
    whole, table = prepared(spectra, columns)
    order = rng.permutation(75)
    for index in (order, order[:1], order[:7], order[10:50]):
        part = prepared(spectra[index], {name: column[index] for name, column in columns.items()})
        assert same(part, (whole[index], {name: column[index] for name, column in table.items()}))


def test_inputs_are_left_alone_and_an_empty_batch_is_fine(rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 3)
    flux, ivar, status = spectra.flux.copy(), spectra.ivar.copy(), columns["status"].copy()
    recipe = Recipe(FULL[1], SOURCE)
    recipe(spectra, columns)
    assert (flux == spectra.flux).all()
    assert (ivar == spectra.ivar).all()
    assert (status == columns["status"]).all()
    out, table = recipe(spectra[:0], {name: column[:0] for name, column in columns.items()})
    assert out.flux.shape == (0, 300)
    assert len(table["norm"]) == 0


def test_columns_are_kept_and_typed(rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 3)
    out, table = Recipe(FULL[0], SOURCE)(spectra, columns)
    assert list(table)[: len(columns)] == list(columns)
    assert (table["id"] == columns["id"]).all()
    assert [table[name].dtype.str[1:] for name in ("status", *Recipe.COLUMNS)] == [
        *("i4", "f4", "f4", "f4", "f4", "f8")
    ]
    assert out.flux.dtype == out.ivar.dtype == np.float32


def test_survey_flux_is_prepared_flux_times_norm(rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 4)
    reference, _ = Recipe(plain(), SOURCE)(spectra, columns)
    for normalize in (Median(), Mean(), AtWavelength(wave=5000.0), Distance()):
        for factor in (False, True):
            out, table = Recipe(plain(normalize=normalize, flux_factor=factor), SOURCE)(spectra, columns)
            np.testing.assert_allclose(out.flux * table["norm"][:, None], reference.flux, rtol=1e-6)
            np.testing.assert_allclose(out.ivar / table["norm"][:, None] ** 2, reference.ivar, rtol=1e-6)


@pytest.mark.parametrize("normalize", [Median(), Mean(), AtWavelength(wave=5000.0)])
def test_b13_shape_does_not_depend_on_scale(normalize: Any, rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 3)
    recipe = Recipe(plain(normalize=normalize, max_pixel_snr=50.0), SOURCE)
    out, _ = recipe(spectra, columns)
    scaled, table = recipe(Spectra(spectra.rows, spectra.flux * 8, spectra.ivar / 64, SOURCE), columns)
    assert (scaled.flux == out.flux).all()
    assert (scaled.ivar == out.ivar).all()
    assert (table["norm"] > 8).all()


def test_float32_input_is_conserved_to_rounding(rng: np.random.Generator) -> None:
    step = np.log10(SOURCE.edges[-1] / SOURCE.edges[0]) / 700  # the outer edges are those of the source
    target = WaveGrid("log", float(SOURCE.edges[0] * 10 ** (step / 2)), float(step), 700)
    spectra, columns = batch(rng.uniform(0.5, 2, (3, SOURCE.pixels)), z=0.0)
    grid = Grid(first=float(target.wave[0]), last=float(target.wave[-1]), pixels=700)
    out, _ = Recipe(plain(grid=grid), SOURCE)(spectra, columns)
    before = (spectra.flux.astype(float) * np.diff(SOURCE.edges)).sum(axis=1)
    np.testing.assert_allclose((out.flux * np.diff(out.grid.edges)).sum(axis=1), before, rtol=1e-6)


def test_native_pixels_pass_through_in_every_bit(rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 40, LINEAR)
    grid = Grid(scale="linear", first=float(LINEAR.wave[0]), last=float(LINEAR.wave[-1]), pixels=LINEAR.pixels)
    for method in get_args(Method):
        out, _ = Recipe(plain(frame="observed", grid=grid, rebin=method), LINEAR)(spectra, columns)
        assert out.flux.tobytes() == np.where(spectra.ivar > 0, spectra.flux, 0).tobytes()
        assert out.ivar.tobytes() == spectra.ivar.tobytes()


@pytest.mark.parametrize("method", get_args(Method))
def test_the_recipe_rebins_as_it_says(method: Method, rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 40)
    out, _ = Recipe(plain(rebin=method), SOURCE)(spectra, columns)
    flux, ivar = rebin(spectra.flux.astype(float), spectra.ivar.astype(float), SOURCE, out.grid, columns["z"], method)
    np.testing.assert_array_equal(out.flux, flux.astype(np.float32))
    np.testing.assert_array_equal(out.ivar, ivar.astype(np.float32))


def test_recipe_travels_between_processes(rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 3)
    recipe = Recipe(FULL[0], SOURCE)
    assert same(recipe(spectra, columns), pickle.loads(pickle.dumps(recipe))(spectra, columns))


def test_real_shape_of_a_line_survives_the_rest_frame() -> None:
    line = 5008.24
    z = np.array([0.0, 0.05, 0.2, 0.3])
    flux = 1 + 10 * np.exp(-0.5 * ((SOURCE.wave - line * (1 + z[:, None])) / 4) ** 2)
    out, _ = Recipe(plain(), SOURCE)(*batch(flux, z=z))
    assert np.abs(out.grid.wave[out.flux.argmax(axis=1)] - line).max() < 6


# --- sky --------------------------------------------------------------------------------------------------------------


def test_patch_copies_its_neighbors_and_mask_does_not() -> None:
    # A line 24 Å blueward of the window's middle, as [O III] 5008 at z = 0.108: the patch makes a ghost of half height.
    wave = SOURCE.wave
    line = 1 + 20 * np.exp(-0.5 * ((wave - 5553) / 2) ** 2)
    inside = np.flatnonzero((wave > 5565) & (wave < 5590))
    m = len(inside)
    windows = ((5565.0, 5590.0),)
    flux, ivar = prepare.sky_patch(line[None], np.ones((1, 4000)), SOURCE, windows)
    np.testing.assert_allclose(flux[0, inside], 0.5 * (line[inside - m] + line[inside + m]))
    assert (ivar == 1).all()
    assert flux[0, inside].max() == pytest.approx(0.5 * (line.max() + 1), rel=0.01)
    ghost = wave[inside][flux[0, inside].argmax()]
    assert ghost - 5553 == pytest.approx(25, abs=1.5)
    assert np.delete(flux[0], inside).tolist() == np.delete(line, inside).tolist()
    # The erased line: one inside the window is gone.
    erased, _ = prepare.sky_patch(1 + 0 * line[None] + 9 * (np.abs(wave - 5577) < 4), ivar, SOURCE, windows)
    assert erased.max() == 1

    masked, weights = prepare.sky_mask(line[None], np.ones((1, 4000)), SOURCE, windows)
    hidden = weights[0] == 0
    assert hidden[inside].all()
    assert hidden.sum() <= m + 2
    assert (masked[0, ~hidden] == line[~hidden]).all()


def test_patch_never_uses_a_masked_pixel() -> None:
    grid = WaveGrid("linear", 1.0, 1.0, 12)
    flux = np.arange(12.0)[None].repeat(3, axis=0)
    ivar = np.ones((3, 12))
    ivar[0, 3] = 0  # left neighbor of pixel 5
    ivar[1, [3, 7]] = 0  # both
    ivar[2, 5] = 0  # itself
    out, weights = prepare.sky_patch(flux, ivar, grid, ((5.5, 7.5),))
    assert out[:, 5].tolist() == [7.0, 0.0, 0.0]
    assert weights[:, 5].tolist() == [1.0, 0.0, 0.0]
    assert out[0, 6] == 6.0
    # A window at the border has one neighbor, one beyond it none, and one outside the grid changes nothing.
    out, _ = prepare.sky_patch(flux, np.ones((3, 12)), grid, ((0.5, 2.5), (40.0, 50.0)))
    assert out[0].tolist() == [2, 3, *range(2, 12)]


def test_masked_sky_leaks_into_no_bin() -> None:
    flux = np.ones(SOURCE.pixels)
    flux[(SOURCE.wave > 5560) & (SOURCE.wave < 5595)] = 1e20
    windows = ((5560.0, 5595.0),)
    out, _ = Recipe(plain(sky=Sky(mode="mask", windows=windows)), SOURCE)(*batch(flux))
    np.testing.assert_allclose(out.flux[out.ivar > 0], 1.0, rtol=1e-6)
    assert ((out.ivar == 0) == (out.flux == 0)).all()
    assert 0 < (out.ivar == 0).sum() < 5


# --- dust -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [F99, CCM89, O94, G23])
def test_dereddening_undoes_the_law(law: Any) -> None:
    ebv = np.array([0.0, 0.05, 0.4], dtype=np.float32)
    model = law(Rv=2.9)
    dimmed = np.array([model.extinguish(SOURCE.wave * u.AA, Ebv=float(e)) for e in ebv])
    curve = prepare.extinction_curve(DustColumn(law=law.__name__, r_v=2.9), SOURCE)
    flux, ivar = prepare.deredden(7 * dimmed, 1 / dimmed**2, ebv, curve)
    np.testing.assert_allclose(flux, 7.0, rtol=1e-12)
    np.testing.assert_allclose(ivar, 1.0, rtol=1e-12)


def test_f99_matches_the_published_anchors() -> None:
    # Fitzpatrick 1999, table 3, R_V = 3.1: A(λ)/E(B-V).
    grid = WaveGrid("linear", 4110.0, 10.0, 190)
    curve = prepare.extinction_curve(DustColumn(scale=1.0), grid)
    for wave, anchor in ((4110, 4.315), (4670, 3.806), (5470, 3.055), (6000, 2.688)):
        assert curve[(wave - 4110) // 10] == pytest.approx(anchor, rel=0.01)


def test_dust_is_corrected_at_observed_wavelengths_before_the_shift() -> None:
    z = 0.2
    dimmed = F99(Rv=3.1).extinguish(SOURCE.wave * u.AA, Ebv=0.3)
    spectra, columns = batch(dimmed, z=z, ebv=0.3)
    out, table = Recipe(plain(dust=DustColumn(scale=1.0)), SOURCE)(spectra, columns)
    np.testing.assert_allclose(out.flux[out.ivar > 0], 1.0, rtol=2e-6)
    rest, _ = Recipe(plain(), SOURCE)(spectra, columns)
    wrong = rest.flux * 10 ** (0.4 * 0.3 * 3.1 * F99(Rv=3.1)(rest.grid.wave * u.AA))
    assert np.abs(wrong[rest.ivar > 0] - 1).max() > 0.1
    assert table["status"][0] == 0


def test_scale_multiplies_the_column() -> None:
    spectra, columns = batch(np.ones(SOURCE.pixels), ebv=0.2)
    scaled, _ = Recipe(plain(dust=DustColumn(scale=0.5)), SOURCE)(spectra, columns)
    direct, _ = Recipe(plain(dust=DustColumn(scale=1.0)), SOURCE)(*batch(np.ones(SOURCE.pixels), ebv=0.1))
    np.testing.assert_allclose(scaled.flux, direct.flux, rtol=1e-6)


def test_b8_unknown_reddening_sets_aside() -> None:
    ebv = np.array([np.nan, -0.1, np.inf, 1e4, 0.0, 0.1])
    out, table = Recipe(plain(dust=DustColumn(scale=1.0)), SOURCE)(*batch(np.ones((6, SOURCE.pixels)), ebv=ebv))
    assert table["status"].tolist() == [Status.NO_EXTINCTION] * 4 + [0, 0]
    assert not out.ivar[:4].any()
    assert not out.flux[:4].any()
    np.testing.assert_allclose(out.flux[4][out.ivar[4] > 0], 1.0, rtol=1e-6)
    assert np.isnan(table["norm"][:4]).all()
    # Without a correction nobody asks.
    assert not Recipe(plain(), SOURCE)(*batch(np.ones((6, SOURCE.pixels)), ebv=ebv))[1]["status"].any()


def test_b8_dereddening_twice_is_refused() -> None:
    recipe = Recipe(plain(dust=DustColumn(scale=1.0), frame="observed"), SOURCE)
    _, table = recipe(*batch(np.ones(SOURCE.pixels)))
    with pytest.raises(ValueError, match="prepared before"):
        recipe(batch(np.ones(SOURCE.pixels))[0], table)


def write_map(folder: Path) -> None:
    """A small map in SFD's form: E(B-V) is 0.1 in the north and 0.2 in the south."""
    folder.mkdir(parents=True)
    for pole, sign, value in (("ngp", 1, 0.1), ("sgp", -1, 0.2)):
        hdu = fits.PrimaryHDU(np.full((64, 64), value, dtype=np.float32))
        cards = {"CTYPE1": "GLON-ZEA", "CTYPE2": "GLAT-ZEA", "CRVAL1": 0.0, "CRVAL2": 90.0 * sign}
        cards |= {"CRPIX1": 32.5, "CRPIX2": 32.5, "CDELT1": -3.0, "CDELT2": 3.0, "LONPOLE": 180.0}
        hdu.header.update(cards)
        hdu.writeto(folder / f"SFD_dust_4096_{pole}.fits")


@pytest.mark.parametrize("inner", ["", "sfd"])
def test_b8_dust_map(tmp_path: Path, inner: str) -> None:
    write_map(tmp_path / "map" / inner)
    recipe = Recipe(plain(dust=DustMap(path=str(tmp_path / "map"))), SOURCE)
    ra = [192.86, 12.86, np.nan, 10.0, 400.0, -5.0, 10.0]
    dec = [27.13, -27.13, 0.0, np.nan, 0.0, 0.0, 95.0]
    spectra, columns = batch(np.ones((7, SOURCE.pixels)), ra=ra, dec=dec, ebv=np.nan)
    out, table = recipe(spectra, columns)
    assert table["status"].tolist() == [0, 0] + [Status.NO_EXTINCTION] * 5
    for row, ebv in ((0, 0.1), (1, 0.2)):
        by_column = Recipe(plain(dust=DustColumn(scale=0.86)), SOURCE)(*batch(np.ones(SOURCE.pixels), ebv=ebv))[0]
        np.testing.assert_allclose(out.flux[row], by_column.flux[0], rtol=1e-5)


def test_missing_or_damaged_map_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sfd\.fetch\(\)") as caught:
        Recipe(plain(dust=DustMap(path=str(tmp_path / "nowhere"))), SOURCE)
    assert "\n" not in str(caught.value)
    for pole in ("ngp", "sgp"):
        (tmp_path / f"SFD_dust_4096_{pole}.fits").write_text("<html>")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe(plain(dust=DustMap(path=str(tmp_path))), SOURCE)


def test_b6_b8_settings_and_grids_outside_their_range_are_named() -> None:
    infrared = WaveGrid.between("log", 20_000.0, 50_000.0, 500)
    with pytest.raises(ConfigError, match="F99 is defined for 1000-33333 Å"):
        Recipe(plain(dust=DustColumn(scale=1.0)), infrared)
    with pytest.raises(ConfigError, match="r_v = 9"):
        Recipe(plain(dust=DustColumn(r_v=9.0)), SOURCE)
    with pytest.raises(ConfigError, match="no pixel within"):
        Recipe(plain(normalize=AtWavelength(wave=9000.0)), SOURCE)
    with pytest.raises(ConfigError, match="flux_factor"):
        Recipe(plain(frame="observed", flux_factor=True), SOURCE)
    with pytest.raises(ConfigError, match="does not overlap"):
        Recipe(plain(frame="observed"), infrared)
    with pytest.raises(ConfigError, match="windows"):
        Recipe(plain(sky=Sky(windows=((5590.0, 5565.0),))), SOURCE)
    with pytest.raises(ConfigError, match="at most 20"):
        Recipe(plain(normalize=Distance(redshift=30.0)), SOURCE)
    with pytest.raises(ValueError, match="was made for"):
        Recipe(plain(), SOURCE)(*batch(np.ones(LINEAR.pixels), grid=LINEAR))


# --- normalization and noise ------------------------------------------------------------------------------------------


def test_known_norms() -> None:
    flux = np.array([[1.0, 2.0, 9.0, 4.0], [1.0, 2.0, 9.0, 4.0], [5.0, -1.0, 3.0, 8.0]])
    ivar = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]], dtype=float)
    np.testing.assert_array_equal(row_median(flux, ivar > 0), [3.0, 2.0, np.nan])
    np.testing.assert_allclose(row_mean(flux, ivar > 0), [4.0, 7 / 3, np.nan])
    grid = WaveGrid("linear", 5000.0, 1.0, 4)
    np.testing.assert_allclose(prepare.flux_at(flux, ivar, grid, 5001.5, 1.0), [5.5, 2.0, np.nan])


@pytest.mark.parametrize(("normalize", "expected"), [(Median(), 4.0), (Mean(), 4.0), (AtWavelength(wave=5000.0), 4.0)])
def test_b4_a_constant_spectrum_becomes_one(normalize: Any, expected: float) -> None:
    out, table = Recipe(plain(normalize=normalize), SOURCE)(*batch(np.full(SOURCE.pixels, expected)))
    np.testing.assert_allclose(out.flux[out.ivar > 0], 1.0, rtol=1e-6)
    assert table["norm"][0] == pytest.approx(expected)
    assert table["status"][0] == 0


def test_distance_scaling_is_planck_2018() -> None:
    z = np.array([0.01, 0.1, 0.25, 1.0])
    settings = plain(normalize=Distance(), grid=Grid(first=2000.0, last=3800.0, pixels=100))
    out, table = Recipe(settings, SOURCE)(*batch(np.ones((4, SOURCE.pixels)), z=z))
    expected = (Planck18.luminosity_distance(z) / Planck18.luminosity_distance(0.1)).value ** 2
    np.testing.assert_allclose(1 / table["norm"], expected, rtol=1e-7)
    np.testing.assert_allclose(out.flux.max(axis=1), expected, rtol=1e-6)
    # Hogg 1999 by hand for z = 0.1, H0 = 67.66, Ωm = 0.3097: c/H0 (z - 3/4 Ωm z²)(1 + z) to first order.
    by_hand = 299792.458 / 67.66 * (0.1 - 0.75 * 0.3097 * 0.01) * 1.1
    assert Planck18.luminosity_distance(0.1).value == pytest.approx(by_hand, rel=0.003)


def test_distance_table_matches_the_direct_call() -> None:
    z = np.concatenate([np.geomspace(1e-6, prepare.Z_MAX, 400), np.linspace(0.001, 0.5, 100)])
    np.testing.assert_allclose(prepare.luminosity_distance(z), Planck18.luminosity_distance(z).value, rtol=2e-8)
    assert np.isnan(prepare.luminosity_distance(np.array([0.0, -0.01, np.nan, 30.0]))).all()


def test_distance_needs_a_positive_redshift() -> None:
    z = np.array([0.0, -0.001, 1e-200, 0.05])
    out, table = Recipe(plain(normalize=Distance()), SOURCE)(*batch(np.ones((4, SOURCE.pixels)), z=z))
    assert table["status"].tolist() == [Status.NO_SCALE] * 3 + [0]
    assert not out.flux[:3].any()


def test_flux_factor_multiplies_by_one_plus_z() -> None:
    out, table = Recipe(plain(flux_factor=True), SOURCE)(*batch(np.ones(SOURCE.pixels), z=0.25))
    np.testing.assert_allclose(out.flux[out.ivar > 0], 1.25, rtol=1e-6)
    assert table["norm"][0] == pytest.approx(0.8)


@pytest.mark.parametrize("normalize", [Median(), Mean(), AtWavelength(wave=5000.0)])
def test_b4_spectra_without_a_scale_are_set_aside(normalize: Any, rng: np.random.Generator) -> None:
    flux = np.zeros((4, SOURCE.pixels))
    flux[1] = -3.0
    flux[2] = 1e-45
    flux[3] = 2.0
    out, table = Recipe(plain(normalize=normalize, max_pixel_snr=50.0), SOURCE)(*batch(flux))
    assert table["status"].tolist() == [Status.NO_SCALE] * 3 + [0]
    assert not out.flux[:3].any()
    assert not out.ivar[:3].any()
    assert np.isnan(table["norm"][:3]).all()
    assert table["coverage"][:3].tolist() == [0, 0, 0]
    assert np.isfinite(out.flux).all()


def test_a_blind_window_has_no_scale() -> None:
    ivar = np.ones(SOURCE.pixels)
    ivar[np.abs(SOURCE.wave / 1.05 - 5000) < 60] = 0
    settings = plain(normalize=AtWavelength(wave=5000.0, width=40.0))
    assert Recipe(settings, SOURCE)(*batch(np.ones(SOURCE.pixels), ivar))[1]["status"][0] == Status.NO_SCALE


def test_noise_floor() -> None:
    flux, ivar = np.array([[10.0, 10.0, -10.0, 0.0, 0.0]]), np.array([[100.0, 1.0, 100.0, 1e9, 0.0]])
    np.testing.assert_allclose(prepare.noise_floor(flux, ivar, 50.0), [[25.0, 1.0, 25.0, 1e9, 0.0]])
    spectra, columns = batch(np.full(SOURCE.pixels, 3.0), 1e6)
    out, table = Recipe(plain(max_pixel_snr=50.0), SOURCE)(spectra, columns)
    assert (out.flux * np.sqrt(out.ivar)).max() == pytest.approx(50.0)
    assert table["snr"][0] == pytest.approx(50.0)
    assert table["total_snr"][0] == pytest.approx(50 * np.sqrt((out.ivar > 0).sum()))


def test_pixels_below_their_noise_are_masked_before_the_dust_is_undone() -> None:
    """interpolate.py: NaN where sqrt(1 / ivar) > flux, and ivar = 0 a huge variance; no negative flux survives."""
    flux = np.array([[2.0, 1.0, 0.999, -5.0, 3.0, 0.0]])
    ivar = np.array([[1.0, 1.0, 1.0, 1.0, 0.0, 4.0]])
    flux, ivar = prepare.snr_mask(flux, ivar, 1.0)
    assert flux.tolist() == [[2, 1, 0, 0, 0, 0]]
    assert ivar.tolist() == [[1, 1, 0, 0, 0, 0]]
    rng = np.random.default_rng(4)
    spectra, columns = batch(rng.normal(1, 1, SOURCE.pixels), 1.0, z=0.0, ebv=1.0)
    settings = plain(frame="observed", min_pixel_snr=1.0, rebin="linear", dust=DustColumn())
    grid = Grid(first=float(SOURCE.wave[0]), last=float(SOURCE.wave[-1]), pixels=SOURCE.pixels)
    out, table = Recipe(settings.model_copy(update={"grid": grid}), SOURCE)(spectra, columns)
    assert ((out.ivar > 0) == (spectra.flux >= 1)).all()
    assert table["coverage"][0] == pytest.approx((spectra.flux >= 1).mean())


def test_one_bad_pixel_does_not_move_the_scale_at_a_wavelength() -> None:
    flux = np.full((1, SOURCE.pixels), 3.0)
    flux[0, np.abs(SOURCE.wave / 1.05 - 5000).argmin()] = 1e6
    settings = plain(normalize=AtWavelength(wave=5000.0, width=60.0))
    assert Recipe(settings, SOURCE)(*batch(flux))[1]["norm"][0] == pytest.approx(3.0)


# --- what is set aside ------------------------------------------------------------------------------------------------


def test_signal_to_noise_and_coverage(rng: np.random.Generator) -> None:
    out, table = Recipe(plain(), SOURCE)(*noisy(rng, 3))
    for i in range(3):
        good = out.ivar[i] > 0
        ratio = (out.flux[i] * np.sqrt(out.ivar[i]))[good].astype(float)
        assert table["snr"][i] == pytest.approx(np.median(ratio), rel=1e-6)
        assert table["total_snr"][i] == pytest.approx(np.sqrt((ratio**2).sum()), rel=1e-6)
        assert table["coverage"][i] == pytest.approx(good.mean())


@pytest.mark.parametrize(
    ("cuts", "bit", "expected"),
    [
        (Cuts(coverage_min=0, z_min=0.04), Status.REDSHIFT_RANGE, [1, 0, 0, 0]),
        (Cuts(coverage_min=0, z_max=0.06), Status.REDSHIFT_RANGE, [0, 0, 0, 1]),
        (Cuts(coverage_min=0, z_min=0.03, z_max=0.3), Status.REDSHIFT_RANGE, [0, 0, 0, 0]),
        (Cuts(coverage_min=0, snr_min=5.0), Status.LOW_SNR, [1, 0, 0, 1]),
        (Cuts(coverage_min=0, total_snr_min=100.0), Status.LOW_SNR, [1, 0, 0, 1]),
        (Cuts(coverage_min=0.8), Status.LOW_COVERAGE, [0, 0, 1, 0]),
        (Cuts(coverage_min=0), Status.REDSHIFT_WARNING, [0, 1, 0, 1]),
        (Cuts(coverage_min=0, zwarn=False), Status.REDSHIFT_WARNING, [0, 0, 0, 0]),
    ],
)
def test_cuts(cuts: Cuts, bit: Status, expected: list[int]) -> None:
    flux = np.ones((4, SOURCE.pixels)) * np.array([0.5, 20, 20, 0.5])[:, None]
    ivar = np.ones_like(flux)
    ivar[2, :2000] = 0
    columns = {"z": [0.03, 0.05, 0.05, 0.3], "zwarn": [0, 4, 0, 1]}
    out, table = Recipe(plain(cuts=cuts.model_copy(update={"zwarn": False})), SOURCE)(*batch(flux, ivar, **columns))
    if bit == Status.REDSHIFT_WARNING:
        out, table = Recipe(plain(cuts=cuts), SOURCE)(*batch(flux, ivar, **columns))
    assert table["status"].tolist() == [int(bit) * one for one in expected]
    assert (out.ivar > 0).any(axis=1).all()  # only cut: the flux stays to be looked at
    assert np.isfinite(table["norm"]).all()


def test_span_reaches_from_the_first_to_the_last_good_pixel() -> None:
    ivar = np.zeros((5, 10), np.float32)
    ivar[0] = 1
    ivar[1, [2, 7]] = 1
    ivar[2, 9] = 1
    ivar[3, 0] = 1
    np.testing.assert_allclose(prepare.span(ivar), [1.0, 0.6, 0.1, 0.1, 0.0])
    flux, ivar = np.ones((3, SOURCE.pixels)), np.ones((3, SOURCE.pixels))
    ivar[0, 1000:2500] = 0
    ivar[1, 2000:] = 0
    ivar[2] = 0
    out, table = Recipe(plain(cuts=Cuts(coverage_min=0.0, span_min=0.99)), SOURCE)(*batch(flux, ivar))
    assert table["status"].tolist() == [0, Status.SPAN, Status.DEAD]
    assert table["span"][0] == 1.0
    assert table["coverage"][0] < 0.5
    assert 0 < table["span"][1] < 0.7


def test_classes_are_compared_without_case_and_padding() -> None:
    flux = np.ones((6, SOURCE.pixels))
    names = np.array(["GALAXY", "galaxy  ", "QSO", "", "STAR", "Galaxy"])
    spectra, columns = batch(flux)
    columns["class"] = names
    columns["status"][3] = int(Status.UNREADABLE)
    out, table = Recipe(plain(cuts=Cuts(coverage_min=0.0, classes=(" galaxy", "Qso"))), SOURCE)(spectra, columns)
    assert table["status"].tolist() == [0, 0, 0, Status.UNREADABLE, Status.CLASS, 0]
    assert out.ivar[4].any()  # only cut: the flux stays to be looked at
    assert (table["class"] == names).all()
    _, table = Recipe(plain(), SOURCE)(spectra, columns)
    assert table["status"].tolist() == [0, 0, 0, Status.UNREADABLE, 0, 0]


def test_b7_unknown_redshift_in_the_rest_frame() -> None:
    z = np.array([np.nan, np.inf, -1.0, -2.0, 99.0, 0.05, -0.001])
    out, table = Recipe(plain(normalize=Median(), cuts=Cuts(z_max=5.0)), SOURCE)(
        *batch(np.ones((7, SOURCE.pixels)), z=z, status=[0, int(Status.NO_REDSHIFT), 0, 0, 0, 0, 0])
    )
    assert table["status"].tolist() == [Status.NO_REDSHIFT] * 5 + [0, 0]
    assert not out.ivar[:5].any()
    assert table["coverage"][:5].tolist() == [0] * 5
    assert out.redshift is None


def test_the_source_has_the_last_word_on_a_missing_redshift() -> None:
    out, table = Recipe(plain(), SOURCE)(*batch(np.ones(SOURCE.pixels), status=int(Status.NO_REDSHIFT)))
    assert table["status"][0] == Status.NO_REDSHIFT
    assert not out.ivar.any()


def test_the_observed_frame_needs_no_redshift() -> None:
    given_columns = {"z": [np.nan, 0.1], "status": [int(Status.NO_REDSHIFT), 0]}
    spectra, columns = batch(np.ones((2, SOURCE.pixels)), **given_columns)
    out, table = Recipe(plain(frame="observed"), SOURCE)(spectra, columns)
    assert table["status"].tolist() == [0, 0]
    assert (out.flux[0] == out.flux[1]).all()
    assert out.redshift is not None
    assert np.isnan(out.redshift[0])
    # ... unless the scale or a cut does.
    out, table = Recipe(plain(frame="observed", normalize=Distance()), SOURCE)(spectra, columns)
    assert table["status"].tolist() == [Status.NO_REDSHIFT, 0]
    assert not out.ivar[0].any()
    out, table = Recipe(plain(frame="observed", cuts=Cuts(z_max=1.0)), SOURCE)(spectra, columns)
    assert table["status"].tolist() == [Status.NO_REDSHIFT, 0]
    assert out.ivar[0].any()


def test_b1_b2_unusable_pixels_are_masked_and_dead_spectra_set_aside() -> None:
    flux, ivar = np.full((7, SOURCE.pixels), 2.0), np.ones((7, SOURCE.pixels))
    flux[0] = np.nan
    flux[1] = np.inf
    ivar[2] = 0
    ivar[3] = -1
    ivar[4] = np.nan
    ivar[5] = np.inf
    flux[6, ::7], ivar[6, ::11], ivar[6, ::13] = np.nan, -1.0, np.inf
    out, table = Recipe(Prepare(grid=GRID, cuts=Cuts(snr_min=0.5)), SOURCE)(*batch(flux, ivar))
    assert table["status"].tolist() == [Status.DEAD] * 6 + [0]
    assert not out.ivar[:6].any()
    assert table["snr"][:6].tolist() == table["total_snr"][:6].tolist() == table["coverage"][:6].tolist() == [0] * 6
    np.testing.assert_allclose(out.flux[6][out.ivar[6] > 0], 1.0, rtol=1e-6)
    assert len(out) == 7


def test_the_source_status_is_kept() -> None:
    flux, ivar = np.ones((3, SOURCE.pixels)), np.ones((3, SOURCE.pixels))
    flux[1], ivar[1] = 0, 0
    status = [int(Status.FIBER), int(Status.UNREADABLE), int(Status.NOT_A_TARGET)]
    out, table = Recipe(plain(cuts=Cuts(z_max=0.01)), SOURCE)(*batch(flux, ivar, status=status))
    assert table["status"].tolist() == [bit | Status.REDSHIFT_RANGE for bit in status]
    assert out.ivar[0].any()
    assert table["coverage"][1] == 0


def test_b7_out_of_reach_is_low_coverage() -> None:
    _, table = Recipe(plain(), SOURCE)(*batch(np.ones((2, SOURCE.pixels)), z=[3.0, 0.0]))
    assert table["status"].tolist() == [Status.LOW_COVERAGE, 0]
    assert table["coverage"].tolist() == [0, 1]


@pytest.mark.parametrize("recipe", FULL)
def test_b5_extreme_values_stay_finite(recipe: Prepare, rng: np.random.Generator) -> None:
    spectra, columns = noisy(rng, 6)
    flux, ivar = spectra.flux.copy(), np.maximum(spectra.ivar, 1)
    flux[0, 2000] = 1e30
    flux[1] = 3e38
    flux[2] = 1e-40
    ivar[3] = 1e-44
    ivar[4] = 3e38
    flux[5, ::2] = -3e38
    out, table = Recipe(recipe, SOURCE)(Spectra(spectra.rows, flux, ivar, SOURCE), columns)
    assert np.isfinite(out.flux).all()
    assert np.isfinite(out.ivar).all()
    assert ((out.ivar == 0) <= (out.flux == 0)).all()
    assert np.isfinite([table[name] for name in ("snr", "total_snr", "coverage")]).all()


def test_b5_a_spike_stays_where_it_is() -> None:
    flux = np.ones((2, SOURCE.pixels))
    flux[1, 2000] = 1e30
    out, table = Recipe(plain(normalize=Median(), max_pixel_snr=50.0), SOURCE)(*batch(flux))
    spiked = np.flatnonzero(out.flux[1] != out.flux[0])
    assert 1 <= len(spiked) <= 2
    assert table["norm"][1] == pytest.approx(1.0)
    assert table["status"].tolist() == [0, 0]
