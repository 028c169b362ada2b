"""DESI's bits: target classes of each survey, calibrators, and what the status of a fiber says."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from distspec.errors import ConfigError
from distspec.sources import Piece
from distspec.spectra import Status
from tests.support.desi_files import (
    BAD_SKY,
    BGS_ANY,
    COADDS,
    ELG,
    IDS,
    LRG,
    MWS_ANY,
    QSO,
    SKY,
    STD_BRIGHT,
    STD_FAINT,
    STD_WD,
    desi,
    read_all,
    table_of,
    write,
    write_table,
)


@pytest.fixture
def folder(real_data: Path) -> Path:
    return real_data / "desi"


@pytest.mark.parametrize(
    ("targets", "rows"),
    [
        (("LRG",), [0]),
        (("QSO", "ELG"), [1, 2]),
        (("BGS_ANY",), [3]),
        (("BGS_BRIGHT",), [3]),
        (("BGS_FAINT",), []),
        (("MWS_WD", "LRG"), [0, 2]),
        (("QSO_Z5",), []),  # a class of survey validation; the bit means another here
    ],
)
def test_target_classes(tmp_path: Path, targets: tuple[str, ...], rows: list[int]) -> None:
    columns = table_of(
        {
            "DESI_TARGET": [LRG, ELG | 1 << 17, QSO | MWS_ANY, BGS_ANY],
            "BGS_TARGET": [0, 0, 0, 2],
            "MWS_TARGET": [0, 0, 2, 0],
        }
    )
    path = write(tmp_path / "coadd-main-dark-5.fits", columns=columns)
    source = desi(path, targets=targets)
    assert source.count(path.name) == len(rows)
    if rows:
        spectra, table = source.read(Piece(path.name, 0, len(rows)))
        assert table["id"].tolist() == IDS[rows].tolist()
        np.testing.assert_array_equal(spectra.flux[:, 0], np.array(rows) + 1)
        assert spectra.rows.tolist() == list(range(len(rows)))
        part, _ = source.read(Piece(path.name, len(rows) - 1, len(rows)))
        assert part.flux[0, 0] == rows[-1] + 1


def test_target_classes_of_survey_validation(tmp_path: Path) -> None:
    """A file of sv1 has the main survey's columns too; there the bits of the classes are others."""
    columns = table_of({"SV1_DESI_TARGET": [LRG, 1 << 17, 1 << 5, BGS_ANY], "DESI_TARGET": [0, 0, 0, 0]})
    columns += table_of({"SV1_BGS_TARGET": [0, 0, 0, 4112]})
    path = write(tmp_path / "coadd-sv1-dark-5.fits", columns=columns)
    expected = {"LRG": [0], "QSO_Z5": [1], "LRG_SV_OPT": [2], "BGS_FIBMAG": [3], "BGS_FAINT": [], "ELG_LOP": []}
    for name, rows in expected.items():
        assert desi(path, targets=(name,)).count(path.name) == len(rows)
        if rows:
            assert desi(path, targets=(name,)).read(Piece(path.name, 0, 1))[1]["id"].tolist() == IDS[rows].tolist()


def test_the_real_target_of_survey_validation(folder: Path) -> None:
    """SV1_BGS_TARGET is 4112 = BGS_FIBMAG and its northern bit; the main survey's columns are 0."""
    assert desi(folder / COADDS[1], targets=("BGS_FIBMAG",)).count(COADDS[1]) == 1
    assert desi(folder / COADDS[1], targets=("BGS_BRIGHT", "LRG")).count(COADDS[1]) == 0
    assert desi(folder / COADDS[2], targets=("SCND_ANY",)).count(COADDS[2]) == 1
    _, columns = read_all(folder / COADDS[1])
    assert {name: columns[name].tolist() for name in ("survey", "program", "healpix", "tile", "fiber")} == {
        "survey": [""],
        "program": [""],
        "healpix": [-1],
        "tile": [80613],
        "fiber": [2233],
    }
    _, columns = read_all(folder / COADDS[2])
    assert [columns[name][0] for name in ("survey", "program", "healpix", "tile")] == ["special", "dark", 27247, -1]


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no DESI target class 'LRGS'; expected one of .*BGS_ANY.*LRG.*QSO"):
        desi(Path("x"), targets=("LRG", "LRGS"))


def test_calibrators_are_no_targets(tmp_path: Path) -> None:
    """A star that the Milky Way survey asked for is a target although it could serve as a standard."""
    ids = np.array([1, 2, 3, 4, 5, 6 | 1 << 59, -8, 9, 10], np.int64)
    columns = table_of(
        {
            "DESI_TARGET": [STD_FAINT, STD_FAINT | MWS_ANY, STD_BRIGHT | MWS_ANY, SKY, BAD_SKY, 0, 0, STD_WD | QSO, 0],
            "MWS_TARGET": [0, 1, 1 << 35, 0, 0, 0, 0, 0, 1 << 33],
            "OBJTYPE": ["TGT"] * 8 + ["BAD"],
        }
    )
    write(tmp_path / "coadd-a.fits", ids, columns=columns)
    write_table(tmp_path / "redrock-a.fits", TARGETID=ids, Z=np.ones(9))
    aside, bad = Status.NOT_A_TARGET, Status.FIBER | Status.NOT_A_TARGET
    expected = [aside, 0, aside, aside, aside, aside, aside, 0, bad]
    assert read_all(tmp_path)[1]["status"].tolist() == expected


def test_commissioning_standards(tmp_path: Path) -> None:
    columns = table_of({"CMX_TARGET": [1 << 5, 1 << 12, 1 << 12 | 1 << 33, SKY]})
    path = write(tmp_path / "coadd-cmx-other-1.fits", np.arange(1, 5), columns=columns)
    assert (read_all(path)[1]["status"] & Status.NOT_A_TARGET != 0).tolist() == [True, False, False, True]
    assert desi(path, targets=("SV0_QSO",)).count(path.name) == 2


@pytest.mark.parametrize(
    ("bits", "status"),
    [
        ((), Status.OK),
        ((1, 3, 10, 12, 13, 14, 15), Status.OK),
        ((22,), Status.OK),
        ((22, 23, 24), Status.FIBER),
        *(((bit,), Status.FIBER) for bit in (2, 8, 9, 16, 17, 18, 19, 20, 21, 25, 30, 31, 5)),
        ((0,), Status.NOT_A_TARGET),
        ((3, 16), Status.FIBER),
    ],
)
def test_bits_of_the_fiber_status(tmp_path: Path, bits: tuple[int, ...], status: Status) -> None:
    value = np.array([sum(1 << bit for bit in bits)], np.uint32).view(np.int32)
    write(tmp_path / "coadd-a.fits", IDS[:1], columns=[fits.Column("COADD_FIBERSTATUS", "J", array=value)])
    write_table(tmp_path / "redrock-a.fits", TARGETID=IDS[:1], Z=[0.1])
    assert read_all(tmp_path)[1]["status"].tolist() == [status]
