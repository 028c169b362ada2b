"""SDSS, BOSS and eBOSS `spec` files, lite or full: one spectrum a file, on the surveys' common logarithmic grid.

All releases sample at multiples of 1e-4 in log10(λ / Å), so that spectra are lined up by whole pixels and no flux is
resampled. The tables are found by their columns, since their names and order differ between releases. Pixels are
masked by the survey's inverse variance and by those bits of the AND mask that say that a pixel is bad.

References:
    Data model, https://data.sdss.org/datamodel/files/BOSS_SPECTRO_REDUX/RUN2D/spectra/PLATE4/spec.html
    Bits, https://www.sdss4.org/dr17/algorithms/bitmasks/ (SPPIXMASK, ZWARNING)
"""

import re
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from distspec.config import Sdss
from distspec.errors import SourceError
from distspec.sources import Piece
from distspec.sources.conventions import check_flux_unit, find_files, pixel_numbers, refuse_air
from distspec.sources.fits import FitsFile, Unit
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["BAD_PIXEL", "GRID", "SdssSpectra"]

FIRST = 3.54
STEP = 1e-4
GRID = WaveGrid("log", 10.0**FIRST, STEP, 4801)
"""3467-10471 Å, which holds what both generations of spectrographs record."""

_HARMLESS = {
    "BADTRACE": 1,
    "BADFLAT": 2,
    "MANYBADCOLUMNS": 4,
    "MANYREJECTED": 5,
    "LARGESHIFT": 6,
    "BADSKYFIBER": 7,
    "NEARWHOPPER": 8,
    "WHOPPER": 9,
    "SMEARIMAGE": 10,
    "SMEARHIGHSN": 11,
    "SMEARMEDSN": 12,
    "NEARBADPIXEL": 16,
    "LOWFLAT": 17,
    "PARTIALREJECT": 19,
    "EMLINE": 30,
}
BAD_PIXEL = 0xFFFFFFFF & ~reduce(or_, (1 << bit for bit in _HARMLESS.values()))
"""Bits of the AND mask that make a pixel bad: NOPLUG, BADARC, FULLREJECT, SCATTEREDLIGHT, CROSSTALK, NOSKY, BRIGHTSKY,
NODATA, COMBINEREJ, BADFLUXFACTOR, BADSKYCHI, REDMONSTER, and any that the survey's list does not know.

The others describe circumstances that the extraction and its inverse variance already account for: whole arms of good
spectra carry them, and there the flux agrees with the survey's best-fitting model as well as it does elsewhere (median
deviation 0.77 σ under BADTRACE, 0.74 σ under MANYBADCOLUMNS, 0.75 σ under NEARBADPIXEL, 0.74 σ under no bit, in 58
files of plates 266 to 10656). Any bit at all as the rule would throw away nearly all of spec-3655-55240-0258, a quasar
at S/N 24 with a redshift that the survey does not doubt."""

_ZWARNING_SKY = 1 << 0
_ZWARNING_UNPLUGGED = 1 << 7
_ZWARNING_BAD_TARGET = 1 << 8

# A(u, g, r, i, z) / E(B-V) that SDSS catalogs were made with: Schlegel et al. (1998), Schlafly & Finkbeiner (2011).
_EXTINCTIONS = np.array([[5.155, 3.793, 2.751, 2.086, 1.479], [4.239, 3.303, 2.285, 1.698, 1.263]])


@dataclass(frozen=True)
class SdssSpectra:
    """A file or folder of SDSS `spec` files; each file is one piece.

    Columns beyond those of every source: `plate`, `mjd`, `fiber` (int64, -1 where the file does not say). `id` is the
    survey's SPECOBJID in decimal digits, as text, for it can exceed int64. `ebv` is known to eBOSS catalogs only.
    """

    settings: Sdss

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid of all SDSS spectra."""
        return GRID

    def pieces(self) -> list[Piece]:
        """List the files by name; none is opened.

        Raises:
            SourceError: the path does not exist or holds no FITS file.
        """
        root = Path(self.settings.path)
        files = find_files(root, "an SDSS spec file or a folder of them")
        return [Piece(file.relative_to(root).as_posix() if file != root else file.name, 0, 1) for file in files]

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read one file: a batch of one spectrum and its catalog row.

        Raises:
            SourceError: the file is damaged, is not an SDSS spec file or is not in vacuum.
        """
        root = Path(self.settings.path)
        with FitsFile(root if root.is_file() else root / piece.name) as file:
            coadd = file.find_table("flux", "ivar", "loglam")
            if coadd is None:
                raise SourceError(
                    f"{file.path}: holds {file.contents}; expected an SDSS table of FLUX, IVAR and LOGLAM"
                )
            flux, ivar = _read_pixels(file, coadd)
            columns = _read_catalog(file)
        if not ivar.any():
            columns["status"] |= np.int32(Status.DEAD)
        rows = np.array([piece.start], np.int64)
        return Spectra(rows, flux[None], ivar[None], GRID), columns


def _read_pixels(file: FitsFile, coadd: Unit) -> tuple[Float32[np.ndarray, "pixels"], Float32[np.ndarray, "pixels"]]:
    primary = file.units[0].header
    refuse_air(primary)
    refuse_air(coadd.header)
    if primary.get("VACUUM") is None and primary.get("AIRORVAC") is None:
        raise SourceError(f"{file.path}: no keyword VACUUM; expected an SDSS header that says air or vacuum")
    check_flux_unit(primary.get("BUNIT"), coadd.place)
    check_flux_unit(coadd.header.get(f"TUNIT{coadd.columns['flux'].number}"), coadd.place)
    table = file.table(coadd, ["flux", "ivar", "loglam", "and_mask"])
    bits = table["and_mask"].astype(np.int64) & 0xFFFFFFFF
    with np.errstate(over="ignore"):
        found_flux, found_ivar = table["flux"].astype(np.float32), table["ivar"].astype(np.float32)
    finite = np.isfinite(found_flux)
    good = (found_ivar > 0) & np.isfinite(found_ivar) & finite & (bits & BAD_PIXEL == 0)
    position = (table["loglam"].astype(np.float64) - FIRST) / STEP
    if not np.isfinite(position[good]).all() or (good & ((position < -0.5) | (position > GRID.pixels - 0.5))).any():
        raise SourceError(f"{coadd.place}: good pixels outside {GRID}; expected LOGLAM as log10(Å) in that range")
    # Padding that some reductions leave at the ends has no data and may have no wavelength.
    inside = good | ((position > -0.5) & (position < GRID.pixels - 0.5))
    pixel = pixel_numbers(position[inside], coadd.place, "LOGLAM in whole steps of 0.0001")
    if np.bincount(pixel, minlength=1).max() > 1:
        raise SourceError(f"{coadd.place}: LOGLAM repeats a wavelength; expected each pixel once")
    flux, ivar = np.zeros((2, GRID.pixels), np.float32)
    flux[pixel] = np.where(finite, found_flux, 0)[inside]
    ivar[pixel] = np.where(good, found_ivar, 0)[inside]
    return flux, ivar


def _read_catalog(file: FitsFile) -> Columns:
    unit = next((u for u in file.units if {"z", "zwarning"} <= u.columns.keys()), None)
    if unit is None or unit.rows != 1:
        found = file.contents if unit is None else f"{unit.rows} catalog rows"
        raise SourceError(f"{file.path}: holds {found}; expected one catalog row with Z and ZWARNING")
    wanted = ["z", "zwarning", "class", "subclass"]
    optional = ["specobjid", "plate", "mjd", "fiberid", "run2d", "plug_ra", "plug_dec", "ra", "dec", "objtype"]
    optional += ["sourcetype", "extinction"]
    table = file.table(unit, wanted + [name for name in optional if name in unit.columns])
    row = {name: values[0] for name, values in table.items()}
    primary = file.units[0].header

    def integer(column: str, key: str) -> int:
        value = row.get(column, primary.get(key))
        return int(value) if value is not None else -1

    plate, mjd, fiber = integer("plate", "PLATEID"), integer("mjd", "MJD"), integer("fiberid", "FIBERID")
    run2d = str(row.get("run2d", primary.get("RUN2D") or "")).strip()
    # PLUG_RA is where the fiber was; RA of an eBOSS row belongs to the matched image, if there is one.
    ra, dec = row.get("plug_ra", row.get("ra", np.nan)), row.get("plug_dec", row.get("dec", np.nan))
    z, zwarn = float(row["z"]), int(row["zwarning"])
    sky = "SKY" in (row.get("objtype"), row.get("sourcetype")) or bool(zwarn & (_ZWARNING_SKY | _ZWARNING_BAD_TARGET))
    status = Status.OK if np.isfinite(z) else Status.NO_REDSHIFT
    status |= Status.FIBER if zwarn & _ZWARNING_UNPLUGGED else Status.OK
    status |= Status.NOT_A_TARGET if sky else Status.OK
    return {
        "id": np.array([_identity(row.get("specobjid"), plate, mjd, fiber, run2d, unit.place)]),
        "ra": np.array([ra], np.float64),
        "dec": np.array([dec], np.float64),
        "z": np.array([z if np.isfinite(z) else np.nan]),
        "zwarn": np.array([zwarn], np.int64),
        "class": np.array([str(row["class"])]),
        "subclass": np.array([str(row["subclass"])]),
        "ebv": np.array([_reddening(row.get("extinction"))], np.float32),
        "status": np.array([int(status)], np.int32),
        "plate": np.array([plate], np.int64),
        "mjd": np.array([mjd], np.int64),
        "fiber": np.array([fiber], np.int64),
    }


def _identity(found: Any, plate: int, mjd: int, fiber: int, run2d: str, place: str) -> str:
    """Give SPECOBJID in decimal digits.

    It is text in SDSS I-II catalogs and a 64-bit integer in later ones, of plates above 8191 beyond int64. Where it is
    absent, or a float that has lost digits, it is made of the four numbers that it encodes.
    """
    if isinstance(found, str) and found.isdecimal() and int(found) > 0:
        return str(int(found))
    if isinstance(found, np.integer) and found != 0:
        # A file that was written without the unsigned shift shows large ones as negative.
        return str(int(found) % (1 << 64))
    version = re.fullmatch(r"v(\d+)_(\d+)_(\d+)", run2d)
    if version:
        run = (int(version[1]) - 5) * 10000 + int(version[2]) * 100 + int(version[3])
    else:
        run = int(run2d) if run2d.isdecimal() else -1
    if not (0 <= plate < 1 << 14 and 0 <= fiber < 1 << 12 and 0 <= mjd - 50000 < 1 << 14 and 0 <= run < 1 << 14):
        known = f"PLATE {plate}, MJD {mjd}, FIBERID {fiber}, RUN2D {run2d!r}"
        raise SourceError(f"{place}: SPECOBJID is {found!r} with {known}; expected an identifier")
    return str(plate << 50 | fiber << 38 | (mjd - 50000) << 24 | run << 10)


def _reddening(extinction: Any) -> float:
    """Give E(B-V) from the catalog's extinctions in u, g, r, i, z; NaN where there are none of a known calibration."""
    if extinction is None or np.shape(extinction) != (5,) or not (np.asarray(extinction) > 0).all():
        return float("nan")
    reddening = np.asarray(extinction, np.float64) / _EXTINCTIONS
    agreement = np.ptp(reddening, axis=1) / reddening.mean(axis=1)
    best = int(agreement.argmin())
    return float(reddening[best].mean()) if agreement[best] < 1e-3 else float("nan")
