"""The pixels of DESI files: the join of arms, and the sum of exposures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from distspec.sources import Piece
from distspec.sources.desi.coadds import GRID
from distspec.spectra import Status
from tests.support.desi_files import (
    ARMS,
    IDS,
    LRG,
    QSO,
    desi,
    read_all,
    table_of,
    write,
    write_table,
)

# --- joining -------------------------------------------------------------------------------------------------------


def test_t11_arms_are_joined_by_inverse_variance(tmp_path: Path) -> None:
    count = len(IDS)
    ivar = np.full((count, 2326), 6, np.float32)
    flux = np.full((count, 2326), 5, np.float32)
    mask = np.zeros((count, 2326), np.uint32)
    mask[0, 3], mask[1, 4], ivar[2, 5], ivar[3, 6] = 1, 1 << 31, np.nan, -1
    flux[0, 7] = np.inf
    new = {"R_FLUX": fits.ImageHDU(flux), "R_IVAR": fits.ImageHDU(ivar), "R_MASK": fits.ImageHDU(mask)}
    spectra, _ = read_all(write(tmp_path / "coadd-a.fits", **new))
    first = 2700  # 5760 Å
    own = np.arange(1, 5)[:, None] * np.ones(51)
    expected, total = (2 * own + 6 * 5) / 8, np.full((count, 51), 8.0)
    for row, pixel in [(0, 3), (1, 4), (2, 5), (3, 6), (0, 7)]:
        expected[row, pixel], total[row, pixel] = own[row, pixel], 2
    np.testing.assert_allclose(spectra.flux[:, first : first + 51], expected, rtol=1e-7)
    np.testing.assert_array_equal(spectra.ivar[:, first : first + 51], total)
    assert (spectra.flux[:, first - 1] == np.arange(1, 5)).all()
    assert (spectra.flux[:, first + 51] == 5).all()


@pytest.mark.parametrize("arm", ["B", "R", "Z"])
def test_t11_a_missing_arm_leaves_no_data(tmp_path: Path, arm: str) -> None:
    gone = {f"{arm}_{part}": None for part in ("WAVELENGTH", "FLUX", "IVAR", "MASK")}
    spectra, columns = read_all(write(tmp_path / "coadd-a.fits", **gone))
    covered = np.zeros(GRID.pixels, bool)
    for other, (first, pixels) in ARMS.items():
        if other != arm:
            start = round((first - 3600) / 0.8)
            covered[start : start + pixels] = True
    assert (spectra.good == covered).all()
    # The third has a negative number, as fibers without a target have.
    assert (columns["status"] & ~np.int32(Status.NOT_A_TARGET) == Status.NO_REDSHIFT).all()


def test_a_coadd_that_is_joined_already_and_one_without_masks(tmp_path: Path) -> None:
    gone = {f"{arm}_{part}": None for arm in ARMS for part in ("WAVELENGTH", "FLUX", "IVAR", "MASK")}
    flux = np.arange(4 * 7781, dtype=np.float32).reshape(4, 7781)
    joined = {
        "BRZ_WAVELENGTH": fits.ImageHDU(3600 + 0.8 * np.arange(7781)),
        "BRZ_FLUX": fits.ImageHDU(flux),
        "BRZ_IVAR": fits.ImageHDU(np.ones((4, 7781), np.float32)),
    }
    spectra, _ = read_all(write(tmp_path / "coadd-a.fits", **gone, **joined))
    np.testing.assert_array_equal(spectra.flux, flux)
    assert (spectra.ivar == 1).all()


def test_a_compressed_mask_is_unpacked(tmp_path: Path) -> None:
    mask = np.zeros((4, 2751), np.int32)
    mask[2, 100] = 4
    path = write(tmp_path / "coadd-a.fits", B_MASK=fits.CompImageHDU(mask), checksum=True)
    spectra, _ = read_all(path)
    assert np.argwhere(~spectra.good).tolist() == [[2, 100]]


def test_rows_of_a_piece(tmp_path: Path) -> None:
    write(tmp_path / "coadd-a.fits", checksum=True)
    whole, all_columns = read_all(tmp_path)
    parts = [desi(tmp_path).read(Piece("coadd-a.fits", *run)) for run in ((0, 3), (3, 4))]
    np.testing.assert_array_equal(np.concatenate([s.rows for s, _ in parts]), [0, 1, 2, 3])
    np.testing.assert_array_equal(np.concatenate([s.flux for s, _ in parts]), whole.flux)
    np.testing.assert_array_equal(np.concatenate([c["id"] for _, c in parts]), all_columns["id"])


# --- exposures -----------------------------------------------------------------------------------------------------


def write_exposures(path: Path, rng: np.random.Generator, ids: np.ndarray, **columns: Any) -> dict[str, np.ndarray]:
    """Write a spectra file of random exposures; give flux and ivar (0 where masked) on the whole grid, by arm."""
    units: dict[str, Any] = {}
    arms = {}
    for arm, (first, pixels) in ARMS.items():
        flux = rng.normal(3, 1, (len(ids), pixels)).astype(np.float32)
        ivar = rng.uniform(0.5, 2, (len(ids), pixels)).astype(np.float32)
        mask = (rng.random((len(ids), pixels)) < 0.1).astype(np.int32)
        units |= {f"{arm}_FLUX": fits.ImageHDU(flux), f"{arm}_IVAR": fits.ImageHDU(ivar)}
        units[f"{arm}_MASK"] = fits.ImageHDU(mask)
        wide = np.zeros((2, len(ids), GRID.pixels))
        start = round((first - 3600) / 0.8)
        wide[0, :, start : start + pixels], wide[1, :, start : start + pixels] = flux, np.where(mask, 0, ivar)
        arms[arm] = wide
    write(path, ids, columns=table_of(columns), **units)
    return arms


@pytest.mark.parametrize("block", [2, 4096])
def test_exposures_are_coadded(
    tmp_path: Path, rng: np.random.Generator, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distspec.sources.desi.arms._BLOCK", block)
    ids = np.array([7, 5, 7, 2**60, 5, 7, 9], np.int64)
    status = np.array([0, 0, 1 << 16, 0, 1 << 23, 1 << 3, 1 << 9], np.int32)
    tiles = np.array([1, 2, 1, 3, 4, 1, 5], np.int32)
    arms = write_exposures(
        tmp_path / "spectra-main-dark-3.fits", rng, ids, FIBERSTATUS=status, TILEID=tiles, FIBER=tiles * 10
    )
    write_table(tmp_path / "redrock-main-dark-3.fits", TARGETID=[9, 7, 5, 2**60], Z=[0.9, 0.7, 0.5, 0.6])
    source = desi(tmp_path)
    assert [(entry.name, source.count(entry.name)) for entry in source.files()] == [("spectra-main-dark-3.fits", 4)]
    spectra, columns = source.read(Piece("spectra-main-dark-3.fits", 0, 4))
    assert columns["id"].tolist() == [7, 5, 2**60, 9]
    assert columns["z"].tolist() == [0.7, 0.5, 0.6, 0.9]
    assert columns["tile"].tolist() == [1, -1, 3, 5]
    assert columns["fiber"].tolist() == [10, -1, 30, 50]
    assert columns["status"].tolist() == [0, 0, 0, Status.FIBER | Status.DEAD]
    for row, target in enumerate(columns["id"]):
        total = weight = np.zeros(GRID.pixels)
        for exposure in np.flatnonzero(ids == target):
            for arm, wide in arms.items():
                lost = status[exposure] & (1 << 16 | 1 << 9 | {"B": 1 << 22, "R": 1 << 23, "Z": 1 << 24}[arm])
                if not lost:
                    total, weight = total + wide[0, exposure] * wide[1, exposure], weight + wide[1, exposure]
        np.testing.assert_allclose(spectra.ivar[row], weight, rtol=1e-5)
        good = weight > 0
        np.testing.assert_allclose(
            spectra.flux[row, good], (total / np.maximum(weight, 1e-9))[good], rtol=2e-5, atol=1e-5
        )
    part, table = source.read(Piece("spectra-main-dark-3.fits", 1, 3))
    np.testing.assert_array_equal(part.flux, spectra.flux[1:3])
    assert table["id"].tolist() == [5, 2**60]


def test_classes_of_exposures(tmp_path: Path, rng: np.random.Generator) -> None:
    ids = np.array([7, 5, 7, 9], np.int64)
    write_exposures(tmp_path / "spectra-main-dark-3.fits", rng, ids, DESI_TARGET=np.array([QSO, LRG, QSO, LRG]))
    source = desi(tmp_path, targets=("LRG",))
    assert source.count("spectra-main-dark-3.fits") == 2
    whole, columns = desi(tmp_path).read(Piece("spectra-main-dark-3.fits", 0, 3))
    some, table = source.read(Piece("spectra-main-dark-3.fits", 0, 2))
    assert table["id"].tolist() == [5, 9]
    np.testing.assert_array_equal(some.flux, whole.flux[1:])


def test_a_coadd_is_preferred_to_its_exposures(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("a/coadd-main-dark-3.fits", "b/coadd-main-dark-4.fits.gz"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name)
    for name in ("a/spectra-main-dark-3.fits.gz", "a/spectra-main-dark-5.fits", "b/spectra-main-dark-4.fits"):
        write_exposures(tmp_path / name, rng, IDS)
    names = [entry.name for entry in desi(tmp_path).files()]
    assert names == ["a/coadd-main-dark-3.fits", "a/spectra-main-dark-5.fits", "b/coadd-main-dark-4.fits.gz"]
