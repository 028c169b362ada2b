"""DESI coadds: agreement with independent readers on real files, the survey's trees, and damage."""

import gzip
import pickle
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from astropy.io import fits

from distspec.config import Condition, Simulate, Wanted
from distspec.errors import SourceError
from distspec.sources import Piece
from distspec.sources.desi.coadds import GRID
from distspec.sources.simulation.survey import SimulatedSurvey
from distspec.spectra import Status
from tests.support.desi_files import (
    COADDS,
    IDS,
    LRG,
    QSO,
    desi,
    pieces_of,
    read_all,
    table_of,
    write,
    write_table,
)
from tests.support.survey_files import write_desi, write_zcatalog


@pytest.fixture
def folder(real_data: Path) -> Path:
    return real_data / "desi"


# --- real files ----------------------------------------------------------------------------------------------------


def test_every_file_is_read_or_named(folder: Path) -> None:
    source = pickle.loads(pickle.dumps(desi(folder, catalog="QSO_cat_fuji_dark_tile.fits.gz")))
    pieces = pieces_of(source)
    assert {p.name: len(p) for p in pieces} == dict(zip([*COADDS, "missing_z_color.fits"], [5, 1, 1, 2], strict=True))
    for piece in pieces:
        if piece.name == "missing_z_color.fits":
            with pytest.raises(SourceError, match=r"missing_z_color.fits: holds FIBERMAP; expected B_FLUX"):
                source.read(piece)
            continue
        spectra, columns = source.read(piece)
        assert {len(values) for values in columns.values()} == {len(spectra)} == {len(piece)}
        assert not columns["status"].any()
        with fits.open(folder / piece.name) as units:
            np.testing.assert_array_equal(columns["id"], units["FIBERMAP"].data["TARGETID"])
            np.testing.assert_array_equal(columns["ra"], units["FIBERMAP"].data["TARGET_RA"])


def test_redshifts_of_the_real_files(folder: Path) -> None:
    z = [0.36874355163716493, 0.007269671851219614]
    for name, expected in zip(COADDS[1:], z, strict=True):
        _, columns = read_all(folder / name)
        assert columns["z"].tolist() == [expected]
        assert columns["class"].tolist() == ["GALAXY"]
        assert 0.02 < columns["ebv"][0] < 0.06
        assert columns["ebv"].dtype == np.float32
    _, columns = read_all(folder / COADDS[0], str(folder / "QSO_cat_fuji_dark_tile.fits.gz"))
    expected_z = [2.116627083471065, 2.2250172468615674, 2.228644154277362, 3.035649236339306, 2.9985226386691486]
    assert columns["z"].tolist() == expected_z
    assert columns["class"].tolist() == ["QSO"] * 5
    assert np.isnan(columns["ebv"]).all()
    _, columns = read_all(folder / COADDS[0])
    assert (columns["status"] == Status.NO_REDSHIFT).all()
    assert np.isnan(columns["z"]).all()


def test_a_catalog_that_the_settings_do_not_name_is_set_aside(folder: Path) -> None:
    source = desi(folder)
    (name,) = (entry.name for entry in source.files() if entry.name.startswith("QSO_cat"))
    with pytest.raises(SourceError, match="holds QSO_CAT; expected a DESI coadd"):
        source.count(name)
    with pytest.raises(SourceError, match="holds QSO_CAT; expected a DESI coadd"):
        source.read(Piece(name, 0, 1))


@pytest.mark.parametrize("name", COADDS)
def test_pixels_agree_with_a_plain_read(folder: Path, name: str) -> None:
    spectra, _ = read_all(folder / name)
    total, weight = np.zeros((2, len(spectra), GRID.pixels))
    with fits.open(folder / name) as units:
        for arm in "BRZ":
            where = np.abs(GRID.wave[None] - units[f"{arm}_WAVELENGTH"].data[:, None]).argmin(axis=1)
            np.testing.assert_allclose(GRID.wave[where], units[f"{arm}_WAVELENGTH"].data, atol=1e-3)
            ivar = np.where(units[f"{arm}_MASK"].data == 0, units[f"{arm}_IVAR"].data, 0).astype(float)
            total[:, where] += units[f"{arm}_FLUX"].data * ivar
            weight[:, where] += ivar
    np.testing.assert_allclose(spectra.ivar, weight, rtol=1e-6)
    np.testing.assert_allclose(spectra.flux[weight > 0], (total / weight)[weight > 0], rtol=1e-5, atol=1e-6)
    assert spectra.flux.dtype.isnative
    assert spectra.good.all()


def test_pixels_agree_with_specutils(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # specutils and its readers warn about themselves
        from specutils import SpectrumList

        arms = SpectrumList.read(folder / COADDS[1], format="DESI coadd")
    spectra, _ = read_all(folder / COADDS[1])
    assert len(arms) == 3
    shared = np.zeros(GRID.pixels, int)
    places = []
    for arm in arms:
        wave = arm.spectral_axis.to_value("Angstrom")
        places.append(np.rint((wave - 3600) / 0.8).astype(int))
        np.testing.assert_allclose(GRID.wave[places[-1]], wave, atol=1e-3)
        shared[places[-1]] += 1
    assert (shared == 2).sum() == 51 + 126
    for arm, place in zip(arms, places, strict=True):
        alone = (shared[place] == 1) & (arm.uncertainty.array[0] > 0)
        np.testing.assert_array_equal(spectra.flux[0, place[alone]], arm.flux.value[0, alone])
        np.testing.assert_array_equal(spectra.ivar[0, place[alone]], arm.uncertainty.array[0, alone])


# --- files ---------------------------------------------------------------------------------------------------------


def test_companions_are_not_taken_for_coadds(tmp_path: Path) -> None:
    path = write(tmp_path / "coadd-a.fits")
    for name in ("redrock-b", "emline-a", "qso_mgii-a", "qso_qn-a", "spectra-a"):
        shutil.copy(path, tmp_path / f"{name}.fits")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "coadd-b.fits.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "broken.fits").write_bytes(b"<html>")
    source = desi(tmp_path)
    names = [entry.name for entry in source.files()]
    assert names == ["broken.fits", "coadd-a.fits", "deep/coadd-b.fits.gz"]
    assert [source.count(name) for name in names[1:]] == [4, 4]
    first, second = (source.read(Piece(name, 0, 4))[0] for name in names[1:])
    np.testing.assert_array_equal(first.flux, second.flux)
    for reading in (source.count, lambda name: source.read(Piece(name, 0, 1))):
        with pytest.raises(SourceError, match="a web page"):
            reading(names[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FIBERMAP": None}, "expected a DESI coadd with a FIBERMAP"),
        ({"B_IVAR": None}, "expected B_IVAR beside B_FLUX"),
        ({"AIRORVAC": "air"}, "in air"),
        ({"B_WAVELENGTH": fits.ImageHDU(3600.3 + 0.8 * np.arange(2751))}, "miss the pixel centers"),
        ({"B_WAVELENGTH": fits.ImageHDU(3599.2 + 0.8 * np.arange(2751))}, "expected a range of"),
        ({"B_WAVELENGTH": fits.ImageHDU(3600 + 1.6 * np.arange(2751))}, "expected a range of"),
        ({"B_WAVELENGTH": fits.ImageHDU(np.full(2751, np.nan))}, "miss the pixel centers"),
        ({"B_WAVELENGTH": fits.ImageHDU(3600 + 0.8 * np.arange(2750))}, r"expected \(4, 2750\)"),
        ({"R_FLUX": fits.ImageHDU(np.zeros((3, 2326), np.float32))}, r"R_FLUX is \(3, 2326\)"),
        ({"Z_MASK": fits.ImageHDU(np.zeros((4, 2880), np.int32))}, r"Z_MASK is \(4, 2880\)"),
        (
            {"FIBERMAP": fits.BinTableHDU.from_columns([fits.Column("TARGETID", "D", array=[1.0])])},
            "TARGETID is stored",
        ),
        ({"FIBERMAP": fits.BinTableHDU.from_columns([fits.Column("FIBER", "J", array=[1])])}, "FIBERMAP of TARGETID"),
    ],
)
def test_wrong_contents_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "coadd-a.fits", **changes)
    with pytest.raises(SourceError, match=message) as caught:
        desi(path).read(Piece(path.name, 0, 1))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_flux_unit_is_refused(tmp_path: Path) -> None:
    unit = fits.ImageHDU(np.zeros((4, 2751), np.float32))
    unit.header["BUNIT"] = "Jy"
    with pytest.raises(SourceError, match="flux in 'Jy'"):
        read_all(write(tmp_path / "coadd-a.fits", B_FLUX=unit))


def test_t1_t2_damage_is_noticed(tmp_path: Path) -> None:
    content = write(tmp_path / "coadd-a.fits", checksum=True).read_bytes()
    (tmp_path / "coadd-a.fits").write_bytes(content[:-5000])
    with pytest.raises(SourceError, match="truncated"):
        read_all(tmp_path)
    flux = np.full(2751, 3, ">f4").tobytes()
    start = content.index(flux)
    (tmp_path / "coadd-a.fits").write_bytes(content[:start] + b"\x41" + content[start + 1 :])
    with pytest.raises(SourceError, match="expected DATASUM"):
        read_all(tmp_path)


def test_a_damaged_redrock_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits")
    (tmp_path / "redrock-a.fits").write_bytes(b"")
    with pytest.raises(SourceError, match=r"redrock-a\.fits: the file is empty"):
        read_all(tmp_path)
    known = desi(tmp_path).identify(Piece("coadd-a.fits", 0, 4))
    assert known["id"].tolist() == IDS.tolist()
    assert np.isnan(known["z"]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_t1_spectra_of_a_torn_file_keep_their_targets(tmp_path: Path, packed: bool) -> None:
    columns = table_of({"DESI_TARGET": [LRG, QSO, LRG, LRG]})
    # Noise, so that the stream does not shrink and is torn behind the FIBERMAP.
    noise = fits.ImageHDU(np.random.default_rng(1).normal(size=(4, 2751)).astype(np.float32))
    path = write(tmp_path / "coadd-main-dark-1.fits", columns=columns, checksum=True, B_FLUX=noise)
    write_table(tmp_path / "redrock-main-dark-1.fits", TARGETID=IDS, Z=[0.1, 0.2, 0.3, 0.4])
    whole = {targets: read_all(path, targets=targets)[1] for targets in ((), ("LRG",))}
    content = path.read_bytes()
    if packed:
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
        content = gzip.compress(content)
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:200_000])
    for targets, columns in whole.items():
        source = desi(path, targets=targets)
        count = source.count(path.name)
        assert count == len(columns["id"])
        with pytest.raises(SourceError, match="truncated"):
            source.read(Piece(path.name, 0, count))
        known = source.identify(Piece(path.name, 1, count))
        assert known.keys() == columns.keys()
        for name, values in known.items():
            np.testing.assert_array_equal(values, columns[name][1:])
        assert known["z"].tolist() == columns["z"][1:].tolist()


def test_what_is_torn_inside_its_fibermap_is_unknown(tmp_path: Path) -> None:
    path = write(tmp_path / "coadd-a.fits")
    path.write_bytes(path.read_bytes()[: 2880 * 2 + 50])
    assert desi(path).identify(Piece(path.name, 0, 4)) == {}


def test_archives_and_buckets(tmp_path: Path) -> None:
    folder = tmp_path / "healpix" / "main" / "dark" / "0" / "7"
    folder.mkdir(parents=True)
    write(folder / "coadd-main-dark-7.fits")
    write_table(folder / "redrock-main-dark-7.fits", TARGETID=IDS, Z=[0.1, 0.2, 0.3, 0.4])
    whole, columns = read_all(tmp_path)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "healpix", "./healpix")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.relative_to(tmp_path))
    bucket = fsspec.filesystem("memory")
    for path in folder.iterdir():
        bucket.pipe(f"/desi/{path.relative_to(tmp_path)}", path.read_bytes())
    (tmp_path / "some.txt").write_text("# a list\nhealpix/main/dark/0/7/coadd-main-dark-7.fits\n")
    for root in (tmp_path / "all.tar", tmp_path / "all.zip", "memory://desi", tmp_path / "some.txt"):
        source = pickle.loads(pickle.dumps(desi(root)))
        ((name, count),) = ((entry.name, source.count(entry.name)) for entry in source.files())
        assert name == "healpix/main/dark/0/7/coadd-main-dark-7.fits"
        spectra, table = source.read(Piece(name, 0, count))
        np.testing.assert_array_equal(spectra.flux, whole.flux)
        assert table["z"].tolist() == columns["z"].tolist()


def test_t8_a_coadd_without_spectra_and_one_of_one(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits", np.zeros(0, np.int64))
    assert desi(tmp_path).count("coadd-a.fits") == 0
    assert desi(tmp_path, targets=("LRG",)).count("coadd-a.fits") == 0
    with pytest.raises(SourceError, match="0 wanted spectra; expected 1"):
        desi(tmp_path).read(Piece("coadd-a.fits", 0, 1))
    spectra, columns = read_all(write(tmp_path / "coadd-b.fits", IDS[:1]))
    assert (len(spectra), columns["id"].tolist()) == (1, IDS[:1].tolist())


def test_t6_a_size_that_no_file_can_have_is_not_believed(tmp_path: Path) -> None:
    content = write(tmp_path / "a.fits").read_bytes()
    old = b"NAXIS2  =                    4"
    content = content.replace(old, b"NAXIS2  =     4000000000000000", 1)
    (tmp_path / "coadd-a.fits").write_bytes(content)
    (tmp_path / "coadd-b.fits.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.fits").unlink()
    source = desi(tmp_path)
    for entry in source.files():
        with pytest.raises(SourceError, match="truncated|could be read"):
            source.count(entry.name)
        with pytest.raises(SourceError, match="truncated"):
            source.read(Piece(entry.name, 0, 1))
        assert source.identify(Piece(entry.name, 0, 1)) == {}


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file or folder .*nowhere"):
        desi(tmp_path / "nowhere").files()
    with pytest.raises(SourceError, match=r"no \*\.fits or \*\.fits\.gz file"):
        desi(tmp_path).files()
    write_table(tmp_path / "redrock-a.fits", TARGETID=[1], Z=[0.1])
    with pytest.raises(SourceError, match=r"no coadd-\*\.fits"):
        desi(tmp_path).files()
    with pytest.raises(SourceError, match=r"no catalog file 'gone\.fits'"):
        desi(tmp_path, catalog="gone.fits").files()


@pytest.mark.parametrize("layout", ["flat", "healpix", "tile"])
def test_the_surveys_own_trees(tmp_path: Path, layout: Any) -> None:
    survey = SimulatedSurvey(Simulate(spectra=700, anomalies=0.1), seed=5)
    paths = write_desi(survey, tmp_path, range(40, 100), targets_per_file=25, layout=layout)
    catalog = survey.catalog(40, 100)
    source = desi(tmp_path)
    pieces = pieces_of(source)
    assert [p.name for p in pieces] == [path.relative_to(tmp_path).as_posix() for path in paths]
    tables = [source.read(piece)[1] for piece in pieces]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    np.testing.assert_array_equal(columns["id"], catalog["id"])
    np.testing.assert_array_equal(columns["z"], catalog["z"])
    assert (columns["survey"] == "main").all() and (columns["program"] == "dark").all()
    number = np.repeat([0, 1, 2], [25, 25, 10])
    by_tile = layout == "tile"
    np.testing.assert_array_equal(columns["healpix"], -1 if by_tile else number)
    np.testing.assert_array_equal(columns["tile"], 1000 if by_tile else -1)
    fiber = number * 500 + np.concatenate([np.arange(25), np.arange(25), np.arange(10)])
    np.testing.assert_array_equal(columns["fiber"], fiber if by_tile else -1)
    quasars = desi(tmp_path, targets=("QSO",))
    assert sum(quasars.count(p.name) for p in pieces) == (catalog["class"] == "QSO").sum()


def test_a_selection_from_the_surveys_own_catalog(tmp_path: Path) -> None:
    survey = SimulatedSurvey(Simulate(spectra=700, anomalies=0.1), seed=5)
    write_desi(survey, tmp_path, range(100), targets_per_file=25, layout="healpix")
    path = write_zcatalog(survey, tmp_path / "zall-pix-x.fits", range(150), targets_per_file=25)
    wanted = Wanted(where=(Condition(column="ZWARN", one_of=(0,)), Condition(column="Z", min=0.1)))
    source = desi(tmp_path, catalog=str(path), wanted=wanted)
    catalog = survey.catalog(0, 150)
    taken = (catalog["zwarn"] == 0) & (catalog["z"] >= 0.1)
    ids = np.concatenate([source.read(piece)[1]["id"] for piece in pieces_of(source)])
    np.testing.assert_array_equal(ids, catalog["id"][:100][taken[:100]])
    assert len(source.missing()) == taken[100:].sum()
