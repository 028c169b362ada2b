"""SDSS plates: the same spectra, rows and identifiers as the spec files of the same objects; redshifts by fiber."""

import gzip
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from distspec.config import Condition, Sdss, Simulate, Wanted
from distspec.errors import SourceError
from distspec.sources import Piece, Source
from distspec.sources.sdss.conventions import BAD_PIXEL, GRID
from distspec.sources.sdss.plates import SdssPlates
from distspec.sources.sdss.spec import open_sdss
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Columns, Spectra, Status
from tests.support.survey_files import write_plates, write_sdss, write_specobj

NAME = "spPlate-3655-55240.fits"
FIBERS = np.array([4, 1, 3, 7], np.int32)


def plates(path: Path, **settings: Any) -> SdssPlates:
    return SdssPlates(Sdss(path=str(path), **settings), path if path.is_dir() else path.parent)


def read_all(source: Source) -> tuple[list[str], Spectra, Columns]:
    pieces = [Piece(e.name, 0, e.count if e.count is not None else source.count(e.name)) for e in source.files()]
    read = [source.read(piece) for piece in pieces]
    flux, ivar = (np.concatenate([getattr(s, what) for s, _ in read]) for what in ("flux", "ivar"))
    columns = {name: np.concatenate([c[name] for _, c in read]) for name in read[0][1]}
    return [p.name for p in pieces], Spectra(np.arange(len(flux)), flux, ivar, GRID), columns


def write(folder: Path, name: str = NAME, **changes: Any) -> Path:
    """Write a plate of four fibers with known numbers; a change replaces a part of it."""
    count, pixels = len(FIBERS), 60
    flux = FIBERS[:, None] + np.arange(pixels, dtype=np.float32)[None] / 100
    parts: dict[str, Any] = {
        "flux": flux.astype(np.float32),
        "ivar": np.full((count, pixels), 4, np.float32),
        "mask": np.zeros((count, pixels), np.int32),
        "header": {},
        "plugmap": {},
    } | changes
    primary = fits.PrimaryHDU(parts["flux"])
    header = {"PLATEID": 3655, "MJD": 55240, "VACUUM": True, "COEFF0": 3.6, "COEFF1": 1e-4, "RUN2D": "v5_13_0"}
    for key, value in (header | {"BUNIT": "1E-17 erg/cm^2/s/Ang"} | parts["header"]).items():
        if value is not None:
            primary.header[key] = value
    plugmap = {
        "FIBERID": FIBERS,
        "OBJTYPE": np.array(["GALAXY", "SKY", "SPECTROPHOTO_STD", "QSO"]),
        "RA": np.array([10.0, 20.0, 30.0, 40.0]),
        "DEC": np.array([-1.0, -2.0, -3.0, -4.0]),
    } | parts["plugmap"]
    units = [primary, fits.ImageHDU(parts["ivar"]), fits.ImageHDU(parts["mask"]), fits.ImageHDU(parts["mask"])]
    units += [fits.ImageHDU(parts["ivar"]), table(plugmap), fits.ImageHDU(parts["ivar"])]
    folder.mkdir(parents=True, exist_ok=True)
    fits.HDUList(units).writeto(folder / name, checksum=parts.get("checksum", False))
    return folder / name


def write_zbest(path: Path, **changes: Any) -> Path:
    columns = {
        "PLATE": np.full(4, 3655),
        "MJD": np.full(4, 55240),
        "FIBERID": np.array([1, 3, 4, 7], np.int32),
        "Z": np.array([0.1, 0.3, 0.4, np.nan], np.float32),
        "ZWARNING": np.array([1, 0, 4, 1 << 7], np.int32),
        "CLASS": np.array(["STAR", "STAR", "GALAXY", "QSO"]),
        "SUBCLASS": np.array(["", "F5", "AGN", "BROADLINE"]),
        "PLUG_RA": np.array([1.0, 3.0, 4.0, 7.0]),
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: values for name, values in columns.items() if values is not None}
    fits.HDUList([fits.PrimaryHDU(), table(kept)]).writeto(path)
    return path


def table(columns: dict[str, Any]) -> fits.BinTableHDU:
    formats = {"i8": "K", "i4": "J", "f4": "E", "f8": "D"}
    return fits.BinTableHDU.from_columns(
        [fits.Column(k, formats.get(np.asarray(v).dtype.str[1:], "16A"), array=v) for k, v in columns.items()]
    )


@pytest.fixture(scope="module")
def survey() -> SimulatedSurvey:
    return SimulatedSurvey(Simulate(spectra=700, anomalies=0.1), seed=5)


@pytest.mark.slow
def test_plates_and_spec_files_of_the_same_objects_are_the_same(tmp_path: Path, survey: SimulatedSurvey) -> None:
    """Rows 620 to 660 are the last fibers of one plate and the first of the next."""
    rows = range(620, 660)
    write_sdss(survey, tmp_path / "spec", rows)
    paths = write_plates(survey, tmp_path / "plates", rows)
    assert [path.relative_to(tmp_path / "plates").as_posix() for path in paths] == [
        "26/0266/spPlate-0266-51600.fits",
        "26/0267/spPlate-0267-51601.fits",
    ]
    _, spectra, columns = read_all(open_sdss(Sdss(path=str(tmp_path / "spec")), tmp_path))
    names, other, others = read_all(open_sdss(Sdss(path=str(tmp_path / "plates")), tmp_path))
    assert names == ["26/0266/spPlate-0266-51600.fits", "26/0267/spPlate-0267-51601.fits"]
    np.testing.assert_array_equal(other.ivar, spectra.ivar)
    np.testing.assert_array_equal(other.flux, spectra.flux)
    assert others.keys() == columns.keys()
    for name, values in columns.items():
        assert others[name].dtype.kind == values.dtype.kind
        if name != "ebv":
            np.testing.assert_array_equal(others[name], values)
    assert np.isnan(others["ebv"]).all()


def test_wanted_fibers_only(tmp_path: Path, survey: SimulatedSurvey) -> None:
    rows = range(620, 660)
    write_plates(survey, tmp_path / "plates", rows)
    catalog = write_specobj(survey, tmp_path / "specObj.fits", range(610, 700))
    wanted = Wanted(where=(Condition(column="CLASS", one_of=("GALAXY",)),), highest="SN_MEDIAN_ALL", limit=50)
    settings = Sdss(path=str(tmp_path / "plates"), catalog=str(catalog), wanted=wanted)
    with fits.open(catalog) as units:
        data = units[1].data[:]
    galaxy = np.flatnonzero((data["CLASS"] == "GALAXY") & ~np.isnan(data["SN_MEDIAN_ALL"]))
    best = np.sort(galaxy[np.argsort(-data["SN_MEDIAN_ALL"][galaxy], kind="stable")][:50])
    source = pickle.loads(pickle.dumps(open_sdss(settings, tmp_path)))
    _, spectra, columns = read_all(source)
    held = [i for i in best if 620 <= 610 + i < 660]
    assert columns["fiber"].tolist() == data["FIBERID"][held].tolist()
    assert columns["plate"].tolist() == data["PLATE"][held].tolist()
    _, whole, all_columns = read_all(open_sdss(Sdss(path=str(tmp_path / "plates")), tmp_path))
    at = np.flatnonzero(np.isin(all_columns["id"], columns["id"]))
    np.testing.assert_array_equal(spectra.flux, whole.flux[at])
    keys = zip(*(data[name][best].tolist() for name in ("PLATE", "MJD", "FIBERID")), strict=True)
    names = [f"spec-{plate:04d}-{mjd:05d}-{fiber:04d}" for plate, mjd, fiber in keys]
    shutil.rmtree(tmp_path / "plates" / "26" / "0267")
    gone = [name for i, name in zip(best, names, strict=True) if data["PLATE"][i] == 267]
    assert gone
    assert open_sdss(settings, tmp_path).missing() == gone
    only = Wanted(where=(Condition(column="PLATE", one_of=(267,)),))
    settings = Sdss(path=str(tmp_path / "plates"), catalog=str(catalog), wanted=only)
    assert open_sdss(settings, tmp_path).files() == []


def test_pixels_agree_with_a_plain_read(tmp_path: Path, rng: np.random.Generator) -> None:
    flux = rng.normal(size=(4, 4600)).astype(np.float32)
    ivar = rng.uniform(-0.2, 2, (4, 4600)).astype(np.float32)
    mask = np.where(rng.random((4, 4600)) < 0.2, 1 << rng.integers(1, 31, (4, 4600)), 0).astype(np.int32)
    flux[0, 7], ivar[1, 8] = np.nan, np.inf
    path = write(tmp_path, flux=flux, ivar=ivar, mask=mask, header={"COEFF0": 3.5515}, checksum=True)
    _, spectra, _ = read_all(plates(path))
    good = (ivar > 0) & np.isfinite(ivar) & np.isfinite(flux) & (mask.astype(np.int64) & BAD_PIXEL == 0)
    np.testing.assert_allclose(GRID.wave[115:4715], 10 ** (3.5515 + 1e-4 * np.arange(4600)), rtol=1e-12)
    np.testing.assert_array_equal(spectra.ivar[:, 115:4715], np.where(good, ivar, 0))
    np.testing.assert_array_equal(spectra.flux[:, 115:4715][good], flux[good])
    assert np.count_nonzero(spectra.ivar) == good.sum()


@pytest.mark.parametrize("where", ["", "v5_13_0/", "v6_0_0/"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_redshifts_are_joined_by_fiber(tmp_path: Path, where: str, end: str) -> None:
    path = write(tmp_path / "v5_13_0" / "3655")
    other = write_zbest(path.parent / where / "spZbest-3655-55240.fits")
    if end:
        other.with_name(f"{other.name}.gz").write_bytes(gzip.compress(other.read_bytes()))
        other.unlink()
    _, spectra, columns = read_all(plates(tmp_path))
    assert columns["fiber"].tolist() == FIBERS.tolist()
    np.testing.assert_array_equal(columns["z"], np.array([0.4, 0.1, 0.3, np.nan], np.float32).astype(float))
    assert columns["class"].tolist() == ["GALAXY", "STAR", "STAR", "QSO"]
    assert columns["subclass"].tolist() == ["AGN", "", "F5", "BROADLINE"]
    assert columns["zwarn"].tolist() == [4, 1, 0, 128]
    assert columns["ra"].tolist() == [4.0, 1.0, 3.0, 7.0]
    assert columns["dec"].tolist() == [-1.0, -2.0, -3.0, -4.0]
    aside = int(Status.NOT_A_TARGET)
    assert columns["status"].tolist() == [0, aside, aside, Status.FIBER | Status.NO_REDSHIFT]
    np.testing.assert_array_equal(spectra.flux[:, 600], FIBERS.astype(np.float32))


def test_the_version_of_the_plate_counts_first(tmp_path: Path) -> None:
    path = write(tmp_path)
    write_zbest(path.parent / "v6_1_0" / "spZbest-3655-55240.fits")
    write_zbest(path.parent / "v5_13_0" / "spZbest-3655-55240.fits", Z=np.full(4, 0.5, np.float32))
    assert (read_all(plates(tmp_path))[2]["z"] == 0.5).all()


def test_without_redshifts_the_spectra_are_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    _, spectra, columns = read_all(plates(path))
    assert spectra.good[:, 600:660].all()
    assert np.isnan(columns["z"]).all()
    assert (columns["status"] & Status.NO_REDSHIFT != 0).all()
    assert columns["ra"].tolist() == [10.0, 20.0, 30.0, 40.0]
    write_zbest(tmp_path / "spZbest-3655-55240.fits.gz", FIBERID=np.array([1, 3, 9, 8], np.int32))
    np.testing.assert_array_equal(np.isnan(read_all(plates(path))[2]["z"]), [True, False, False, True])


def test_fibers_that_were_not_plugged(tmp_path: Path) -> None:
    mask = np.zeros((4, 60), np.int32)
    mask[0], mask[3, :59] = 1, 1
    path = write(tmp_path, mask=mask, plugmap={"FIBERID": np.array([4, 1, -1, 7], np.int32)})
    _, _, columns = read_all(plates(path))
    assert (columns["status"] & Status.FIBER != 0).tolist() == [True, False, True, False]
    assert columns["fiber"].tolist() == [4, 1, 3, 7]
    assert columns["status"][0] & Status.DEAD


@pytest.mark.parametrize(("plate", "expected"), [(3655, "4115341767193919488"), (10656, "11997690149582688256")])
def test_identifiers_are_made_of_what_they_encode(tmp_path: Path, plate: int, expected: str) -> None:
    """That of 10656-58163-0366 is in its real spec file; plates above 8191 lie beyond int64."""
    mjd, fiber = (55240, 1) if plate == 3655 else (58163, 366)
    fibers = np.array([fiber, 2, 3, 4], np.int32)
    header = {"PLATEID": plate, "MJD": mjd}
    name = f"spPlate-{plate}-{mjd}.fits"
    path = write(tmp_path, name, header=header, plugmap={"FIBERID": fibers})
    _, _, columns = read_all(plates(path))
    made = plate << 50 | fiber << 38 | (mjd - 50000) << 24 | 1300 << 10
    assert columns["id"][0] == str(made)
    if plate == 10656:
        assert columns["id"][0] == expected


def test_the_version_of_old_plates_is_their_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "26" / "3655", header={"RUN2D": None})
    _, _, columns = read_all(plates(path))
    assert int(columns["id"][0]) >> 10 & 0x3FFF == 26
    alone = tmp_path / "elsewhere" / NAME
    alone.parent.mkdir()
    shutil.copy(path, alone)
    with pytest.raises(SourceError, match="RUN2D ''; expected an identifier"):
        read_all(plates(alone))


def test_a_run_of_fibers_and_archives(tmp_path: Path) -> None:
    path = write(tmp_path / "v5_13_0" / "3655")
    write_zbest(path.parent / "v5_13_0" / "spZbest-3655-55240.fits")
    _, whole, columns = read_all(plates(tmp_path))
    part, some = plates(path).read(Piece(NAME, 1, 3))
    assert part.rows.tolist() == [1, 2]
    np.testing.assert_array_equal(part.flux, whole.flux[1:3])
    assert some["id"].tolist() == columns["id"][1:3].tolist()
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "v5_13_0", "./v5_13_0")
    names, other, others = read_all(open_sdss(Sdss(path=str(tmp_path / "all.tar")), tmp_path))
    assert names == ["v5_13_0/3655/spPlate-3655-55240.fits"]
    np.testing.assert_array_equal(other.flux, whole.flux)
    np.testing.assert_array_equal(others["z"], columns["z"])
    assert others["id"].tolist() == columns["id"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": {"VACUUM": False}}, "in air"),
        ({"header": {"VACUUM": None}}, "no keyword VACUUM"),
        ({"header": {"COEFF0": None}}, "no keyword COEFF0"),
        ({"header": {"COEFF1": 1.2e-4}}, "miss the pixel centers"),
        ({"header": {"COEFF0": 3.60005}}, "miss the pixel centers"),
        ({"header": {"COEFF0": 8.2}}, "good pixels outside"),
        ({"header": {"BUNIT": "Jy"}}, "flux in 'Jy'"),
        ({"ivar": np.ones((4, 59), np.float32)}, r"inverse variance is \(4, 59\); expected \(4, 60\)"),
        ({"mask": np.zeros((4, 60), np.float32)}, "expected integers"),
        ({"flux": np.ones((3, 60), np.float32)}, "4 fibers; expected 3"),
        ({"flux": np.ones(60, np.float32)}, "expected an SDSS plate"),
        ({"plugmap": {"FIBERID": np.array([1, 1, 2, 3], np.int32)}}, "FIBERID is repeated"),
    ],
)
def test_t4_wrong_contents_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(SourceError, match=message) as caught:
        plates(path).read(Piece(NAME, 0, 1))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FIBERID": np.array([1, 1, 2, 3], np.int32)}, "FIBERID is repeated"),
        ({"PLATE": np.full(4, 266)}, "PLATE 266; expected 3655"),
        ({"MJD": np.full(4, 51602)}, "MJD 51602; expected 55240"),
        ({"CLASS": None}, "expected FIBERID, Z, ZWARNING, CLASS, SUBCLASS"),
    ],
)
def test_t4_wrong_redshift_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path)
    write_zbest(tmp_path / "spZbest-3655-55240.fits", **changes)
    with pytest.raises(SourceError, match=message):
        read_all(plates(path))
    assert plates(path).identify(Piece(NAME, 0, 4))["fiber"].tolist() == FIBERS.tolist()


def test_t1_t2_fibers_of_a_damaged_plate_keep_their_names(tmp_path: Path) -> None:
    path = write(tmp_path, checksum=True)
    write_zbest(tmp_path / "spZbest-3655-55240.fits")
    _, _, columns = read_all(plates(path))
    content = path.read_bytes()
    at = content.index(np.array(4, ">f4").tobytes())
    for damaged, message in (
        (content[:-2000], "truncated"),  # in the sky, behind the plug map
        (content[:at] + b"\x41" + content[at + 1 :], "DATASUM"),
    ):
        path.write_bytes(damaged)
        source = plates(path)
        assert source.count(NAME) == 4
        with pytest.raises(SourceError, match=message):
            source.read(Piece(NAME, 0, 4))
        known = source.identify(Piece(NAME, 1, 4))
        assert known.keys() == columns.keys()
        for name in ("id", "z", "fiber", "class", "status"):
            np.testing.assert_array_equal(known[name], columns[name][1:])
    path.write_bytes(content[: len(content) // 2])
    assert plates(path).identify(Piece(NAME, 0, 4)) == {}
    with pytest.raises(SourceError):
        plates(path).count(NAME)


def test_wrong_paths(tmp_path: Path) -> None:
    (tmp_path / "a.fits").write_bytes(b"")
    (tmp_path / "b.fits").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no spPlate-PLATE-MJD\.fits in"):
        open_sdss(Sdss(path=str(tmp_path), layout="plate"), tmp_path).files()
