"""LAMOST spectra: agreement with plain astropy on 200 real files, and one clear error for each kind of damage."""

import csv
import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from distspec.config import Condition, Lamost, Wanted
from distspec.errors import SourceError
from distspec.sources import Piece, Source
from distspec.sources.lamost import GRID, LamostSpectra
from distspec.spectra import Columns, Spectra, Status

COUNT = 60
HEADER = {"OBSID": 103232, "LMJD": 55859, "PLANID": "F5902", "SPID": 3, "FIBERID": 232, "RA": 330.9, "DEC": -0.17}
HEADER |= {"OBJTYPE": "Star", "FIBERTYP": "Obj", "FIBERMAS": 0, "VACUUM": True, "COEFF0": 3.5682, "COEFF1": 1e-4}
HEADER |= {"CLASS": "STAR", "SUBCLASS": "F4", "Z": 3.4e-5, "SNRG": 94.1, "SNRI": 155.9}


def source(path: Path, **settings: Any) -> LamostSpectra:
    scratch = path.parent if path.is_file() else path
    return LamostSpectra(Lamost(path=str(path), **settings), scratch.parent / "scratch")


def read_one(path: Path) -> tuple[Spectra, Columns]:
    return source(path).read(Piece(path.name, 0, 1))


def vectors(**changes: Any) -> dict[str, Any]:
    made = {
        "flux": np.arange(1, COUNT + 1, dtype=np.float32),
        "ivar": np.full(COUNT, 4, np.float32),
        "wavelength": (10 ** (3.5682 + 1e-4 * np.arange(COUNT))).astype(np.float32),
        "andmask": np.zeros(COUNT, np.int32),
        "ormask": np.zeros(COUNT, np.int32),
    }
    return made | changes


def write_dr1(path: Path, parts: dict[str, Any], **header: Any) -> Path:
    """Write the oldest layout: the third row is the flux divided by its continuum, and there is no OBSID."""
    rows = [parts["flux"], parts["ivar"], np.ones_like(parts["flux"]), parts["andmask"], parts["ormask"]]
    return write_image(path, rows, {"OBSID": None, "EXTEN0": "Flux Inverse Subcontinuum Andmask Ormask"} | header)


def write_dr8(path: Path, parts: dict[str, Any], **header: Any) -> Path:
    """Write the middle layout: the third row is the wavelength."""
    rows = [parts[name] for name in ("flux", "ivar", "wavelength", "andmask", "ormask")]
    return write_image(path, rows, {"EXTEN0": "Flux, Inverse, Wavelength, Andmask, Ormask"} | header)


def write_image(path: Path, rows: list[Any], header: dict[str, Any]) -> Path:
    unit = fits.PrimaryHDU(np.array(rows, np.float32))
    for key, value in (HEADER | header).items():
        if value is not None:
            unit.header[key] = value
    unit.writeto(path)
    return path


def write_dr10(path: Path, parts: dict[str, Any], checksum: bool = False, **header: Any) -> Path:
    """Write the newest layout: a table of one row of vectors, named as in the data model of DR10 v2.0."""
    primary = fits.PrimaryHDU()
    for key, value in (HEADER | header).items():
        if value is not None:
            primary.header[key] = value
    parts = {"normalization": np.ones(COUNT, np.float32)} | parts
    columns = [
        fits.Column(name.upper(), f"{len(values)}{'J' if 'mask' in name else 'E'}", array=values[None])
        for name, values in parts.items()
        if values is not None
    ]
    table = fits.BinTableHDU.from_columns(columns, name="COADD")
    fits.HDUList([primary, table]).writeto(path, checksum=checksum)
    return path


WRITERS = {"DR1": write_dr1, "DR8": write_dr8, "DR10": write_dr10}


# --- real files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "files"), [("lamost_dr1", 176), ("lamost_dr8", 24)])
def test_every_pixel_of_every_real_file_agrees_with_astropy(real_data: Path, folder: str, files: int) -> None:
    survey = pickle.loads(pickle.dumps(source(real_data / folder)))
    entries = survey.files()
    assert [entry.count for entry in entries] == [1] * files
    for entry in entries:
        spectra, _ = survey.read(Piece(entry.name, 0, 1))
        with fits.open(real_data / folder / entry.name) as units:
            flux, ivar, third, mask, _ = units[0].data
            header = units[0].header
        wave = 10 ** (header["COEFF0"] + header["COEFF1"] * np.arange(len(flux)))
        if folder == "lamost_dr8":
            np.testing.assert_allclose(third, wave, rtol=4e-7)
        else:
            assert np.median(third) < 2  # flux over continuum
        where = np.arange(len(flux)) + 82
        np.testing.assert_allclose(GRID.wave[where], wave, rtol=1e-12)
        np.testing.assert_array_equal(spectra.flux[0, where], flux)
        np.testing.assert_array_equal(spectra.ivar[0, where], np.where((mask != 0) | (flux == 0), 0, ivar))
        assert np.count_nonzero(spectra.ivar) == np.count_nonzero((ivar > 0) & (mask == 0) & (flux != 0))


def test_and_mask_adds_nothing_to_ivar_but_zero_flux_does(real_data: Path) -> None:
    masked = weighted = empty = 0
    for folder in ("lamost_dr1", "lamost_dr8"):
        for path in (real_data / folder).iterdir():
            with fits.open(path) as units:
                flux, ivar, _, mask, _ = units[0].data
            assert set(np.unique(mask)) <= {0, 1}
            masked += np.count_nonzero(mask)
            weighted += np.count_nonzero((mask != 0) & (ivar > 0))
            empty += np.count_nonzero((flux == 0) & (ivar > 0))
    assert (masked, weighted, empty) == (4246, 0, 146)


@pytest.mark.parametrize("folder", ["lamost_dr1", "lamost_dr8"])
def test_catalog_values_agree_with_the_labels(real_data: Path, folder: str) -> None:
    with (real_data / "labels.csv").open() as file:
        labels = {row["file"]: row for row in csv.DictReader(file) if row["folder"] == folder}
    survey = source(real_data / folder)
    ids = []
    for name, label in labels.items():
        _, columns = survey.read(Piece(name, 0, 1))
        assert (columns["class"][0], columns["subclass"][0]) == (label["class"], label["subclass"])
        assert columns["z"][0] == pytest.approx(float(label["z"]), abs=1e-12)
        assert columns["status"][0] == Status.OK
        numbers = f"{columns['lmjd'][0]}-{columns['planid'][0]}_sp{columns['spid'][0]:02d}-{columns['fiber'][0]:03d}"
        assert name.startswith(f"spec-{numbers}.fits")
        with fits.open(real_data / folder / name) as units:
            header = units[0].header
        obsid = header.get("OBSID")
        assert columns["obsid"][0] == (-1 if obsid is None else obsid)
        assert columns["id"][0] == (numbers.replace("_sp", "-") if obsid is None else str(obsid))
        assert (columns["ra"][0], columns["dec"][0]) == (header["RA"], header["DEC"])
        assert columns["snr_g"][0] == np.float32(header["SNRG" if "SNRG" in header else "SN_G"])
        ids.append(columns["id"][0])
    assert len(set(ids)) == len(labels)


def test_a_spectrum_that_lost_its_red_arm_keeps_the_blue_one(real_data: Path) -> None:
    survey = source(real_data / "lamost_dr8")
    spectra, columns = survey.read(Piece("spec-55859-F5907_sp01-092.fits.gz", 0, 1))
    assert columns["fibermask"][0] == 58
    assert np.isnan(columns["snr_i"][0])
    assert columns["status"][0] == Status.OK
    assert spectra.good[0].sum() == 2929
    assert columns["snr_g"][0] == np.float32(38.79)


def test_the_grid_holds_all_releases(tmp_path: Path) -> None:
    assert isinstance(source(tmp_path), Source)
    assert GRID.wave[82] == pytest.approx(10**3.5682, abs=1e-9)
    assert GRID.wave[-1] > 9101


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_layout_is_told_by_content_alone(tmp_path: Path, layout: str, packed: bool) -> None:
    path = WRITERS[layout](tmp_path / "anything.fits", vectors())
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    spectra, columns = read_one(path)
    np.testing.assert_array_equal(np.flatnonzero(spectra.ivar[0]), 82 + np.arange(COUNT))
    np.testing.assert_array_equal(spectra.flux[0, 82 : 82 + COUNT], np.arange(1, COUNT + 1))
    assert columns["id"].tolist() == ["55859-F5902-03-232" if layout == "DR1" else "103232"]
    assert spectra.grid == GRID
    kinds = {name: values.dtype.kind for name, values in columns.items()}
    assert kinds | {"id": "U", "class": "U", "z": "f", "zwarn": "i", "status": "i", "obsid": "i", "snr_g": "f"} == kinds


@pytest.mark.parametrize("layout", WRITERS)
def test_b1_b2_b3_bad_pixels_are_masked(tmp_path: Path, layout: str) -> None:
    parts = vectors()
    parts["flux"][:3] = np.nan, np.inf, 0
    parts["ivar"][3:7] = 0, -1, np.nan, np.inf
    parts["andmask"][7:9] = 1, 1 << 20
    parts["ormask"][9] = 1
    spectra, _ = read_one(WRITERS[layout](tmp_path / "a.fits", parts))
    np.testing.assert_array_equal(np.flatnonzero(spectra.ivar[0]) - 82, np.arange(9, COUNT))
    assert np.isfinite(spectra.flux).all()


@pytest.mark.parametrize("layout", WRITERS)
def test_b6_air_or_nothing_said_is_refused(tmp_path: Path, layout: str) -> None:
    with pytest.raises(SourceError, match="in air"):
        read_one(WRITERS[layout](tmp_path / "a.fits", vectors(), VACUUM=False))
    with pytest.raises(SourceError, match="no keyword VACUUM = T"):
        read_one(WRITERS[layout](tmp_path / "b.fits", vectors(), VACUUM=None))


@pytest.mark.parametrize("layout", ["DR8", "DR10"])
@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (10 ** (3.5682 + 1e-4 * np.arange(COUNT)) / 10, "good pixels outside"),
        (3.5682 + 1e-4 * np.arange(COUNT), "good pixels outside"),
        (10 ** (3.5682 + 1.01e-4 * np.arange(COUNT)), "miss the pixel centers"),
        (np.linspace(3700, 3750, COUNT), "miss the pixel centers"),
    ],
)
def test_b6_wavelengths_off_the_grid_are_refused(tmp_path: Path, layout: str, wave: Any, message: str) -> None:
    path = WRITERS[layout](tmp_path / "a.fits", vectors(wavelength=wave.astype(np.float32)))
    with pytest.raises(SourceError, match=message) as caught:
        read_one(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("wave", [np.full(COUNT, 3700.0), np.full(COUNT, np.nan)])
def test_b6_a_repeated_or_missing_wavelength_is_refused(tmp_path: Path, wave: Any) -> None:
    with pytest.raises(SourceError, match="third row does not rise"):
        read_one(write_dr8(tmp_path / "a.fits", vectors(wavelength=wave)))
    with pytest.raises(SourceError, match="repeated|outside"):
        read_one(write_dr10(tmp_path / "b.fits", vectors(wavelength=wave)))


def test_b6_a_header_without_its_wavelengths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no keyword COEFF0"):
        read_one(write_dr1(tmp_path / "a.fits", vectors(), COEFF0=None))
    with pytest.raises(SourceError, match="expected log10"):
        read_one(write_dr1(tmp_path / "b.fits", vectors(), COEFF0=3700.0))


# --- status --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({}, Status.OK),
        ({"Z": -9999.0}, Status.NO_REDSHIFT),
        ({"Z": -9999}, Status.NO_REDSHIFT),
        ({"Z": None}, Status.NO_REDSHIFT),
        ({"Z": "unknown"}, Status.NO_REDSHIFT),
        ({"FIBERTYP": "Sky"}, Status.NOT_A_TARGET),
        ({"FIBERTYP": "Unused"}, Status.NOT_A_TARGET),
        ({"OBJTYPE": "SKY"}, Status.NOT_A_TARGET),
        ({"FIBERTYP": "Dead"}, Status.FIBER),
        ({"FIBERTYP": "PosErr"}, Status.FIBER),
        ({"FIBERTYP": "F-Std", "FIBERMAS": 64}, Status.OK),
    ],
)
def test_status(tmp_path: Path, header: dict[str, Any], status: Status) -> None:
    _, columns = read_one(write_dr10(tmp_path / "a.fits", vectors(), **header))
    assert columns["status"][0] == status
    assert np.isnan(columns["z"][0]) == (Status.NO_REDSHIFT in status)


def test_b2_a_spectrum_without_a_good_pixel_is_dead(tmp_path: Path) -> None:
    _, columns = read_one(write_dr8(tmp_path / "a.fits", vectors(ivar=np.zeros(COUNT))))
    assert columns["status"][0] == Status.DEAD


def test_t10_a_large_obsid_is_exact(tmp_path: Path) -> None:
    _, columns = read_one(write_dr10(tmp_path / "a.fits", vectors(), OBSID=2**53 + 1))
    assert columns["id"].tolist() == ["9007199254740993"]
    assert columns["obsid"][0] == 2**53 + 1


def test_t4_a_file_that_names_no_spectrum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a LAMOST header that names its spectrum"):
        read_one(write_dr8(tmp_path / "a.fits", vectors(), OBSID=None, SPID=None))


# --- damaged and foreign files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ivar": None}, "expected a LAMOST image of 5 rows"),
        ({"wavelength": None}, "no column WAVELENGTH"),
        ({"andmask": None}, "no column ANDMASK"),
        ({"ivar": np.ones(COUNT - 1, np.float32)}, "expected the same length"),
        ({"flux": np.ones(1, np.float32)}, "expected the same length"),
    ],
)
def test_t4_missing_and_unequal_columns_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_one(write_dr10(tmp_path / "a.fits", vectors(**changes)))


def test_a_medium_resolution_file_is_refused(tmp_path: Path) -> None:
    path = write_dr10(tmp_path / "a.fits", vectors())
    with fits.open(path, mode="append") as units:
        units.append(fits.BinTableHDU(units[1].data, name="COADD_R"))
    with pytest.raises(SourceError, match="as medium-resolution files do"):
        read_one(path)


@pytest.mark.parametrize("layout", WRITERS)
def test_t1_a_truncated_file_is_refused_but_named(tmp_path: Path, layout: str) -> None:
    path = WRITERS[layout](tmp_path / "a.fits", vectors())
    content = path.read_bytes()
    for broken in (content[:-2880], gzip.compress(content[:-2880]), gzip.compress(content)[:-20]):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match="truncated"):
            read_one(path)
        columns = source(path).identify(Piece("a.fits", 0, 1))
        assert columns["lmjd"][0] == 55859
        assert columns["z"][0] == pytest.approx(3.4e-5)


def test_t2_a_flipped_bit_is_caught_by_the_checksum(tmp_path: Path) -> None:
    path = write_dr10(tmp_path / "a.fits", vectors(), checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(np.array(25, ">f4").tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="expected DATASUM"):
        read_one(path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>\n<html>404</html>", b"\x1f\x8b broken", b"SIMPLE  = "])
def test_t9_what_is_not_fits_is_refused_and_nothing_is_known_of_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.fits").write_bytes(content)
    with pytest.raises(SourceError):
        read_one(tmp_path / "a.fits")
    assert source(tmp_path / "a.fits").identify(Piece("a.fits", 0, 1)) == {}


@pytest.mark.parametrize("count", [0, 1])
def test_t8_short_spectra(tmp_path: Path, count: int) -> None:
    parts = {name: values[:count] for name, values in vectors().items()}
    if count:
        spectra, _ = read_one(write_dr10(tmp_path / "a.fits", parts | {"normalization": np.ones(1, np.float32)}))
        assert spectra.good.sum() == 1
    else:
        with pytest.raises(SourceError):
            read_one(write_dr8(tmp_path / "b.fits", parts))


# --- catalogs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def night(tmp_path: Path) -> Path:
    """Four spectra of two plans that share a spectrograph and a fiber."""
    folder = tmp_path / "night"
    folder.mkdir()
    for obsid, plan, fiber in ((1, "F5902", 7), (2, "F5907", 7), (3, "F5902", 8), (4, "F5907", 9)):
        name = f"spec-55859-{plan}_sp03-{fiber:03d}.fits"
        write_dr8(folder / name, vectors(), OBSID=obsid, PLANID=plan, FIBERID=fiber)
    return folder


def write_catalog(path: Path, names: str, *rows: str) -> str:
    path.write_text("\n".join(["|".join(names.split()), *rows]) + "\n")
    return str(path)


def test_a_catalog_selects_by_what_the_names_say_without_opening_files(tmp_path: Path, night: Path) -> None:
    rows = ("2|55859|F5907|3|7|50.0", "3|55859|F5902|3|8|3.0", "9|55859|F5902|3|99|60.0")
    catalog = write_catalog(tmp_path / "catalog.csv", "obsid lmjd planid spid fiberid snrg", *rows)
    wanted = Wanted(where=(Condition(column="snrg", min=10.0),))
    survey = source(night, catalog=catalog, wanted=wanted)
    for path in night.iterdir():
        path.write_bytes(b"not opened")
    assert [(entry.name, entry.count) for entry in survey.files()] == [("spec-55859-F5907_sp03-007.fits", 1)]
    assert survey.missing() == ["spec-55859-F5902_sp03-099"]
    everything = source(night, catalog=catalog)
    assert len(everything.files()) == 2


def test_a_file_named_otherwise_is_opened_to_know(tmp_path: Path, night: Path) -> None:
    (night / "spec-55859-F5907_sp03-009.fits").rename(night / "4.fits")
    (night / "spec-55859-F5902_sp03-008.fits").rename(night / "3.fits")
    catalog = write_catalog(tmp_path / "c.csv", "obsid lmjd planid spid fiberid", "4|55859|F5907|3|9")
    survey = source(night, catalog=catalog)
    assert {entry.name: entry.count for entry in survey.files()} == {"3.fits": None, "4.fits": None}
    assert (survey.count("3.fits"), survey.count("4.fits")) == (0, 1)
    assert survey.missing() == []


def test_a_catalog_of_obsid_alone_needs_the_headers(tmp_path: Path, night: Path) -> None:
    catalog = write_catalog(tmp_path / "c.csv", "obsid z", "3|0.1", "4|0.2", "5|0.3")
    survey = pickle.loads(pickle.dumps(source(night, catalog=catalog)))
    assert [entry.count for entry in survey.files()] == [None] * 4
    assert sorted(survey.count(entry.name) for entry in survey.files()) == [0, 0, 1, 1]
    assert survey.missing() == []


def test_a_catalog_without_any_key_is_refused(tmp_path: Path, night: Path) -> None:
    catalog = write_catalog(tmp_path / "c.csv", "name z", "a|0.1")
    with pytest.raises(SourceError, match="no column OBSID"):
        source(night, catalog=catalog).files()


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no file or folder"):
        source(tmp_path / "nowhere").files()
