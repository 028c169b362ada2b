"""Spectra through specutils: exact round trips, units and uncertainties of all kinds, rebinning against SpectRes."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spectres
from astropy import units as u
from astropy.io import fits
from astropy.nddata import InverseVariance, StdDevUncertainty, UnknownUncertainty, VarianceUncertainty
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from distspec.config import Specutils
from distspec.errors import ConfigError, SourceError
from distspec.prepare.recipe import rebin
from distspec.sources import Piece, Source
from distspec.sources.specutils.files import SpecutilsFiles
from distspec.sources.specutils.objects import from_specutils, rebin_any, to_specutils
from distspec.spectra import Columns, Spectra, Status, WaveGrid

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # specutils and what it imports warn about themselves
    from specutils import Spectrum, SpectrumList

pytestmark = pytest.mark.filterwarnings("ignore:::(specutils|astropy|ndcube|gwcs)")

FLUX = u.Unit("1e-17 erg / (s cm2 Angstrom)")
WAVE = np.linspace(4000.0, 5000.0, 251)


def source(path: Path, **options: Any) -> SpecutilsFiles:
    return SpecutilsFiles(Specutils(path=str(path), **({"first": 4100.0, "last": 4900.0, "pixels": 101} | options)))


def write(path: Path, **changes: Any) -> Path:
    """Write what specutils reads as `tabular-fits`: a spectrum in 1e-17 cgs with errors, said to be in vacuum."""
    made: dict[str, Any] = {"wave": WAVE * u.AA, "flux": (1 + WAVE / 1000) * FLUX, "error": np.full(251, 0.5) * FLUX}
    header = {"VACUUM": True} | changes.pop("header", {})
    made |= changes
    columns = [
        fits.Column(name, f"{'J' if name == 'mask' else 'D'}", array=u.Quantity(values).value, unit=_text(values))
        for name, values in made.items()
        if values is not None
    ]
    table = fits.BinTableHDU.from_columns(columns)
    table.header.update({key: value for key, value in header.items() if value is not None})
    path.parent.mkdir(parents=True, exist_ok=True)
    primary = fits.PrimaryHDU()
    primary.header.update({"RA": 10.0, "DEC": -5.0})
    fits.HDUList([primary, table]).writeto(path, overwrite=True)
    return path


def _text(values: Any) -> str | None:
    unit = u.Quantity(values).unit
    return None if unit == u.dimensionless_unscaled else unit.to_string("fits")


def read(path: Path, **options: Any) -> tuple[Spectra, Columns]:
    files = source(path, **options)
    (entry,) = files.files()
    return files.read(Piece(entry.name, 0, files.count(entry.name)))


def spectrum(**changes: Any) -> Spectrum:
    made = {"flux": (1 + WAVE / 1000) * FLUX, "spectral_axis": WAVE * u.AA}
    made |= {"uncertainty": StdDevUncertainty(np.full(251, 0.5))}
    return Spectrum(**{key: value for key, value in (made | changes).items() if value is not None})


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redshift", [None, np.array([0.1, 0.0, np.nan, -0.001])])
@pytest.mark.parametrize("grid", [WaveGrid("log", 10**3.54, 1e-4, 480), WaveGrid.between("linear", 3600.0, 9824.0, 77)])
@pytest.mark.parametrize("unit", ["1e-17 erg / (s cm2 Angstrom)", ""])
def test_a_batch_comes_back_exactly(rng: np.random.Generator, redshift: Any, grid: WaveGrid, unit: str) -> None:
    flux = rng.normal(size=(4, grid.pixels)).astype(np.float32)
    ivar = rng.uniform(0.1, 9, flux.shape).astype(np.float32) * (rng.random(flux.shape) > 0.1)
    batch = Spectra(np.array([7, 3, 2**40, 9]), flux, ivar, grid, redshift)
    objects = to_specutils(batch, unit)
    back = from_specutils(objects)
    assert back.grid == grid
    np.testing.assert_array_equal(back.rows, batch.rows)
    np.testing.assert_array_equal(back.flux, flux)
    np.testing.assert_array_equal(back.ivar, ivar)
    if redshift is None:
        assert back.redshift is None
    else:
        np.testing.assert_array_equal(back.redshift, redshift)


def test_objects_say_what_they_are() -> None:
    grid = WaveGrid.between("linear", 4000.0, 5000.0, 11)
    ivar = np.where(np.arange(11) == 3, 0, 4).astype(np.float32)[None]
    (item,) = to_specutils(Spectra(np.array([5]), np.ones_like(ivar), ivar, grid, np.array([0.25])))
    assert isinstance(item, Spectrum)
    assert item.flux.unit == FLUX
    assert item.spectral_axis.unit == u.AA
    np.testing.assert_array_equal(item.spectral_axis.value, grid.wave)
    assert isinstance(item.uncertainty, InverseVariance)
    np.testing.assert_array_equal(np.flatnonzero(item.mask), [3])
    assert float(item.redshift) == 0.25
    assert (item.meta["medium"], item.meta["frame"], item.meta["row"]) == ("vacuum", "observed", 5)


def test_objects_of_others_keep_their_uniform_grid_or_are_rebinned_or_refused() -> None:
    batch = from_specutils([spectrum(redshift=0.3), spectrum()])
    assert batch.grid == WaveGrid("linear", 4000.0, 4.0, 251)
    np.testing.assert_array_equal(batch.flux[0], (1 + WAVE / 1000).astype(np.float32))
    np.testing.assert_array_equal(batch.ivar, np.full((2, 251), 4, np.float32))
    assert batch.redshift is not None
    np.testing.assert_allclose(batch.redshift, [0.3, np.nan], rtol=1e-15)
    cut = spectrum(flux=np.ones(99) * FLUX, spectral_axis=WAVE[:99] * u.AA, uncertainty=StdDevUncertainty(np.ones(99)))
    assert from_specutils(SpectrumList([spectrum(), cut])).good.sum(axis=1).tolist() == [251, 99]
    odd = spectrum(spectral_axis=(WAVE + 1.0) * u.AA)
    with pytest.raises(ValueError, match="spectrum 1: wavelengths off the pixel centers"):
        from_specutils([spectrum(), odd])
    uneven = spectrum(spectral_axis=np.sqrt(np.linspace(4000**2, 5000**2, 251)) * u.AA)
    with pytest.raises(ValueError, match="expected a grid to rebin them to"):
        from_specutils(uneven)
    grid = WaveGrid.between("log", 4100.0, 4900.0, 90)
    assert from_specutils([uneven, odd], grid).good.all()
    with pytest.raises(ValueError, match="no spectra"):
        from_specutils([])


def test_b6_an_object_in_air_is_refused() -> None:
    with pytest.raises(ValueError, match="in air"):
        from_specutils(spectrum(meta={"header": {"AIRORVAC": "air"}}))


def test_the_rows_of_a_two_dimensional_object_are_spectra() -> None:
    stack = Spectrum(
        flux=np.ones((3, 251)) * FLUX,
        spectral_axis=WAVE * u.AA,
        uncertainty=VarianceUncertainty(np.full((3, 251), 0.5)),
    )
    batch = from_specutils(stack)
    assert len(batch) == 3
    assert (batch.ivar == 2).all()


# --- rebinning -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 300), st.integers(5, 200), st.sampled_from(["log", "linear"]))
def test_rebinning_equals_spectres_where_the_spectrum_covers_the_grid(
    seed: int, pixels: int, bins: int, scale: Any
) -> None:
    rng = np.random.default_rng(seed)
    wave = 4000 + np.cumsum(rng.uniform(0.5, 6.0, pixels))
    inner = (wave[2], wave[-3])
    grid = WaveGrid.between(scale, inner[0] + 0.1 * np.ptp(inner), inner[1] - 0.1 * np.ptp(inner), bins)
    flux, error = rng.normal(5, 2, pixels), rng.uniform(0.1, 2, pixels)
    found, ivar = rebin_any(wave, flux, error**-2.0, grid)
    # SpectRes puts edges half-way between centers too, which for a linear grid are the same.
    if scale == "linear" and bins > 2:
        expected, sigma = spectres.spectres(grid.wave, wave, flux, error)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        np.testing.assert_allclose(ivar**-0.5, sigma, rtol=1e-9)
    assert (ivar > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rebinning_conserves_flux(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wave = 4000 + np.cumsum(rng.uniform(0.5, 6.0, 200))
    flux = np.where((np.arange(200) > 20) & (np.arange(200) < 180), rng.normal(5, 2, 200), 0.0)
    middle = (wave[1:] + wave[:-1]) / 2
    edges = np.concatenate([[2 * wave[0] - middle[0]], middle, [2 * wave[-1] - middle[-1]]])
    grid = WaveGrid.between("log", edges[0] - 50, edges[-1] + 50, 150)
    found, ivar = rebin_any(wave, flux, np.ones(200), grid)
    inside = (grid.edges[:-1] >= edges[0]) & (grid.edges[1:] <= edges[-1])
    assert (ivar[inside] > 0).all()
    assert (found * np.diff(grid.edges)).sum() == pytest.approx((flux * np.diff(edges)).sum(), rel=1e-9)


def test_rebinning_agrees_with_the_bulk_rebinning_masks_included(rng: np.random.Generator) -> None:
    native = WaveGrid("linear", 4000.0, 0.8, 900)
    grid = WaveGrid.between("log", 3990.0, 4750.0, 130)
    flux, ivar = rng.normal(size=(2, 900))
    ivar = np.where(rng.random(900) < 0.3, 0, ivar**2)
    expected = rebin(flux[None], ivar[None], native, grid, np.zeros(1))
    found = rebin_any(native.wave, flux, ivar, grid)
    np.testing.assert_allclose(found[0], expected[0][0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found[1], expected[1][0], rtol=1e-9)


def test_a_pixel_without_weight_has_no_influence(rng: np.random.Generator) -> None:
    grid = WaveGrid.between("linear", 4100.0, 4900.0, 40)
    flux, ivar = rng.normal(size=251), np.where(rng.random(251) < 0.3, 0, 2.0)
    spoiled = np.where(ivar > 0, flux, 1e30)
    np.testing.assert_array_equal(rebin_any(WAVE, flux, ivar, grid), rebin_any(WAVE, spoiled, ivar, grid))


@pytest.mark.parametrize("wave", [WAVE[::-1], np.full(5, 4000.0), np.array([4000.0]), np.array([4000.0, np.nan])])
def test_b6_wavelengths_that_do_not_rise_are_refused(wave: Any) -> None:
    with pytest.raises(ValueError, match="expected two or more that rise"):
        rebin_any(wave, np.ones(len(wave)), np.ones(len(wave)), WaveGrid.between("linear", 4100.0, 4900.0, 40))


# --- the source ----------------------------------------------------------------------------------------------------


def test_a_file_is_read_converted_and_rebinned(tmp_path: Path) -> None:
    files = pickle.loads(pickle.dumps(source(write(tmp_path / "a.fits"), format="tabular-fits")))
    assert isinstance(files, Source)
    (entry,) = files.files()
    assert (entry.name, entry.count, files.count("a.fits"), files.missing()) == ("a.fits", None, 1, [])
    spectra, columns = files.read(Piece("a.fits", 0, 1))
    assert spectra.grid == files.grid == WaveGrid("linear", 4100.0, 8.0, 101)
    np.testing.assert_allclose(spectra.flux[0], 1 + files.grid.wave / 1000, rtol=1e-6)
    # Two pixels of σ = 0.5 in each bin of 8 Å, one whole and two halves.
    np.testing.assert_allclose(spectra.ivar[0], 4 / (0.5**2 + 0.25**2 * 2), rtol=1e-6)
    assert columns["id"].tolist() == ["a.fits"]
    assert (columns["ra"][0], columns["dec"][0]) == (10.0, -5.0)
    assert columns["status"].tolist() == [Status.NO_REDSHIFT]
    assert columns["note"].tolist() == [""]
    kinds = {name: values.dtype.kind for name, values in columns.items()}
    assert kinds == dict.fromkeys(("id", "class", "subclass", "note"), "U") | dict.fromkeys(
        ("ra", "dec", "z", "ebv"), "f"
    ) | dict.fromkeys(("zwarn", "status"), "i")


@pytest.mark.parametrize("name", ["spec-1931-53358-0251.fits", "spec-3655-55240-0258.fits"])
def test_a_real_sdss_file_agrees_with_its_own_pixels(real_data: Path, name: str) -> None:
    path = real_data / "sdss" / name
    with fits.open(path) as units:
        table = {key: np.array(units[1].data[key]).astype(float) for key in ("loglam", "flux", "ivar", "and_mask")}
    files = source(path, first=4500.0, last=5500.0, pixels=400)
    spectra, columns = files.read(Piece(name, 0, 1))
    good = (table["and_mask"] == 0) & (table["ivar"] > 0)
    expected = rebin_any(10 ** table["loglam"], table["flux"], np.where(good, table["ivar"], 0), files.grid)
    np.testing.assert_allclose(spectra.flux[0], expected[0], rtol=2e-3, atol=2e-3)
    assert (spectra.good[0] == (expected[1] > 0)).mean() > 0.99
    assert columns["note"].tolist() == [""]


def test_several_spectra_in_a_file_are_several_rows(real_data: Path) -> None:
    path = real_data / "desi" / "coadd-1-80693-thru20210204.fits"
    files = source(path, vacuum=True)
    count = files.count(path.name)
    whole, columns = files.read(Piece(path.name, 0, count))
    part, some = files.read(Piece(path.name, 1, 3))
    assert count > 3
    np.testing.assert_array_equal(part.flux, whole.flux[1:3])
    np.testing.assert_array_equal(part.rows, [1, 2])
    assert some["id"].tolist() == [f"{path.name}#1", f"{path.name}#2"] == columns["id"][1:3].tolist()
    # Arms that do not reach the grid have no good pixel on it.
    assert set(columns["status"]) == {Status.NO_REDSHIFT, Status.NO_REDSHIFT | Status.DEAD}


@pytest.mark.parametrize(
    ("kind", "value"), [(StdDevUncertainty, 0.5), (VarianceUncertainty, 0.25), (InverseVariance, 4.0)]
)
@pytest.mark.parametrize("unit", [FLUX, u.Unit("1e-16 erg / (s cm2 Angstrom)"), u.Unit("W / (m2 micron)")])
def test_b9_b10_all_kinds_of_uncertainty_and_flux_density_are_converted(kind: Any, value: float, unit: Any) -> None:
    reference = from_specutils(spectrum())
    scale = FLUX.to(unit)
    power = {StdDevUncertainty: 1, VarianceUncertainty: 2, InverseVariance: -2}[kind]
    uncertainty = kind(np.full(251, value * scale**power), unit=unit**power)
    found = from_specutils(spectrum(flux=(1 + WAVE / 1000) * scale * unit, uncertainty=uncertainty))
    np.testing.assert_allclose(found.flux, reference.flux, rtol=1e-6)
    np.testing.assert_allclose(found.ivar, reference.ivar, rtol=1e-6)


def test_b9_flux_per_frequency_is_converted_pixel_by_pixel() -> None:
    flux = ((1 + WAVE / 1000) * FLUX).to(u.mJy, u.spectral_density(WAVE * u.AA))
    error = (np.full(251, 0.5) * FLUX).to_value(u.mJy, u.spectral_density(WAVE * u.AA))
    found = from_specutils(spectrum(flux=flux, uncertainty=StdDevUncertainty(error)))
    np.testing.assert_allclose(found.flux[0], 1 + WAVE / 1000, rtol=1e-6)
    np.testing.assert_allclose(found.ivar[0], 4, rtol=1e-6)


@pytest.mark.parametrize("axis", [WAVE / 10 * u.nm, WAVE[::-1] * u.AA, (WAVE * u.AA).to(u.THz, u.spectral())])
def test_b6_other_axes_are_converted_and_sorted(axis: Any) -> None:
    found = from_specutils(spectrum(spectral_axis=axis), WaveGrid("linear", 4000.0, 4.0, 251))
    forward = np.asarray(axis.to_value(u.AA, u.spectral()))[0] < 4500
    expected = (1 + WAVE / 1000)[:: 1 if forward else -1]
    np.testing.assert_allclose(found.flux[0], expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": None}, "uncertainty of kind None"),
        ({"header": {"VACUUM": False}}, "in air by the header"),
        ({"header": {"AIRORVAC": "AIR"}}, "in air by the header"),
        ({"header": {"CTYPE1": "AWAV"}}, "in air by the header"),
        ({"header": {"VACUUM": None}}, r"not stated; expected source\.vacuum"),
        ({"flux": np.ones(251) * u.count, "error": np.ones(251) * u.count}, "flux in ct"),
    ],
)
def test_b6_b9_b10_what_would_be_a_guess_sets_the_spectrum_aside(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "good.fits")
    write(tmp_path / "odd.fits", **changes)
    files = source(tmp_path, format="tabular-fits")
    assert [entry.name for entry in files.files()] == ["good.fits", "odd.fits"]
    spectra, columns = files.read(Piece("odd.fits", 0, 1))
    assert columns["status"][0] & Status.UNREADABLE
    assert not spectra.ivar.any()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(columns["note"][0])
    assert files.read(Piece("good.fits", 0, 1))[1]["note"].tolist() == [""]


def test_b6_the_user_may_state_vacuum_but_not_against_the_header(tmp_path: Path) -> None:
    silent = write(tmp_path / "a" / "a.fits", header={"VACUUM": None})
    assert read(silent, vacuum=True)[1]["note"].tolist() == [""]
    air = write(tmp_path / "b" / "b.fits", header={"VACUUM": False})
    assert "in air" in read(air, vacuum=True)[1]["note"][0]


def test_b6_repeated_wavelengths_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            item = spectrum(spectral_axis=np.where(np.arange(251) == 9, WAVE[8], WAVE) * u.AA)
        except ValueError:
            return  # specutils refuses them itself
    with pytest.raises(ValueError, match="repeat"):
        from_specutils(item)


def test_b10_unknown_uncertainty_is_refused() -> None:
    with pytest.raises(ValueError, match="uncertainty of kind unknown"):
        from_specutils(spectrum(uncertainty=UnknownUncertainty(np.ones(251))))


def test_b1_b2_b3_bad_pixels_are_masked() -> None:
    flux, error, mask = 1 + WAVE / 1000, np.full(251, 0.5), np.zeros(251, bool)
    flux[:2], error[2:6], mask[6] = (np.nan, np.inf), (0, -1, np.nan, np.inf), True
    found = from_specutils(spectrum(flux=flux * FLUX, uncertainty=StdDevUncertainty(error), mask=mask))
    np.testing.assert_array_equal(np.flatnonzero(~found.good[0]), np.arange(7))
    assert np.isfinite(found.flux).all()
    assert np.isfinite(found.ivar).all()


# --- catalogs, damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "ecsv", "fits", "parquet"])
def test_a_catalog_gives_ids_and_redshifts(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "spectra"
    for name in ("a.fits", "sub/b.fits", "c.fits"):
        write(folder / name)
    table = Table(
        {
            "file": ["sub/b.fits", "a.fits", "gone.fits"],
            "ID": np.array([2**62 + 1, 7, 8]),
            "z": [0.25, -9.0, 0.1],
            "class": ["GALAXY", "STAR", "QSO"],
        }
    )
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: table[name].tolist() for name in table.colnames}), tmp_path / "c.parquet")
    else:
        table.write(tmp_path / f"c.{ending}")
    files = source(folder, format="tabular-fits", catalog=str(tmp_path / f"c.{ending}"))
    found = {entry.name: files.read(Piece(entry.name, 0, 1))[1] for entry in files.files()}
    assert {name: str(columns["id"][0]) for name, columns in found.items()} == {
        "a.fits": "7",
        "c.fits": "c.fits",
        "sub/b.fits": "4611686018427387905",
    }
    assert found["sub/b.fits"]["z"][0] == 0.25
    assert found["sub/b.fits"]["class"][0] == "GALAXY"
    assert found["sub/b.fits"]["status"][0] == Status.OK
    assert found["c.fits"]["status"][0] == Status.NO_REDSHIFT
    assert files.missing() == ["gone.fits"]


def test_t10_float_ids_and_a_wrong_number_of_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "spectra" / "a.fits")
    Table({"file": ["a.fits"], "id": [1.5]}).write(tmp_path / "c.fits")
    with pytest.raises(SourceError, match="ids are floats"):
        source(path, catalog=str(tmp_path / "c.fits")).files()
    (tmp_path / "d.csv").write_text("file,id\na.fits,1\na.fits,2\n")
    files = source(path, format="tabular-fits", catalog=str(tmp_path / "d.csv"))
    with pytest.raises(SourceError, match="1 spectra; expected 2 as in the catalog"):
        files.read(Piece("a.fits", 0, 1))
    (tmp_path / "e.csv").write_text("name,id\na.fits,1\n")
    with pytest.raises(SourceError, match="no column file"):
        source(path, catalog=str(tmp_path / "e.csv")).files()


def test_t9_what_specutils_cannot_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.fits").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "b.xyz").write_bytes(b"what is this")
    files = source(tmp_path)
    for name in ("a.fits", "b.xyz"):
        with pytest.raises(SourceError, match=r"specutils cannot read it") as caught:
            files.read(Piece(name, 0, 1))
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    assert files.identify(Piece("a.fits", 0, 1))["id"].tolist() == ["a.fits"]
    with pytest.raises(SourceError, match="No such file"):
        files.read(Piece("gone.fits", 0, 1))


def test_a_grid_that_runs_backwards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected first < last"):
        source(tmp_path, first=5000.0, last=4000.0)


def test_specutils_is_imported_only_when_it_is_needed() -> None:
    program = (
        "import sys, distspec.sources.specutils.files; print('specutils' in sys.modules, 'astropy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
