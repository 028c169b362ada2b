"""A file that is read run by run: each byte once, and what has changed meanwhile is seen."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from distspec.errors import SourceError
from distspec.sources import Piece, Source
from distspec.sources.files import fits as our_fits
from distspec.spectra import Columns, Spectra
from tests.sources.sdss.test_plates import plates
from tests.sources.sdss.test_plates import write as write_plate
from tests.support.desi_files import desi, write, write_table

COADD = "coadd-main-dark-7.fits"
COUNT = 12


@pytest.fixture
def coadd(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A coadd of twelve spectra with checksums, and its redrock file."""
    ids = np.arange(COUNT) + 39633559463397282
    write_table(tmp_path / "redrock-main-dark-7.fits", TARGETID=ids[::-1].copy(), Z=np.linspace(0.1, 0.4, COUNT))
    flux = fits.ImageHDU(rng.normal(size=(COUNT, 2326)).astype(np.float32))
    return write(tmp_path / COADD, ids, checksum=True, R_FLUX=flux)


def runs(source: Source, name: str, count: int, step: int) -> list[tuple[Spectra, Columns]]:
    return [source.read(Piece(name, start, min(start + step, count))) for start in range(0, count, step)]


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    try:
        return int(Path("/proc/self/io").read_text("ascii").split("rchar:")[1].split()[0])
    except OSError:
        pytest.skip("this system does not count what a process reads")


def check_same(parts: list[tuple[Spectra, Columns]], whole: tuple[Spectra, Columns]) -> None:
    for what in ("rows", "flux", "ivar"):
        joined = np.concatenate([getattr(spectra, what) for spectra, _ in parts])
        np.testing.assert_array_equal(joined, getattr(whole[0], what))
    for name, values in whole[1].items():
        np.testing.assert_array_equal(np.concatenate([columns[name] for _, columns in parts]), values)


def check_read_once(make: Any, path: Path, count: int, step: int, others: int) -> None:
    """Read a file by runs, and compare with one reading of all; `others` bytes are in files that belong to it."""
    whole = make().read(Piece(path.name, 0, count))
    source = make()
    before = bytes_read()
    parts = runs(source, path.name, count, step)
    read = bytes_read() - before
    assert read < 1.2 * path.stat().st_size + others + (1 << 16)
    check_same(parts, whole)


def test_the_bytes_of_a_coadd_are_read_once(coadd: Path) -> None:
    redrock = coadd.with_name("redrock-main-dark-7.fits").stat().st_size
    check_read_once(lambda: desi(coadd.parent), coadd, COUNT, 3, redrock)


def test_the_bytes_of_a_real_coadd_are_read_once(real_data: Path) -> None:
    path = real_data / "desi/coadd-1-80693-thru20210204.fits"
    check_read_once(lambda: desi(path.parent), path, 5, 2, 0)


def test_the_bytes_of_a_plate_are_read_once(tmp_path: Path, rng: np.random.Generator) -> None:
    changes = {"ivar": np.ones((4, 3000), np.float32), "mask": np.zeros((4, 3000), np.int32)}
    path = write_plate(tmp_path, flux=rng.normal(size=(4, 3000)).astype(np.float32), **changes)
    with fits.open(path) as units:
        units.writeto(path, overwrite=True, checksum=True)
    check_read_once(lambda: plates(tmp_path), path, 4, 1, 0)


def test_what_is_beyond_the_limit_is_read_again(coadd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = desi(coadd.parent).read(Piece(COADD, 0, COUNT))
    monkeypatch.setattr(our_fits, "KEPT_LIMIT", 1 << 18)
    source = desi(coadd.parent)
    before = bytes_read()
    check_same(runs(source, COADD, COUNT, 3), whole)
    assert bytes_read() - before < 2.2 * coadd.stat().st_size


def test_compressed_images_are_unpacked_once_and_stay_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    flux = fits.CompImageHDU(rng.normal(size=(4, 2326)).astype(np.float32), compression_type="GZIP_1")
    ivar = fits.CompImageHDU(np.full((4, 2326), 2, np.float32), compression_type="GZIP_1")
    mask = np.zeros((4, 2326), np.uint32)
    mask[:, ::7] = 1
    write(tmp_path / COADD, checksum=True, R_FLUX=flux, R_IVAR=ivar, R_MASK=fits.ImageHDU(mask))
    whole = desi(tmp_path).read(Piece(COADD, 0, 4))
    source = desi(tmp_path)
    check_same([source.read(Piece(COADD, row, row + 1)) for row in (0, 0, 1, 2, 3)][1:], whole)


def test_a_file_that_is_written_again_is_opened_again(coadd: Path) -> None:
    source = desi(coadd.parent)
    source.read(Piece(COADD, 0, 3))
    with fits.open(coadd) as units:
        units["R_FLUX"].data = units["R_FLUX"].data + np.float32(1)
        units.writeto(coadd.with_name("other"), checksum=True)
    os.replace(coadd.with_name("other"), coadd)
    check_same([source.read(Piece(COADD, 3, 6))], desi(coadd.parent).read(Piece(COADD, 3, 6)))


def test_damage_between_two_runs_is_an_error_and_what_is_mended_is_read(coadd: Path) -> None:
    source = desi(coadd.parent)
    whole = source.read(Piece(COADD, 0, COUNT))
    good = coadd.read_bytes()
    source.read(Piece(COADD, 0, 3))
    coadd.write_bytes(good[:-9000] + bytes([good[-9000] ^ 1]) + good[-8999:])
    for _ in range(2):
        with pytest.raises(SourceError, match="they are damaged"):
            source.read(Piece(COADD, 3, 6))
    coadd.write_bytes(good[:-9000])
    with pytest.raises(SourceError, match="truncated"):
        source.read(Piece(COADD, 3, 6))
    coadd.unlink()
    with pytest.raises(SourceError, match="No such file"):
        source.read(Piece(COADD, 3, 6))
    coadd.write_bytes(good)
    check_same(runs(source, COADD, COUNT, 4), whole)


def test_files_take_turns_and_an_open_one_does_not_travel(coadd: Path, tmp_path: Path) -> None:
    shutil.copy(coadd, tmp_path / "coadd-main-dark-8.fits")
    source = desi(tmp_path)
    names = (COADD, "coadd-main-dark-8.fits", COADD)
    parts = [source.read(Piece(name, 2, 4)) for name in names]
    np.testing.assert_array_equal(parts[0][0].flux, parts[1][0].flux)
    np.testing.assert_array_equal(parts[0][0].flux, parts[2][0].flux)
    copied = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copied.read(Piece(COADD, 2, 4))[0].flux, parts[0][0].flux)
