"""LAMOST low-resolution spectra in the three layouts of its releases: one spectrum a file, on one logarithmic grid.

DR1 publishes an image of five rows, of which the third is the flux divided by its continuum, and the wavelengths follow
from COEFF0 and COEFF1; later releases, DR8 among them, put the wavelengths into the third row; DR10 has a table of one
row whose columns are vectors. Which one it is is told by the contents, never by the name. All sample at multiples of
1e-4 in log10(λ / Å), in vacuum, so that spectra are lined up by whole pixels and no flux is resampled. The flux scale
is relative by the survey's own statement, so no unit is asked for. Medium-resolution files are refused.

A pixel is bad where the inverse variance or the flux is 0, or any bit of the AND mask is set. In 176 files of DR1 and
24 of DR8 the mask knows one bit only, set where no exposure is good, and the inverse variance is 0 in all of these
4246 pixels. Yet 146 pixels of DR8, nearly all at the red end, hold a flux of exactly 0 with an inverse variance that
is carried on from their neighbors: they have no data.

References:
    Luo et al. 2015, https://arxiv.org/abs/1505.01570, section 3.
    Data model, http://www.lamost.org/dr10/v2.0/doc/lr-data-production-description,
    https://www.lamost.org/public/dr/algorithms/ff
"""

import re
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from distspec.addresses import Place
from distspec.config import Lamost
from distspec.errors import SourceError, UnreachableError
from distspec.sources import Entry, Piece
from distspec.sources.catalogs.catalog import Catalog, locate
from distspec.sources.conventions import pixel_numbers, refuse_air
from distspec.sources.files.fits import BLOCK, FitsFile, Unit
from distspec.sources.files.headers import CARD, Header
from distspec.sources.files.places import Files
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["GRID", "LamostSpectra"]

FIRST = 3.56
STEP = 1e-4
GRID = WaveGrid("log", 10.0**FIRST, STEP, 4101)
"""3631-9333 Å, which holds the 3699-9101 Å that all releases record."""

_UNKNOWN = -9999.0
"""What LAMOST writes for a number that it does not know."""
_HEADER_LIMIT = 64 * BLOCK

_NAME_KEYS = ("lmjd", "spid", "fiberid")
"""Catalog columns that, with PLANID, make up a file's name; together they are also the key of a spectrum."""

_NOT_OBJECTS = ("sky", "unused")
_BAD_FIBERS = ("dead", "poserr")
"""Values of FIBERTYP beside Obj and F-std (a flux standard is a star like any other)."""


@dataclass(frozen=True)
class LamostSpectra:
    """LAMOST `spec` files; each file is one spectrum.

    Columns beyond those of every source: `lmjd`, `spid`, `fiber`, `obsid` and `fibermask` (int64, -1 where the file
    does not say), `planid` (text), `snr_g` and `snr_i` (float32, the survey's own, per filter). `id` is text: OBSID in
    decimal digits or, in the oldest releases, whose files do not hold it, `LMJD-PLANID-SPID-FIBERID`. Bits of
    `fibermask` set nothing aside: what a bad arm has lost has an inverse variance of 0, and the rest is as good as in
    other spectra (median deviation from a running median 0.8 to 1.1 σ in three of four files with bits, 0.95 σ in 24
    of DR8; the fourth is a star at S/N 400, where lines exceed the noise).

    Arguments:
        settings: where the files lie.
        scratch: folder in which the distilled catalog is kept.
    """

    settings: Lamost
    scratch: Place

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid of all LAMOST spectra."""
        return GRID

    @cached_property
    def _files(self) -> Files:
        return Files(self.settings.path, "LAMOST spec files")

    @cached_property
    def _catalog(self) -> Catalog | None:
        """What is wanted, by what the files' names say or else by OBSID."""
        if self.settings.catalog is None:
            return None
        path = locate(self.settings.catalog, self.settings.path)
        wanted, scratch = self.settings.wanted, self.scratch
        try:
            return Catalog.build(path, _NAME_KEYS, ("planid", "obsid"), wanted, scratch)
        except SourceError:
            return Catalog.build(path, ("obsid",), (), wanted, scratch)

    def files(self) -> list[Entry]:
        """List the wanted files by name; none is opened.

        With a catalog, a file named as LAMOST names it is wanted or not by LMJD, PLANID, SPID and FIBERID. Others, and
        all where the catalog lacks one of these, must be opened to know.

        Raises:
            SourceError: the path does not exist or holds no FITS file, or the catalog cannot be used.
        """
        listed = self._files.list()
        if self._catalog is None:
            return [replace(entry, count=1) for entry in listed]
        names = [_parse(entry.name) for entry in listed]
        rows = self._wanted_rows([name for name in names if name is not None]) if self._by_name else None
        if rows is None:
            return listed
        row = iter(rows)
        counts = [None if name is None else int(next(row) >= 0) for name in names]
        return [replace(entry, count=count) for entry, count in zip(listed, counts, strict=True) if count != 0]

    def count(self, name: str) -> int:
        """Say by its header whether a file is wanted (1) or not (0).

        Raises:
            SourceError: there is no header, or it does not name the spectrum.
        """
        if self._catalog is None:
            return 1
        header = _first_header(self._files, name)
        if not self._by_name:
            found, _ = self._catalog.find(np.array([_integer(header, "OBSID")], np.int64))
            return int(found[0])
        return int(self._wanted_rows([_spectrum_name(header)])[0] >= 0)

    def missing(self) -> list[str]:
        """Name what the catalog wants and no file holds; nothing where files must be opened to know."""
        if self._catalog is None or not self._by_name:
            return []
        names = [_parse(entry.name) for entry in self._files.list()]
        known = [name for name in names if name is not None]
        if len(known) < len(names):
            return []
        absent = np.setdiff1d(np.arange(len(self._catalog)), self._wanted_rows(known))
        lmjd, spid, fiber = (self._catalog.key(key)[absent] for key in _NAME_KEYS)
        plans = self._catalog.values("planid", absent)
        return [
            f"spec-{day}-{str(plan).strip()}_sp{number:02d}-{place:03d}"
            for day, plan, number, place in zip(lmjd, plans, spid, fiber, strict=True)
        ]

    @property
    def _by_name(self) -> bool:
        return self._catalog is not None and self._catalog.keys == _NAME_KEYS and "planid" in self._catalog.columns

    def _wanted_rows(self, names: list["_Name"]) -> Int64[np.ndarray, "n"]:
        """Give the catalog's row of each spectrum, -1 where it is not wanted."""
        assert self._catalog is not None
        numbers = np.array([(name.lmjd, name.spid, name.fiber) for name in names], np.int64).reshape(-1, 3)
        start, stop = self._catalog.span(*numbers.T)
        plans = np.array([name.planid for name in names], np.str_)
        rows = np.full(len(names), -1, np.int64)
        # Plans of one night share spectrographs and fibers: a few rows each.
        for offset in range(int((stop - start).max(initial=0))):
            row = np.where(start + offset < stop, start + offset, 0)
            same = np.char.strip(self._catalog.values("planid", row).astype(np.str_)) == plans
            rows = np.where(same & (start + offset < stop), row, rows)
        return rows

    def identify(self, piece: Piece) -> Columns:
        """Give the catalog values of a file whose flux cannot be read, from its first header if that is there."""
        try:
            return _columns(_first_header(self._files, piece.name))
        except SourceError:
            return {}

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read one file: a batch of one spectrum and its catalog values.

        Raises:
            SourceError: the file is damaged, is not a LAMOST low-resolution spectrum or is not in vacuum.
        """
        with FitsFile(self._files, piece.name) as file:
            flux, ivar = _read_pixels(file)
            columns = _columns(file.units[0].header)
        if not ivar.any():
            columns["status"] |= np.int32(Status.DEAD)
        rows = np.array([piece.start], np.int64)
        return Spectra(rows, flux[None], ivar[None], GRID), columns


@dataclass(frozen=True)
class _Name:
    """What LAMOST names a spectrum by."""

    lmjd: int
    planid: str
    spid: int
    fiber: int

    def __str__(self) -> str:
        return f"{self.lmjd}-{self.planid}-{self.spid:02d}-{self.fiber:03d}"


def _parse(path: str) -> _Name | None:
    """Take a file's name, such as `spec-55862-B6212_sp06-003.fits.gz`, apart."""
    match = re.fullmatch(r"spec-(\d+)-(.+)_sp(\d+)-(\d+)\.fits(?:\.gz)?", PurePosixPath(path).name, re.IGNORECASE)
    return None if match is None else _Name(int(match[1]), match[2], int(match[3]), int(match[4]))


def _spectrum_name(header: Header) -> _Name:
    lmjd, spid, fiber = (_integer(header, key) for key in ("LMJD", "SPID", "FIBERID"))
    return _Name(lmjd, str(header.get("PLANID") or "").strip(), spid, fiber)


@dataclass(frozen=True)
class _Pixels:
    """What a file says pixel by pixel."""

    flux: Float32[np.ndarray, "m"]
    ivar: Float32[np.ndarray, "m"]
    position: Float64[np.ndarray, "m"]
    masked: Bool[np.ndarray, "m"]


def _read_pixels(file: FitsFile) -> tuple[Float32[np.ndarray, "pixels"], Float32[np.ndarray, "pixels"]]:
    unit = _find_unit(file)
    refuse_air(file.units[0].header)
    refuse_air(unit.header)
    if file.units[0].header.get("VACUUM") is not True and unit.header.get("VACUUM") is not True:
        raise SourceError(f"{file.path}: no keyword VACUUM = T; expected a LAMOST header that says air or vacuum")
    found = _read_table(file, unit) if unit.is_table else _read_image(file, unit)
    finite = np.isfinite(found.flux)
    good = finite & (found.flux != 0) & (found.ivar > 0) & np.isfinite(found.ivar) & ~found.masked
    inside = (found.position > -0.5) & (found.position < GRID.pixels - 0.5)
    if (good & ~inside).any():
        raise SourceError(f"{unit.place}: good pixels outside {GRID}; expected wavelengths in Å in that range")
    pixel = pixel_numbers(found.position[inside], unit.place, "log10(Å) in whole steps of 0.0001")
    if np.bincount(pixel, minlength=1).max() > 1:
        raise SourceError(f"{unit.place}: a wavelength is repeated; expected each pixel once")
    flux, ivar = np.zeros((2, GRID.pixels), np.float32)
    flux[pixel] = np.where(finite, found.flux, 0)[inside]
    ivar[pixel] = np.where(good, found.ivar, 0)[inside]
    return flux, ivar


def _find_unit(file: FitsFile) -> Unit:
    """Give the unit that holds the spectrum, in whatever layout."""
    tables = [unit for unit in file.units if {"flux", "ivar"} <= unit.columns.keys()]
    if len(tables) == 1:
        return tables[0]
    if len(tables) > 1:
        raise SourceError(
            f"{file.path}: holds spectra in {file.contents}, as medium-resolution files do; "
            "expected one low-resolution spectrum"
        )
    images = [unit for unit in file.units if len(unit.shape) == 2 and unit.shape[0] == 5 and not unit.is_table]
    if len(images) != 1:
        raise SourceError(f"{file.path}: holds {file.contents}; expected a LAMOST image of 5 rows, or table of FLUX")
    return images[0]


def _read_table(file: FitsFile, unit: Unit) -> _Pixels:
    names = ["flux", "ivar", "wavelength", "andmask"]
    if unit.rows != 1:
        raise SourceError(f"{unit.place}: {unit.rows} rows; expected a spectrum in one row of vectors")
    table = {name: np.atleast_1d(values[0]) for name, values in file.table(unit, names).items()}
    if len({values.shape for values in table.values()}) > 1:
        shapes = {name: values.shape for name, values in table.items()}
        raise SourceError(f"{unit.place}: vectors of shapes {shapes}; expected the same length")
    # Written so that a mask that is not a number counts as set.
    return _Pixels(
        _float32(table["flux"]),
        _float32(table["ivar"]),
        _position(table["wavelength"].astype(np.float64)),
        ~(table["andmask"] == 0),
    )


def _read_image(file: FitsFile, unit: Unit) -> _Pixels:
    flux, ivar, third, mask, _ = file.image(unit)
    if np.isfinite(third).all() and (np.diff(third) > 0).all() and len(third) > 1:
        position = _position(third.astype(np.float64))
    elif "wavelength" in str(unit.header.get("EXTEN0") or "").lower():
        raise SourceError(f"{unit.place}: the third row does not rise; expected wavelengths, as EXTEN0 says")
    else:
        position = _header_position(unit)
    return _Pixels(_float32(flux), _float32(ivar), position, ~(mask == 0))


def _header_position(unit: Unit) -> Float64[np.ndarray, "m"]:
    """Place the pixels by the header of an old file; its linear terms are those of log10(λ)."""
    first, step = unit.header.value("COEFF0", float), unit.header.value("COEFF1", float)
    if not (3 < first < 5 and 0 < step < 0.01):
        raise SourceError(f"{unit.place}: COEFF0 = {first:g}, COEFF1 = {step:g}; expected log10(Å) and its step")
    return np.asarray((first + step * np.arange(unit.shape[1]) - FIRST) / STEP)


def _position(wave: Float64[np.ndarray, "m"]) -> Float64[np.ndarray, "m"]:
    """Give fractional pixel numbers; rounding wavelengths to float32 takes 0.0014 pixel in real files."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((np.log10(wave) - FIRST) / STEP)


def _float32(values: Float64[np.ndarray, "m"]) -> Float32[np.ndarray, "m"]:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32)


def _columns(header: Header) -> Columns:
    """Give the catalog row of a file, all of which is in its first header."""
    name, obsid = _spectrum_name(header), _integer(header, "OBSID")
    if obsid <= 0 and (min(name.lmjd, name.spid, name.fiber) < 0 or not name.planid):
        raise SourceError(
            f"{header.place}: OBSID {obsid}, else {name}; expected a LAMOST header that names its spectrum"
        )
    z = _number(header, "Z")
    kind = {str(header.get(key) or "").strip().lower() for key in ("FIBERTYP", "OBJTYPE")}
    status = Status.OK if np.isfinite(z) else Status.NO_REDSHIFT
    status |= Status.NOT_A_TARGET if kind & set(_NOT_OBJECTS) else Status.OK
    status |= Status.FIBER if kind & set(_BAD_FIBERS) else Status.OK
    return {
        "id": np.array([str(obsid) if obsid > 0 else str(name)]),
        "ra": np.array([_number(header, "RA")]),
        "dec": np.array([_number(header, "DEC")]),
        "z": np.array([z]),
        "zwarn": np.zeros(1, np.int64),
        "class": np.array([str(header.get("CLASS") or "").strip()]),
        "subclass": np.array([str(header.get("SUBCLASS") or "").strip()]),
        "ebv": np.full(1, np.nan, np.float32),
        "status": np.array([int(status)], np.int32),
        "obsid": np.array([obsid], np.int64),
        "lmjd": np.array([name.lmjd], np.int64),
        "planid": np.array([name.planid]),
        "spid": np.array([name.spid], np.int64),
        "fiber": np.array([name.fiber], np.int64),
        "fibermask": np.array([_integer(header, "FIBERMAS")], np.int64),
        "snr_g": np.array([_number(header, "SNRG", "SN_G")], np.float32),
        "snr_i": np.array([_number(header, "SNRI", "SN_I")], np.float32),
    }


def _integer(header: Header, key: str) -> int:
    value = header.get(key)
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if type(value) is int else -1


def _number(header: Header, *keys: str) -> float:
    """Give the first of these keywords that is there; NaN where there is none, or it is LAMOST's unknown."""
    value = next((header.get(key) for key in keys if key in header), None)
    if not isinstance(value, int | float) or value == _UNKNOWN or not np.isfinite(value):
        return float("nan")
    return float(value)


def _first_header(files: Files, name: str) -> Header:
    """Read the first header of a file that may be damaged or cut short behind it."""
    place = files.place(name)
    try:
        with files.open(name) as file:
            raw = file.read(_HEADER_LIMIT)
        if raw.startswith(b"\x1f\x8b"):
            raw = zlib.decompressobj(wbits=31).decompress(raw, _HEADER_LIMIT)
    except UnreachableError:
        raise
    except (OSError, zlib.error) as error:
        raise SourceError(f"{place}: no header can be read ({error}); expected a FITS file") from error
    text = raw.decode("latin-1")
    end = re.search(r"^(?:.{80})*?END {77}", text, re.DOTALL)
    if not text.startswith("SIMPLE  =") or end is None:
        raise SourceError(f"{place}: no whole header; expected a FITS file")
    return Header(text[: end.end() - CARD], place)
