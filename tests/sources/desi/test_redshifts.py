"""Redshifts of DESI spectra: by target, from redrock files and from catalogs."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from pydantic import ValidationError

from distspec.config import Condition, Desi, Wanted
from distspec.sources import Piece
from distspec.spectra import Status
from tests.support.desi_files import (
    ARMS,
    IDS,
    desi,
    read_all,
    table_of,
    write,
    write_table,
)

# --- targets -------------------------------------------------------------------------------------------------------


def test_t10_redshifts_are_joined_on_the_exact_target(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits")
    # 2⁵³ and 2⁵³ + 1 are one number in double precision.
    write_table(
        tmp_path / "redrock-a.fits",
        TARGETID=np.array([2**53, 2**62 + 3, -7, 2**53 + 1]),
        Z=[9.0, 0.4, 0.3, 0.2],
        ZWARN=[0, 1 << 7, 1, 4],
        SPECTYPE=["QSO", "STAR", "GALAXY", "GALAXY"],
        SUBTYPE=["", "M", "", ""],
    )
    write_table(tmp_path / "cat.fits", name="CAT", targetid=IDS[:2], z=[0.1, 7.0])
    _, columns = read_all(tmp_path, "cat.fits")
    assert columns["id"].tolist() == IDS.tolist()
    assert columns["id"].dtype == np.int64
    assert columns["z"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert columns["zwarn"].tolist() == [0, 4, 1, 128]
    assert columns["class"].tolist() == ["", "GALAXY", "GALAXY", "STAR"]
    assert columns["subclass"].tolist() == ["", "", "", "M"]
    assert columns["status"].tolist() == [0, 0, Status.NOT_A_TARGET, Status.FIBER]


def test_t10_targets_that_repeat(tmp_path: Path) -> None:
    ids = np.array([5, 5, 6, 7], np.int64)
    write(tmp_path / "coadd-a.fits", ids)
    write_table(tmp_path / "redrock-a.fits", TARGETID=[7, 6, 5, 6, 5], Z=[0.7, 0.6, 0.5, 0.61, 0.5])
    _, columns = read_all(tmp_path)
    np.testing.assert_array_equal(columns["z"], [0.5, 0.5, np.nan, 0.7])
    assert columns["status"].tolist() == [0, 0, Status.NO_REDSHIFT, 0]


def test_the_surveys_own_choice_among_repeats(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits", np.array([6], np.int64))
    chosen = {"TARGETID": [6, 6], "Z": [0.6, 0.61], "ZCAT_PRIMARY": [False, True]}
    write_table(tmp_path / "cat.fits", name="ZCATALOG", **chosen)
    assert read_all(tmp_path, str(tmp_path / "cat.fits"))[1]["z"].tolist() == [0.61]


def test_status_of_fibers_and_objects(tmp_path: Path) -> None:
    ivar = {f"{arm}_IVAR": fits.ImageHDU(np.ones((4, pixels), np.float32)) for arm, (_, pixels) in ARMS.items()}
    for unit in ivar.values():
        unit.data[3] = 0
    columns = [
        fits.Column("COADD_FIBERSTATUS", "J", array=[0, 1 << 9, 0, 0]),
        fits.Column("OBJTYPE", "3A", array=["TGT", "TGT", "SKY", "TGT"]),
        fits.Column("EBV", "E", array=[0.1, 0.0, np.nan, -1]),
    ]
    write(tmp_path / "coadd-a.fits", columns=columns, **ivar)
    write_table(tmp_path / "redrock-a.fits", TARGETID=IDS, Z=[0.1, 0.2, 0.3, np.nan])
    _, table = read_all(tmp_path)
    expected = [Status.OK, Status.FIBER, Status.NOT_A_TARGET, Status.DEAD | Status.NO_REDSHIFT]
    assert table["status"].tolist() == expected
    np.testing.assert_array_equal(table["ebv"], np.array([0.1, np.nan, np.nan, np.nan], np.float32))


# --- catalogs ------------------------------------------------------------------------------------------------------


def test_the_entry_of_the_same_coadd_counts_first(tmp_path: Path) -> None:
    ids = np.array([1, 2, 3, 4, 5], np.int64)
    for name in ("coadd-main-dark-7.fits", "coadd-sv3-bright-7.fits"):
        write(tmp_path / name, ids)
    entries = [
        # id, z, survey, program, healpix, primary
        (1, 0.10, "main", "dark", 7, False),
        (1, 0.11, "sv3", "bright", 7, True),
        (2, 0.20, "main", "dark", 7, False),
        (2, 0.21, "main", "dark", 7, True),
        (3, 0.30, "cmx", "other", 9, True),
        (3, 0.31, "cmx", "dark", 9, False),
        (4, 0.40, "main", "dark", 7, False),
        (4, 0.41, "main", "dark", 7, False),
    ]
    names = ("TARGETID", "Z", "SURVEY", "PROGRAM", "HEALPIX", "ZCAT_PRIMARY")
    columns = {name: np.array([entry[i] for entry in entries]) for i, name in enumerate(names)}
    write_table(tmp_path / "zall-pix-x.fits", name="ZCATALOG", **columns)
    source = desi(tmp_path, catalog="zall-pix-x.fits")
    assert len(source.files()) == 2
    z = {entry.name: source.read(Piece(entry.name, 0, 5))[1]["z"] for entry in source.files()}
    np.testing.assert_array_equal(z["coadd-main-dark-7.fits"], [0.10, 0.21, 0.30, np.nan, np.nan])
    np.testing.assert_array_equal(z["coadd-sv3-bright-7.fits"], [0.11, 0.21, 0.30, np.nan, np.nan])
    # With a selection only the coadd's own entries count.
    wanted = Wanted(where=(Condition(column="Z", below=0.205),))
    source = desi(tmp_path, catalog="zall-pix-x.fits", wanted=wanted)
    counts = {entry.name: source.count(entry.name) for entry in source.files()}
    assert counts == {"coadd-main-dark-7.fits": 2, "coadd-sv3-bright-7.fits": 1}
    _, table = source.read(Piece("coadd-main-dark-7.fits", 0, 2))
    assert (table["id"].tolist(), table["z"].tolist()) == ([1, 2], [0.10, 0.20])
    assert source.missing() == []


def test_files_without_wanted_targets_are_not_listed_and_missing_ones_are_named(tmp_path: Path) -> None:
    for pixel in (7, 8):
        write(tmp_path / f"coadd-main-dark-{pixel}.fits", np.array([pixel * 10, pixel * 10 + 1]))
    columns = {"TARGETID": [70, 71, 80, 90], "Z": [0.1, 0.2, 0.3, 0.4], "HEALPIX": [7, 7, 8, 9]}
    columns |= {"SURVEY": ["main"] * 4, "PROGRAM": ["dark"] * 4, "ZWARN": [0, 4, 4, 0], "SPECTYPE": ["QSO"] * 4}
    write_table(tmp_path / "zpix-main-dark.fits", name="ZCATALOG", **columns)
    wanted = Wanted(where=(Condition(column="ZWARN", one_of=(0,)),))
    source = desi(tmp_path, catalog="zpix-main-dark.fits", wanted=wanted)
    assert [entry.name for entry in source.files()] == ["coadd-main-dark-7.fits"]
    assert source.missing() == ["TARGETID 90 of coadd-main-dark-9"]
    _, table = pickle.loads(pickle.dumps(source)).read(Piece("coadd-main-dark-7.fits", 0, 1))
    assert (table["id"].tolist(), table["class"].tolist(), table["zwarn"].tolist()) == ([70], ["QSO"], [0])
    assert desi(tmp_path, catalog="zpix-main-dark.fits").missing() == []


def test_a_catalog_by_tile(tmp_path: Path) -> None:
    columns = table_of({"TILEID": np.array([100, 100, 100, 100])})
    write(tmp_path / "coadd-0-100-thru20210101.fits", np.array([1, 2, 3, 4]), columns=columns)
    entries = {"TARGETID": [1, 1, 2, 3], "Z": [0.1, 0.2, 0.3, 0.4], "TILEID": [100, 200, 200, 100]}
    write_table(tmp_path / "ztile.fits", name="ZCATALOG", **entries)
    _, table = read_all(tmp_path, "ztile.fits")
    np.testing.assert_array_equal(table["z"], [0.1, 0.3, 0.4, np.nan])
    _, table = read_all(tmp_path, "ztile.fits", wanted=Wanted())
    assert table["id"].tolist() == [1, 3]


def test_redrock_counts_before_the_catalog(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits")
    write_table(tmp_path / "zbest-a.fits", name="ZBEST", TARGETID=IDS[:2], Z=[0.5, 0.6], ZWARN=[0, 4])
    write_table(tmp_path / "cat.fits", TARGETID=IDS, Z=[0.1, 0.2, 0.3, 0.4], SPECTYPE=["STAR"] * 4)
    _, table = read_all(tmp_path, "cat.fits", wanted=Wanted(where=(Condition(column="Z", above=0.15),)))
    assert table["z"].tolist() == [0.6, 0.3, 0.4]
    assert table["class"].tolist() == ["", "STAR", "STAR"]


def test_conditions_without_a_catalog_are_refused() -> None:
    with pytest.raises(ValidationError, match="wanted needs a catalog"):
        Desi(path="x", wanted=Wanted())
