"""SDSS spec files: agreement with independent readers on real files, and one clear error for each kind of damage."""

import csv
import gzip
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from pydantic import ValidationError

from distspec.config import Condition, Sdss, Wanted
from distspec.errors import ConfigError, SourceError
from distspec.sources import Piece
from distspec.sources.sdss.conventions import BAD_PIXEL, GRID, identities
from distspec.sources.sdss.spec import SdssFiles, SdssSpectra, open_sdss
from distspec.spectra import Columns, Spectra, Status

BRIGHTSKY, NEARBADPIXEL, UNKNOWN = 1 << 23, 1 << 16, 1 << 29


def read_one(path: Path) -> tuple[Spectra, Columns]:
    source = open_sdss(Sdss(path=str(path), layout="spec"), path.parent)
    (entry,) = source.files()
    assert entry.count == 1
    return source.read(Piece(entry.name, 0, 1))


def pieces_of(source: Any) -> list[Piece]:
    return [Piece(entry.name, 0, source.count(entry.name)) for entry in source.files()]


@pytest.fixture
def folder(real_data: Path) -> Path:
    return real_data / "sdss"


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Contents of a small file that is as it should be."""
    count = 50
    return {
        "VACUUM": True,
        "loglam": (3.6 + 1e-4 * np.arange(count)).astype(np.float32),
        "flux": np.arange(1, count + 1, dtype=np.float32),
        "ivar": np.full(count, 4, np.float32),
        "and_mask": np.zeros(count, np.int32),
        "catalog": {"Z": 0.1, "ZWARNING": 0, "CLASS": "GALAXY", "SUBCLASS": "", "PLUG_RA": 10.0, "PLUG_DEC": -5.0}
        | {"SPECOBJID": "   299489676975171584", "PLATE": 266, "MJD": 51602, "FIBERID": 1, "RUN2D": "26"},
    }


def write(path: Path, parts: dict[str, Any], checksum: bool = False, **changes: Any) -> Path:
    """Write a spec file with some contents changed, or left out where the change is None."""
    parts = {key: value for key, value in (parts | changes).items() if value is not None}
    primary = fits.PrimaryHDU()
    for key in ("VACUUM", "AIRORVAC", "BUNIT"):
        if key in parts:
            primary.header[key] = parts[key]
    names = [name for name in ("flux", "loglam", "ivar", "and_mask") if name in parts]
    columns = [fits.Column(name, "J" if name == "and_mask" else "E", array=parts[name]) for name in names]
    units = [primary, fits.BinTableHDU.from_columns(columns, name="COADD")]
    if "catalog" in parts:
        formats = {str: "32A", int: "K", float: "D"}
        row = {key: value for key, value in parts["catalog"].items() if value is not None}
        columns = [
            fits.Column(key, formats[type(value)], array=np.array([value])) if type(value) in formats else value
            for key, value in row.items()
        ]
        units.append(fits.BinTableHDU.from_columns(columns, name="SPECOBJ"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fits.verify.VerifyWarning)
        fits.HDUList(units).writeto(path, checksum=checksum)
    return path


# --- real files ----------------------------------------------------------------------------------------------------


def test_every_file_is_read_and_ids_come_out_digit_for_digit(folder: Path) -> None:
    source = pickle.loads(pickle.dumps(open_sdss(Sdss(path=str(folder)), folder)))
    pieces = pieces_of(source)
    with (folder.parent / "labels.csv").open() as file:
        labels = {row["file"]: row for row in csv.DictReader(file) if row["folder"] == "sdss"}
    assert [p.name for p in pieces] == sorted(f.name for f in folder.iterdir())
    assert {p.name for p in pieces} == set(labels)
    for piece in pieces:
        spectra, columns = source.read(piece)
        assert len(spectra) == len(piece) == 1
        assert {len(values) for values in columns.values()} == {1}
        label = labels[piece.name]
        assert (columns["class"][0], columns["subclass"][0]) == (label["class"], label["subclass"])
        assert columns["z"][0] == pytest.approx(float(label["z"]), rel=1e-7, abs=1e-12)
        assert columns["zwarn"][0] == int(label["zwarn"])
        plate, mjd, fiber = (int(columns[name][0]) for name in ("plate", "mjd", "fiber"))
        if piece.name.startswith("spec-"):
            assert piece.name == f"spec-{plate:04d}-{mjd}-{fiber:04d}.fits"
        with fits.open(folder / piece.name) as units:
            row = units[2].data[0]
            run2d = str(row["RUN2D"]).strip()
            assert columns["id"][0] == str(row["SPECOBJID"]).strip()
            assert columns["ra"][0] == row["PLUG_RA"]
        # The published bit formula, from the four numbers alone.
        numbers = (np.array([number]) for number in (plate, mjd, fiber))
        assert columns["id"][0] == identities(None, *numbers, run2d, "")[0]


def test_pixels_agree_with_a_plain_read(folder: Path) -> None:
    source = open_sdss(Sdss(path=str(folder)), folder)
    for piece in pieces_of(source):
        spectra, _ = source.read(piece)
        with fits.open(folder / piece.name) as units:
            table = {name.lower(): np.array(units[1].data[name]) for name in units[1].data.names}
        where = np.searchsorted(GRID.wave, 10 ** table["loglam"].astype(float) * (1 - 5e-5))
        np.testing.assert_allclose(GRID.wave[where], 10 ** table["loglam"].astype(float), rtol=6e-7)
        np.testing.assert_array_equal(spectra.flux[0, where], table["flux"])
        bad = (table["and_mask"].astype(np.int64) & BAD_PIXEL) != 0
        np.testing.assert_array_equal(spectra.ivar[0, where], np.where(bad, 0, table["ivar"]))
        assert np.count_nonzero(spectra.ivar) == np.count_nonzero((table["ivar"] > 0) & ~bad)


@pytest.mark.parametrize("name", ["spec-1931-53358-0251.fits", "spec-3655-55240-0258.fits", "1237662637447184537.fits"])
def test_pixels_agree_with_specutils(folder: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # specutils and its readers warn about themselves
        from specutils import Spectrum

        other = Spectrum.read(folder / name, format="SDSS-III/IV spec")
    spectra, _ = read_one(folder / name)
    wave = other.spectral_axis.to_value("Angstrom")
    where = np.abs(GRID.wave[None] - wave[:, None]).argmin(axis=1)
    # loglam is float32, and rounded by up to 2.4e-7: 0.005 Å at 9000 Å.
    np.testing.assert_allclose(GRID.wave[where], wave, rtol=6e-7)
    unmasked = ~other.mask & (other.uncertainty.array > 0)
    np.testing.assert_array_equal(spectra.flux[0, where][unmasked], other.flux.value[unmasked])
    np.testing.assert_array_equal(spectra.ivar[0, where][unmasked], other.uncertainty.array[unmasked])
    # specutils masks by any bit; only the bits that say so are bad here.
    assert set(np.flatnonzero(spectra.good[0])) >= set(where[unmasked])


def test_wavelengths_are_exact_to_a_milliangstrom_at_the_blue_end() -> None:
    np.testing.assert_allclose(GRID.wave[[0, 600, 4800]], [10**3.54, 10**3.6, 10**4.02], atol=1e-9)


def test_the_dead_fiber_is_delivered_and_marked(folder: Path) -> None:
    spectra, columns = read_one(folder / "spec-0269-51581-0003.fits")
    assert not spectra.ivar.any()
    assert columns["status"][0] == Status.DEAD
    assert (columns["z"][0], columns["zwarn"][0]) == (0.0, 6)


def test_the_short_spectrum_keeps_its_pixels(folder: Path) -> None:
    spectra, columns = read_one(folder / "spec-1931-53358-0251.fits")
    assert columns["status"][0] == Status.OK
    assert spectra.good.sum() == 2859  # 2866 but for 7 under a bright sky
    assert np.count_nonzero(spectra.flux) == 2866


def test_ids_above_int64_and_dust_of_eboss(folder: Path) -> None:
    _, columns = read_one(folder / "spec-10656-58163-0366.fits")
    assert columns["id"][0] == "11997690149582688256"
    assert int(columns["id"][0]) > 2**63
    # EXTINCTION / (4.239 ... 1.263) is the same in all bands; the older wdtools file needs the older coefficients.
    assert columns["ebv"][0] == pytest.approx(0.20297422 / 4.239, rel=1e-4)
    assert read_one(folder / "wdtools_sample_spectrum.fits")[1]["ebv"][0] == pytest.approx(0.0331084, rel=1e-4)
    assert np.isnan(read_one(folder / "spec-0266-51602-0001.fits")[1]["ebv"][0])


# --- made files ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_as_it_should_be(tmp_path: Path, parts: dict[str, Any]) -> None:
    path = write(tmp_path / "a.fits", parts, checksum=True)
    packed = tmp_path / "sub" / "b.fits.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "._a.fits").write_bytes(b"junk that some systems leave")
    source = open_sdss(Sdss(path=str(tmp_path)), tmp_path)
    assert [entry.name for entry in source.files()] == ["a.fits", "sub/b.fits.gz"]
    for piece in pieces_of(source):
        spectra, columns = source.read(piece)
        assert spectra.grid == source.grid
        np.testing.assert_array_equal(spectra.flux[0, 600:650], parts["flux"])
        np.testing.assert_array_equal(np.flatnonzero(spectra.ivar[0]), np.arange(600, 650))
        assert columns["id"].tolist() == ["299489676975171584"]
        kinds = {name: values.dtype.kind for name, values in columns.items()}
        assert kinds | {"id": "U", "class": "U", "z": "f", "zwarn": "i", "status": "i", "ebv": "f"} == kinds


def test_masked_pixels(tmp_path: Path, parts: dict[str, Any]) -> None:
    bits = np.zeros(50, np.int64)
    bits[:4] = BRIGHTSKY, NEARBADPIXEL, UNKNOWN, 1 << 31
    ivar, flux = parts["ivar"].copy(), parts["flux"].copy()
    ivar[4:8] = 0, -1, np.nan, np.inf
    flux[8:10] = np.nan, np.inf
    signed = bits.astype(np.uint32).view(np.int32)
    spectra, _ = read_one(write(tmp_path / "a.fits", parts, and_mask=signed, ivar=ivar, flux=flux))
    np.testing.assert_array_equal(np.flatnonzero(spectra.ivar[0]) - 600, [1, *range(10, 50)])
    assert np.isfinite(spectra.flux).all()
    assert np.isfinite(spectra.ivar).all()


@pytest.mark.parametrize("count", [0, 1])
def test_t8_short_spectra(tmp_path: Path, parts: dict[str, Any], count: int) -> None:
    cut = {name: parts[name][:count] for name in ("flux", "ivar", "loglam", "and_mask")}
    spectra, columns = read_one(write(tmp_path / "a.fits", parts, **cut))
    assert spectra.good.sum() == count
    assert columns["status"][0] == (Status.OK if count else Status.DEAD)


def test_padding_without_wavelength_is_ignored(tmp_path: Path, parts: dict[str, Any]) -> None:
    loglam, ivar = parts["loglam"].copy(), parts["ivar"].copy()
    loglam[-3:], ivar[-3:] = 0, 0
    spectra, _ = read_one(write(tmp_path / "a.fits", parts, loglam=loglam, ivar=ivar))
    assert spectra.good.sum() == 47


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Z": float("nan")}, Status.NO_REDSHIFT),
        ({"ZWARNING": 1 << 7}, Status.FIBER),
        ({"ZWARNING": 1}, Status.NOT_A_TARGET),
        ({"OBJTYPE": "SKY"}, Status.NOT_A_TARGET),
        ({"SOURCETYPE": "SKY", "Z": float("inf")}, Status.NOT_A_TARGET | Status.NO_REDSHIFT),
        ({"OBJTYPE": "SPECTROPHOTO_STD"}, Status.NOT_A_TARGET),
        ({"SOURCETYPE": "REDDEN_STD", "OBJTYPE": "NA"}, Status.NOT_A_TARGET),
        ({"TARGETTYPE": "STANDARD"}, Status.NOT_A_TARGET),
        ({"TARGETTYPE": "SCIENCE", "OBJTYPE": "NA"}, Status.OK),
        ({"ZWARNING": 4}, Status.OK),
    ],
)
def test_status(tmp_path: Path, parts: dict[str, Any], changes: dict[str, Any], status: Status) -> None:
    _, columns = read_one(write(tmp_path / "a.fits", parts, catalog=parts["catalog"] | changes))
    assert columns["status"][0] == status


@pytest.mark.parametrize(
    "specobjid",
    [
        None,
        "",
        299489676975171584,
        fits.Column("SPECOBJID", "D", array=[2.99489676975171584e17]),
        fits.Column("SPECOBJID", "K", bzero=2**63, array=np.array([299489676975171584], np.uint64)),
    ],
)
def test_t7_t10_an_id_of_any_storage_is_exact(tmp_path: Path, parts: dict[str, Any], specobjid: Any) -> None:
    _, columns = read_one(write(tmp_path / "a.fits", parts, catalog=parts["catalog"] | {"SPECOBJID": specobjid}))
    assert columns["id"].tolist() == ["299489676975171584"]


def test_an_unsigned_id_without_its_shift(tmp_path: Path, parts: dict[str, Any]) -> None:
    row = parts["catalog"] | {"SPECOBJID": 11997690149582688256 - 2**64}
    assert read_one(write(tmp_path / "a.fits", parts, catalog=row))[1]["id"][0] == "11997690149582688256"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"VACUUM": False}, "in air"),
        ({"AIRORVAC": "air"}, "in air"),
        ({"VACUUM": None}, "no keyword VACUUM"),
        ({"BUNIT": "erg/s/cm2/Hz"}, "flux in 'erg/s/cm2/Hz'"),
        ({"and_mask": None}, "no column AND_MASK"),
        ({"ivar": None}, "expected an SDSS table of FLUX, IVAR and LOGLAM"),
        ({"catalog": None}, "holds COADD; expected one catalog row"),
        ({"loglam": (3.6 + 1.00e-4 * np.arange(50) + 0.4e-4).astype(np.float32)}, "miss the pixel centers"),
        ({"loglam": (3.6 + 1.02e-4 * np.arange(50)).astype(np.float32)}, "miss the pixel centers"),
        ({"loglam": np.linspace(3800, 9200, 50, dtype=np.float32)}, "good pixels outside"),
        ({"loglam": np.log(np.linspace(3800, 9200, 50)).astype(np.float32)}, "good pixels outside"),
        ({"loglam": np.full(50, np.nan, np.float32)}, "good pixels outside"),
        ({"loglam": np.full(50, 3.6, np.float32)}, "wavelength is repeated"),
    ],
)
def test_t4_wrong_contents_are_refused(
    tmp_path: Path, parts: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.fits", parts, **changes)
    with pytest.raises(SourceError, match=message) as caught:
        read_one(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("column", ["Z", "ZWARNING", "CLASS", "SUBCLASS"])
def test_t4_a_missing_column_is_named(tmp_path: Path, parts: dict[str, Any], column: str) -> None:
    path = write(tmp_path / "a.fits", parts, catalog=parts["catalog"] | {column: None})
    with pytest.raises(SourceError, match=column):
        read_one(path)


def test_a_column_of_the_wrong_kind_is_an_error_of_the_file(tmp_path: Path, parts: dict[str, Any]) -> None:
    path = write(tmp_path / "a.fits", parts, catalog=parts["catalog"] | {"Z": "unknown"})
    with pytest.raises(SourceError, match=r"a\.fits: contents cannot be used"):
        read_one(path)


def test_an_id_that_cannot_be_known_is_refused(tmp_path: Path, parts: dict[str, Any]) -> None:
    path = write(tmp_path / "a.fits", parts, catalog=parts["catalog"] | {"SPECOBJID": None, "RUN2D": "DR-x"})
    with pytest.raises(SourceError, match="SPECOBJID is None"):
        read_one(path)


# --- damaged files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>\n<html>404</html>", "a web page"),
        (b"PK\x03\x04 and so on", "a zip archive"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"name" + bytes(253) + b"ustar" + bytes(3000), "a tar archive"),
        (b"SIMPLE  =                    T", "ends inside the header"),
        (b"wave flux\n1 2\n", "bytes that begin 'wave flux"),
        (b"\x1f\x8b broken", "gzip data damaged"),
    ],
)
def test_t9_what_is_not_fits_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.fits"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        read_one(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2879, 2880 + 100, 5760 + 80, -1, -2880])
def test_t1_a_truncated_file_is_refused(tmp_path: Path, parts: dict[str, Any], length: int) -> None:
    path = write(tmp_path / "a.fits", parts)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SourceError, match="truncated"):
        read_one(path)
    path.with_suffix(".fits.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(SourceError, match="truncated"):
        read_one(path.with_suffix(".fits.gz"))


def test_t1_a_truncated_gzip_file_is_refused(tmp_path: Path, parts: dict[str, Any]) -> None:
    packed = gzip.compress(write(tmp_path / "a.fits", parts).read_bytes())
    (tmp_path / "b.fits.gz").write_bytes(packed[:-30])
    with pytest.raises(SourceError, match="gzip data damaged or truncated"):
        read_one(tmp_path / "b.fits.gz")


def test_t3_without_a_checksum_nothing_is_verified(tmp_path: Path, parts: dict[str, Any]) -> None:
    """What a file does not promise cannot be broken: the flipped bit is read as it stands."""
    content = bytearray(write(tmp_path / "a.fits", parts).read_bytes())
    content[content.index(np.array(25, ">f4").tobytes())] ^= 1
    (tmp_path / "a.fits").write_bytes(content)
    assert read_one(tmp_path / "a.fits")[0].flux[0, 624] != parts["flux"][24]


def test_t6_a_gzip_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "a.fits", parts).read_bytes()
    (tmp_path / "a.fits").unlink()
    (tmp_path / "b.fits.gz").write_bytes(gzip.compress(content + bytes(1 << 24)))
    monkeypatch.setattr("distspec.sources.files.fits.UNPACKED_LIMIT", 1 << 20)
    with pytest.raises(SourceError, match="unpacks to more than"):
        read_one(tmp_path / "b.fits.gz")


def test_t2_a_flipped_bit_is_caught_by_the_checksum(tmp_path: Path, parts: dict[str, Any]) -> None:
    content = bytearray(write(tmp_path / "a.fits", parts, checksum=True).read_bytes())
    content[content.index(np.array(25, ">f4").tobytes())] ^= 1
    (tmp_path / "a.fits").write_bytes(content)
    with pytest.raises(SourceError, match="expected DATASUM"):
        read_one(tmp_path / "a.fits")


def test_t2_a_changed_header_is_caught_by_the_checksum(tmp_path: Path, parts: dict[str, Any]) -> None:
    content = write(tmp_path / "a.fits", parts, checksum=True).read_bytes()
    (tmp_path / "a.fits").write_bytes(content.replace(b"'loglam  '", b"'loglam'  "))
    with pytest.raises(SourceError, match="checksum of COADD is wrong"):
        read_one(tmp_path / "a.fits")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"NAXIS2  =                   50", b"NAXIS2  =   900000000000000000", "truncated"),
        (b"NAXIS2  =                   50", b"NAXIS2  =                  -50", "possible data unit"),
        (b"NAXIS2  =                   50", b"NAXIS2  =                 many", "expected a FITS value"),
        (b"NAXIS2  =                   50", b"NAXISX  =                   50", "no keyword NAXIS2"),
        (b"NAXIS1  =                   16", b"NAXIS1  =                   14", "columns fill 16 bytes"),
        (b"TFORM1  = 'E       '", b"TFORM1  = 'Y       '", "format 'Y'"),
        (b"TFORM1  = 'E       '", b"TFORM1  = '4X      '", "columns fill 13 bytes"),
        (b"XTENSION=", b"XTENSIOM=", "expected the next header"),
        (b"TTYPE1  = 'flux    '", b"TTYPE1  = 'ivar    '", "expected an SDSS table"),
    ],
)
def test_t5_t6_a_damaged_header_is_refused(
    tmp_path: Path, parts: dict[str, Any], old: bytes, new: bytes, message: str
) -> None:
    content = write(tmp_path / "a.fits", parts).read_bytes()
    assert content.count(old) >= 1
    (tmp_path / "a.fits").write_bytes(content.replace(old, new, 1))
    with pytest.raises(SourceError, match=message):
        read_one(tmp_path / "a.fits")


def test_t5_a_stray_byte_in_a_comment_and_a_repeated_keyword_do_no_harm(tmp_path: Path, parts: dict[str, Any]) -> None:
    content = write(tmp_path / "a.fits", parts).read_bytes()
    end = content.index(b"END" + b" " * 77)
    cards = b"COMMENT \xc5ngstr\xf6m".ljust(80) + b"VACUUM  =                    F".ljust(80)
    cards += b"END".ljust(80)
    (tmp_path / "a.fits").write_bytes(content[:end] + cards + content[end + len(cards) :])
    assert read_one(tmp_path / "a.fits")[0].good.sum() == 50


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file or folder .*nowhere"):
        open_sdss(Sdss(path=str(tmp_path / "nowhere")), tmp_path).files()
    with pytest.raises(SourceError, match=r"no \*\.fits or \*\.fits\.gz file in"):
        open_sdss(Sdss(path=str(tmp_path)), tmp_path).files()


@pytest.mark.parametrize("root", ["", "files.list"])
def test_a_file_that_may_not_be_read(tmp_path: Path, root: str) -> None:
    (tmp_path / "a.fits").symlink_to(tmp_path / "gone.fits")
    (tmp_path / "files.list").write_text("a.fits\n")
    source = open_sdss(Sdss(path=str(tmp_path / root)), tmp_path)
    with pytest.raises(SourceError, match=r"a\.fits: No such file"):
        source.read(pieces_of(source)[0])


# --- layouts, catalogs and places ----------------------------------------------------------------------------------


def write_catalog(path: Path, spectra: list[tuple[int, int, int]], **columns: Any) -> Path:
    keys = dict(zip(("PLATE", "MJD", "FIBERID"), np.array(spectra).T, strict=True))
    Table(keys | columns).write(path)
    return path


def test_files_are_wanted_by_their_names_and_others_by_their_rows(tmp_path: Path, parts: dict[str, Any]) -> None:
    folder = tmp_path / "spectra" / "0266"
    folder.mkdir(parents=True)
    for fiber in (1, 2, 3):
        write(folder / f"spec-0266-51602-{fiber:04d}.fits", parts, catalog=parts["catalog"] | {"FIBERID": fiber})
    write(tmp_path / "spectra" / "odd.fits", parts, catalog=parts["catalog"] | {"FIBERID": 5, "SPECOBJID": None})
    write(tmp_path / "spectra" / "other.fits", parts, catalog=parts["catalog"] | {"FIBERID": 6})
    spectra = [(266, 51602, 1), (266, 51602, 2), (266, 51602, 5), (300, 51700, 7), (266, 51602, 3)]
    write_catalog(tmp_path / "spectra" / "specObj-dr16.fits", spectra, SN_MEDIAN_ALL=[9.0, 2.0, 9.0, 9.0, 7.0])
    wanted = Wanted(where=(Condition(column="sn_median_all", min=5.0),))
    settings = Sdss(path=str(tmp_path / "spectra"), catalog="specObj-dr16.fits", wanted=wanted)
    source = pickle.loads(pickle.dumps(open_sdss(settings, tmp_path)))
    counts = {entry.name: entry.count for entry in source.files()}
    first, third = "0266/spec-0266-51602-0001.fits", "0266/spec-0266-51602-0003.fits"
    assert counts == {first: 1, third: 1, "odd.fits": None, "other.fits": None}
    assert (source.count("odd.fits"), source.count("other.fits")) == (1, 0)
    assert source.read(Piece("odd.fits", 0, 1))[1]["fiber"].tolist() == [5]
    assert source.missing() == []  # one of the files with other names might be it
    for name in ("odd", "other"):
        (tmp_path / "spectra" / f"{name}.fits").unlink()
    assert open_sdss(settings, tmp_path).missing() == ["spec-0266-51602-0005", "spec-0300-51700-0007"]
    assert len(pickle.dumps(source)) < 2000
    assert open_sdss(Sdss(path=str(tmp_path / "spectra")), tmp_path).missing() == []


def test_the_highest_of_a_catalog(tmp_path: Path, parts: dict[str, Any]) -> None:
    for fiber in range(1, 6):
        write(tmp_path / f"spec-0266-51602-{fiber:04d}.fits", parts)
    spectra = [(266, 51602, fiber) for fiber in range(1, 6)]
    catalog = write_catalog(tmp_path / "cat.fits", spectra, SN=[1.0, np.nan, 3.0, 3.0, 2.0])
    settings = Sdss(path=str(tmp_path), catalog=str(catalog), wanted=Wanted(highest="SN", limit=2))
    names = [entry.name for entry in open_sdss(settings, tmp_path).files()]
    assert names == ["spec-0266-51602-0003.fits", "spec-0266-51602-0004.fits"]


def test_conditions_without_a_catalog_are_refused() -> None:
    with pytest.raises(ValidationError, match="wanted needs a catalog"):
        Sdss(path="x", wanted=Wanted(highest="SN", limit=2))


def test_companions_and_both_layouts(tmp_path: Path, parts: dict[str, Any]) -> None:
    path = write(tmp_path / "spec-0266-51602-0001.fits", parts)
    for name in ("spZbest-0266-51602.fits", "spAll-v5_13_0.fits", "specObj-dr16.fits", "photoPosPlate-0266.fits"):
        (tmp_path / name).write_bytes(path.read_bytes())
    source = open_sdss(Sdss(path=str(tmp_path)), tmp_path)
    assert [entry.name for entry in source.files()] == [path.name]
    assert isinstance(source, SdssFiles)
    (tmp_path / "spPlate-0266-51602.fits").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match='1 spPlate and 1 spec files.*set layout = "plate"'):
        open_sdss(Sdss(path=str(tmp_path)), tmp_path).files()
    source = open_sdss(Sdss(path=str(tmp_path), layout="spec"), tmp_path)
    assert isinstance(source, SdssSpectra)
    assert [entry.name for entry in source.files()] == [path.name]
    path.unlink()
    with pytest.raises(SourceError, match="no spec file in"):
        open_sdss(Sdss(path=str(tmp_path), layout="spec"), tmp_path).files()
    # Named by itself, a file is read whatever its name.
    alone = Sdss(path=str(tmp_path / "spZbest-0266-51602.fits"), layout="spec")
    assert len(open_sdss(alone, tmp_path).files()) == 1


def test_archives_buckets_and_lists(tmp_path: Path, parts: dict[str, Any]) -> None:
    folder = tmp_path / "lite" / "0266"
    folder.mkdir(parents=True)
    for fiber in (1, 2):
        flux = parts["flux"] * fiber
        write(folder / f"spec-0266-51602-{fiber:04d}.fits", parts, flux=flux)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "lite", "./lite")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.relative_to(tmp_path))
    bucket = fsspec.filesystem("memory")
    for path in folder.iterdir():
        bucket.pipe(f"/sdss/{path.relative_to(tmp_path)}", path.read_bytes())
    names = [f"lite/0266/spec-0266-51602-{fiber:04d}.fits" for fiber in (1, 2)]
    (tmp_path / "some.list").write_text("\n".join(["# comment", "", *names, names[0]]))
    for root in ("all.tar", "all.zip", "memory://sdss", "some.list", ""):
        path = root if "://" in root else str(tmp_path / root) if root else str(tmp_path)
        source = pickle.loads(pickle.dumps(open_sdss(Sdss(path=path), tmp_path)))
        assert [entry.name for entry in source.files()] == names
        for fiber, name in enumerate(names, 1):
            spectra, _ = source.read(Piece(name, 0, 1))
            np.testing.assert_array_equal(spectra.flux[0, 600:650], parts["flux"] * fiber)
    single = "memory://sdss/lite/0266/spec-0266-51602-0002.fits"
    source = open_sdss(Sdss(path=single), tmp_path)
    assert [entry.name for entry in source.files()] == ["spec-0266-51602-0002.fits"]
    spectra, _ = source.read(Piece("spec-0266-51602-0002.fits", 0, 1))
    assert spectra.flux[0, 600] == parts["flux"][0] * 2
