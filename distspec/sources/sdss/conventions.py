"""What `spec` files and plates of SDSS, BOSS and eBOSS share: one grid, one rule for bad pixels, one identifier.

All releases sample at multiples of 1e-4 in log10(λ / Å), so that spectra are lined up by whole pixels and no flux is
resampled.

References:
    Bits, https://www.sdss4.org/dr17/algorithms/bitmasks/ (SPPIXMASK, ZWARNING)
    Identifier, https://www.sdss4.org/dr17/help/glossary/#specobj
"""

import re
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Shaped

from distspec.errors import SourceError
from distspec.sources.catalogs.catalog import Catalog
from distspec.sources.conventions import pixel_numbers, refuse_air
from distspec.sources.files.headers import Header
from distspec.spectra import Status, WaveGrid

__all__ = ["BAD_PIXEL", "FIRST", "GRID", "KEYS", "NOPLUG", "STEP", "check_vacuum", "identities", "place", "statuses"]

FIRST = 3.54

STEP = 1e-4

GRID = WaveGrid("log", 10.0**FIRST, STEP, 4801)
"""3467-10471 Å, which holds what both generations of spectrographs record."""

KEYS = ("plate", "mjd", "fiberid")
"""What identifies a spectrum in a catalog."""

NOPLUG = 1 << 0

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

_CALIBRATORS = ("SKY", "STANDARD", "SPECTROPHOTO_STD", "REDDEN_STD", "HOT_STD")
"""Values of OBJTYPE, SOURCETYPE or TARGETTYPE that say that a fiber calibrates the others."""


def check_vacuum(header: Header) -> None:
    """Refuse wavelengths in air, or a primary header that does not say what they are in.

    Raises:
        SourceError: see above.
    """
    refuse_air(header)
    if header.get("VACUUM") is None and header.get("AIRORVAC") is None:
        raise SourceError(f"{header.place}: no keyword VACUUM; expected an SDSS header that says air or vacuum")


def place(
    position: Float64[np.ndarray, "m"],
    flux: Shaped[np.ndarray, "n m"],
    ivar: Shaped[np.ndarray, "n m"],
    bits: Shaped[np.ndarray, "n m"],
    where: str,
    expected: str,
) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
    """Put pixels on the grid, and set the inverse variance of bad ones to 0.

    Arguments:
        position: fractional pixel numbers on the grid.
        flux: 1e-17 erg/s/cm²/Å.
        ivar: inverse variance.
        bits: the AND mask.
        where: the file, for messages.
        expected: what the wavelengths should be, for messages.

    Raises:
        SourceError: good pixels lie off the grid, or two on one place.
    """
    masked = bits.astype(np.int64) & (0xFFFFFFFF & BAD_PIXEL) != 0
    with np.errstate(over="ignore"):
        flux, ivar = flux.astype(np.float32), ivar.astype(np.float32)
    finite = np.isfinite(flux)
    good = (ivar > 0) & np.isfinite(ivar) & finite & ~masked
    used = good.any(axis=0)
    off = (position < -0.5) | (position > GRID.pixels - 0.5)
    if not np.isfinite(position[used]).all() or (used & off).any():
        raise SourceError(f"{where}: good pixels outside {GRID}; expected {expected}, in that range")
    # Padding that some reductions leave at the ends has no data and may have no wavelength.
    inside = used | ((position > -0.5) & (position < GRID.pixels - 0.5))
    pixel = pixel_numbers(position[inside], where, expected)
    if np.bincount(pixel, minlength=1).max() > 1:
        raise SourceError(f"{where}: a wavelength is repeated; expected each pixel once")
    placed_flux, placed_ivar = np.zeros((2, len(flux), GRID.pixels), np.float32)
    placed_flux[:, pixel] = np.where(finite, flux, 0)[:, inside]
    placed_ivar[:, pixel] = np.where(good, ivar, 0)[:, inside]
    return placed_flux, placed_ivar


def identities(
    found: Shaped[np.ndarray, "n"] | None,
    plate: Int64[np.ndarray, "n"],
    mjd: Int64[np.ndarray, "n"],
    fiber: Int64[np.ndarray, "n"],
    run2d: str,
    where: str,
) -> Shaped[np.ndarray, "n"]:
    """Give SPECOBJID in decimal digits.

    It is text in SDSS I-II catalogs and a 64-bit integer in later ones, of plates above 8191 beyond int64. Where it is
    absent, or a float that has lost digits, it is made of the four numbers that it encodes.

    Raises:
        SourceError: it is neither there nor can it be made.
    """
    names, known = np.zeros(len(plate), "U20"), np.zeros(len(plate), bool)
    if found is not None and found.dtype.kind == "U":
        names = np.char.lstrip(found, "0")
        known = np.char.isdecimal(names)
    elif found is not None and found.dtype.kind in "iu":
        # A file that was written without the unsigned shift shows large ones as negative.
        names, known = found.astype(np.uint64).astype("U20"), found != 0
    version = re.fullmatch(r"v(\d+)_(\d+)_(\d+)", run2d)
    if version:
        run = (int(version[1]) - 5) * 10000 + int(version[2]) * 100 + int(version[3])
    else:
        run = int(run2d) if run2d.isdecimal() else -1
    fits = (plate >= 0) & (plate < 1 << 14) & (fiber >= 0) & (fiber < 1 << 12)
    fits &= (mjd >= 50000) & (mjd < 50000 + (1 << 14)) & (0 <= run < 1 << 14)
    unknown = np.flatnonzero(~known & ~fits)
    if unknown.size:
        i = unknown[0]
        value = None if found is None else found[i].item()
        numbers = f"PLATE {plate[i]}, MJD {mjd[i]}, FIBERID {fiber[i]}, RUN2D {run2d!r}"
        raise SourceError(f"{where}: SPECOBJID is {value!r} with {numbers}; expected an identifier")
    parts = (plate, 50), (fiber, 38), (mjd - 50000, 24), (np.full(len(plate), max(run, 0)), 10)
    made = reduce(or_, (part.astype(np.uint64) << np.uint64(shift) for part, shift in parts))
    return np.where(known, names, made.astype("U20"))


def statuses(z: Float64[np.ndarray, "n"], zwarning: Int64[np.ndarray, "n"], kinds: list[Any]) -> Int32[np.ndarray, "n"]:
    """Say what is known against these spectra, by redshift, its warnings and the types of their fibers."""
    calibrator = zwarning & (_ZWARNING_SKY | _ZWARNING_BAD_TARGET) != 0
    for kind in kinds:
        calibrator |= np.isin(np.char.upper(kind), _CALIBRATORS)
    status = np.zeros(len(z), np.int32)
    status[~np.isfinite(z)] |= np.int32(Status.NO_REDSHIFT)
    status[zwarning & _ZWARNING_UNPLUGGED != 0] |= np.int32(Status.FIBER)
    status[calibrator] |= np.int32(Status.NOT_A_TARGET)
    return status


def absent(catalog: Catalog, numbers: tuple[Int64[np.ndarray, "files"], ...]) -> list[str]:
    """Name the spectra that a catalog wants and no file holds.

    Arguments:
        catalog: keyed by `KEYS`.
        numbers: plate and MJD, and of `spec` files the fiber, that the files' names state; -1 where a name states none.

    Returns:
        Names as of `spec` files; none while a file does not say what it holds, for then nothing is known to be missing.
    """
    if (numbers[0] < 0).any():
        return []
    gone = catalog.outside(*numbers)
    keys = np.unique(np.stack([catalog.key(name)[gone] for name in KEYS], axis=1), axis=0)
    return [f"spec-{plate:04d}-{mjd:05d}-{fiber:04d}" for plate, mjd, fiber in keys.tolist()]
