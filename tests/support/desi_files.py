"""Small DESI files whose contents are known, for the tests of the reader."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from distspec.config import Desi
from distspec.sources import Piece
from distspec.sources.desi.coadds import DesiCoadds
from distspec.spectra import Columns, Spectra

_SCRATCH = tempfile.TemporaryDirectory(prefix="distspec-desi-")

LRG, ELG, QSO, BGS_ANY, MWS_ANY, SCND_ANY = 1 << 0, 1 << 1, 1 << 2, 1 << 60, 1 << 61, 1 << 62
SKY, STD_FAINT, STD_WD, STD_BRIGHT, BAD_SKY = (1 << bit for bit in range(32, 37))
IDS = np.array([39633559463397282, 2**53 + 1, -7, 2**62 + 3], np.int64)
ARMS = {"B": (3600.0, 2751), "R": (5760.0, 2326), "Z": (7520.0, 2881)}
COADDS = ["coadd-1-80693-thru20210204.fits", "coadd-4-80613-thru20210324.fits", "coadd-special-dark-27247.fits"]


def desi(path: Path, scratch: Path | None = None, **settings: Any) -> DesiCoadds:
    return DesiCoadds(Desi(path=str(path), **settings), scratch or Path(_SCRATCH.name))


def pieces_of(source: DesiCoadds) -> list[Piece]:
    return [Piece(entry.name, 0, source.count(entry.name)) for entry in source.files()]


def read_all(path: Path, catalog: str | None = None, **settings: Any) -> tuple[Spectra, Columns]:
    source = desi(path, catalog=catalog, **settings)
    (piece,) = pieces_of(source)
    return source.read(piece)


def write(path: Path, ids: np.ndarray = IDS, checksum: bool = False, **changes: Any) -> Path:
    """Write a coadd whose arms hold known numbers; a change replaces a unit, or leaves it out where it is None."""
    count = len(ids)
    fibermap = [
        fits.Column("TARGETID", "K", array=ids),
        fits.Column("TARGET_RA", "D", array=np.linspace(10, 20, count)),
        fits.Column("TARGET_DEC", "D", array=np.linspace(-5, 5, count)),
    ]
    fibermap += changes.pop("columns", [])
    units: dict[str, Any] = {"FIBERMAP": fits.BinTableHDU.from_columns(fibermap)}
    for arm, (first, pixels) in ARMS.items():
        units[f"{arm}_WAVELENGTH"] = fits.ImageHDU(first + 0.8 * np.arange(pixels))
        units[f"{arm}_FLUX"] = fits.ImageHDU(np.tile(np.arange(count, dtype=np.float32)[:, None] + 1, (1, pixels)))
        units[f"{arm}_IVAR"] = fits.ImageHDU(np.full((count, pixels), 2, np.float32))
        units[f"{arm}_MASK"] = fits.ImageHDU(np.zeros((count, pixels), np.uint32))
    units |= changes
    primary = fits.PrimaryHDU()
    for key in ("AIRORVAC",):
        if key in units:
            primary.header[key] = units.pop(key)
    listed = [primary]
    for name, unit in units.items():
        if unit is not None:
            unit.name = name
            listed.append(unit)
    fits.HDUList(listed).writeto(path, checksum=checksum)
    return path


def write_table(path: Path, name: str = "REDSHIFTS", **columns: Any) -> Path:
    formats = {"i": "K", "f": "D", "U": "20A", "b": "L"}
    made = [fits.Column(k, formats[np.asarray(v).dtype.kind], array=np.asarray(v)) for k, v in columns.items()]
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(made, name=name)]).writeto(path)
    return path


def table_of(columns: dict[str, Any]) -> list[fits.Column]:
    formats = {"i8": "K", "i4": "J", "f8": "D", "f4": "E"}
    return [
        fits.Column(k, formats.get(np.asarray(v).dtype.str[1:], "8A"), array=np.asarray(v)) for k, v in columns.items()
    ]
