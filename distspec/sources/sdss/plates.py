"""SDSS, BOSS and eBOSS plates: all spectra of a plate in one `spPlate` file, their redshifts in an `spZbest` file.

The same spectra as in `spec` files, with the same identifiers, on the same grid and under the same rule for bad pixels
(`conventions`), at a hundredth of the files. Redshifts are joined by fiber, never by the order of rows.
The `spZbest` file lies beside the plate or, as in the survey's own tree, in a folder beside it.

References:
    https://data.sdss.org/datamodel/files/BOSS_SPECTRO_REDUX/RUN2D/PLATE4/spPlate.html
    https://data.sdss.org/datamodel/files/BOSS_SPECTRO_REDUX/RUN2D/PLATE4/RUN1D/spZbest.html
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from distspec.addresses import Place
from distspec.config import Sdss
from distspec.errors import SourceError
from distspec.sources import Entry, Piece
from distspec.sources.catalogs.catalog import Catalog, locate
from distspec.sources.conventions import check_flux_unit
from distspec.sources.files.fits import FitsFile, Unit
from distspec.sources.files.kept import KeptFile
from distspec.sources.files.places import Files, Torn
from distspec.sources.sdss.conventions import (
    FIRST,
    GRID,
    KEYS,
    NOPLUG,
    STEP,
    absent,
    check_vacuum,
    identities,
    place,
    statuses,
)
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["PLATE_NAME", "SdssPlates"]

PLATE_NAME = re.compile(r"spPlate-(\d+)-(\d+)\.fits(?:\.gz)?", re.IGNORECASE)

_RUN2D = re.compile(r"\d+|v\d+_\d+_\d+")


@dataclass(frozen=True)
class _Plate:
    """One plate.

    Arguments:
        plate: number of the plate.
        mjd: of the observation.
        run2d: version of the reduction.
        rows: wanted rows of the file.
        fibers: their fibers.
        plugmap: what was plugged where, for these rows.
    """

    plate: int
    mjd: int
    run2d: str
    rows: Int64[np.ndarray, "n"]
    fibers: Int64[np.ndarray, "n"]
    plugmap: dict[str, Any]

    def part(self, piece: Piece) -> "_Plate":
        """Give the run of wanted rows that a piece means."""
        run = slice(piece.start, piece.stop)
        plugmap = {name: values[run] for name, values in self.plugmap.items()}
        return _Plate(self.plate, self.mjd, self.run2d, self.rows[run], self.fibers[run], plugmap)


@dataclass(frozen=True)
class _Opened:
    """What is known of a plate before its flux is read.

    Arguments:
        plate: with all wanted rows.
        read: reads their redshifts from the `spZbest` file.
    """

    plate: _Plate
    read: Callable[[], dict[str, Any]]

    @cached_property
    def redshifts(self) -> dict[str, Any]:
        """Columns for the wanted fibers; none where there is no `spZbest` file.

        Raises:
            SourceError: that file is damaged.
        """
        return self.read()


@dataclass(frozen=True)
class SdssPlates:
    """A file, folder, archive or bucket of `spPlate` files with their `spZbest` files.

    Columns as of `SdssSpectra`; `ebv` is unknown. Of a plate without an `spZbest` file the redshifts are unknown.
    """

    settings: Sdss
    scratch: Place

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "scratch": self.scratch}

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid of all SDSS spectra."""
        return GRID

    def files(self) -> list[Entry]:
        """List the plates with wanted fibers by name; none is opened.

        Raises:
            SourceError: the path does not exist or holds no plate, or the catalog cannot be used.
            ConfigError: a condition on the catalog does not suit it.
        """
        if self._catalog is None:
            return self._listed
        start, stop = self._catalog.span(*_numbers(self._listed))
        unnamed = [PLATE_NAME.fullmatch(PurePosixPath(entry.name).name) is None for entry in self._listed]
        wanted = (stop > start) | np.array(unnamed)
        return [entry for entry, is_wanted in zip(self._listed, wanted, strict=True) if is_wanted]

    def count(self, name: str) -> int:
        """Count the wanted fibers of a plate.

        Raises:
            SourceError: the file is damaged or is not an SDSS plate.
        """
        try:
            with FitsFile(self._files, name) as file:
                return len(self._plate(file, name).rows)
        except SourceError:
            # What is torn has rows all the same, if it can be seen how many.
            with FitsFile(self._torn, name) as file:
                return len(self._plate(file, name).rows)

    def missing(self) -> list[str]:
        """Name the wanted spectra of plates that are not there."""
        if self._catalog is None:
            return []
        return absent(self._catalog, _numbers(self._listed))

    def identify(self, piece: Piece) -> Columns:
        """Give the columns of fibers whose flux cannot be read; nothing where the plug map cannot be read either."""
        try:
            with FitsFile(self._torn, piece.name) as file:
                plate = self._plate(file, piece.name).part(piece)
        except SourceError:
            return {}
        try:
            redshifts = self._redshifts(piece.name, plate)
        except SourceError:
            redshifts = {}
        try:
            return _columns(plate, redshifts, file.path)
        except SourceError:
            return {}

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read a run of wanted fibers, and look up their redshifts.

        Raises:
            SourceError: the file or its `spZbest` is damaged or is not what it should be, or is not in vacuum.
        """
        with self._kept.open(piece.name) as (file, whole):
            total = len(whole.plate.rows)
            if total < piece.stop:
                raise SourceError(f"{file.path}: {total} wanted fibers; expected {piece.stop} or more")
            if len(piece) < total:
                file.keep()
            plate = whole.plate.part(piece)
            flux, ivar, unplugged = _read_images(file, plate)
        if piece.stop == total:
            self._kept.close()
        redshifts = {name: values[piece.start : piece.stop] for name, values in whole.redshifts.items()}
        columns = _columns(plate, redshifts, file.path)
        columns["status"][unplugged] |= np.int32(Status.FIBER)
        columns["status"][~ivar.any(axis=1)] |= np.int32(Status.DEAD)
        return Spectra(np.arange(piece.start, piece.stop, dtype=np.int64), flux, ivar, GRID), columns

    @cached_property
    def _files(self) -> Files:
        return Files(self.settings.path, "an SDSS spPlate file or a folder of them")

    @cached_property
    def _kept(self) -> KeptFile["_Opened"]:
        return KeptFile(self._files, self._find)

    @cached_property
    def _torn(self) -> Torn:
        return Torn(self._files.root, self._files.expected)

    @cached_property
    def _listed(self) -> list[Entry]:
        entries = self._files.list()
        if len(entries) > 1 or self.settings.layout != "plate":
            entries = [entry for entry in entries if PLATE_NAME.fullmatch(PurePosixPath(entry.name).name)]
        if not entries:
            raise SourceError(f"no spPlate-PLATE-MJD.fits in {self.settings.path!r}; expected {self._files.expected}")
        return entries

    @cached_property
    def _catalog(self) -> Catalog | None:
        if self.settings.catalog is None:
            return None
        path = locate(self.settings.catalog, self.settings.path)
        return Catalog.build(path, KEYS, (), self.settings.wanted, self.scratch)

    def _find(self, file: FitsFile, name: str) -> "_Opened":
        plate = self._plate(file, name)
        return _Opened(plate, lambda: self._redshifts(name, plate))

    def _plate(self, file: FitsFile, name: str) -> _Plate:
        """Find out what a plate holds and what of it is wanted, reading no flux."""
        primary = file.units[0]
        plugmap = file.find_table("fiberid", "objtype")
        if plugmap is None or len(primary.shape) != 2:
            raise SourceError(f"{file.path}: holds {file.contents}; expected an SDSS plate: images and a plug map")
        if plugmap.rows != primary.rows:
            raise SourceError(f"{plugmap.place}: {plugmap.rows} fibers; expected {primary.rows} as there are spectra")
        optional = [name for name in ("ra", "dec") if name in plugmap.columns]
        table = file.table(plugmap, ["fiberid", "objtype", *optional])
        rows = np.arange(primary.rows)
        # A fiber that could not be mapped has no number there; rows are in the order of fibers.
        table["mapped"] = table["fiberid"] > 0
        fibers = np.where(table["mapped"], table["fiberid"], rows + 1).astype(np.int64)
        if len(np.unique(fibers)) != len(fibers):
            raise SourceError(f"{plugmap.place}: FIBERID is repeated; expected each fiber once")
        (plate,), (mjd,) = _numbers([Entry(name, 0, 0)])
        if plate < 0:
            plate, mjd = primary.header.value("PLATEID", int), primary.header.value("MJD", int)
        if self._catalog is not None:
            shape = len(fibers)
            wanted, _ = self._catalog.find(np.full(shape, plate), np.full(shape, mjd), fibers)
            rows = rows[wanted]
        table = {key: values[rows] for key, values in table.items()}
        return _Plate(int(plate), int(mjd), self._run2d(file, name), rows, fibers[rows], table)

    def _run2d(self, file: FitsFile, name: str) -> str:
        """Give the version of the reduction: by the header or, of SDSS I-II, by the folder RUN2D/PLATE."""
        stated = str(file.units[0].header.get("RUN2D") or "").strip()
        folders = [part for part in PurePosixPath(self._files.place(name)).parts[-4:-1] if _RUN2D.fullmatch(part)]
        return stated or (folders[0] if folders else "")

    def _redshifts(self, name: str, plate: _Plate) -> dict[str, Any]:
        """Read the `spZbest` file, if there is one, as columns for the fibers of a plate; `found` says for which."""
        companion = f"spZbest-{PurePosixPath(name).name.partition('-')[2]}"
        other = companion.removesuffix(".gz") if companion.endswith(".gz") else f"{companion}.gz"
        near = self._files.near(name, companion) or self._files.near(name, other)
        if not near:
            return {}
        # Of several the one in the folder of the same version, else the newest.
        chosen = next((path for path in near if PurePosixPath(path).parent.name == plate.run2d), near[-1])
        with FitsFile(self._files, chosen) as file:
            unit = file.find_table("fiberid", "z", "zwarning", "class", "subclass")
            if unit is None:
                raise SourceError(f"{file.path}: holds {file.contents}; expected FIBERID, Z, ZWARNING, CLASS, SUBCLASS")
            optional = ["plate", "mjd", "objtype", "plug_ra", "plug_dec", "specobjid", "run2d"]
            wanted = ["fiberid", "z", "zwarning", "class", "subclass"]
            table = file.table(unit, wanted + [name for name in optional if name in unit.columns])
            return _by_fiber(table, plate, unit)


def _numbers(entries: list[Entry]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Give plate and MJD by the files' names; -1 where a name does not say."""
    matches = (PLATE_NAME.fullmatch(PurePosixPath(entry.name).name) for entry in entries)
    found = [(-1, -1) if match is None else (int(match[1]), int(match[2])) for match in matches]
    plate, mjd = np.array(found, np.int64).reshape(-1, 2).T
    return plate, mjd


def _by_fiber(table: dict[str, Any], plate: _Plate, unit: Unit) -> dict[str, Any]:
    fibers = table["fiberid"].astype(np.int64)
    for name, number in (("plate", plate.plate), ("mjd", plate.mjd)):
        if name in table and (table[name] != number).any():
            raise SourceError(f"{unit.place}: {name.upper()} {table[name][0]}; expected {number} as the plate's file")
    order = np.argsort(fibers, kind="stable")
    if (np.diff(fibers[order]) == 0).any():
        raise SourceError(f"{unit.place}: FIBERID is repeated; expected each fiber once")
    if not len(order):
        return {}
    where = np.minimum(np.searchsorted(fibers[order], plate.fibers), len(order) - 1)
    rows = order[where]
    return {name: values[rows] for name, values in table.items()} | {"found": fibers[rows] == plate.fibers}


def _columns(plate: _Plate, redshifts: dict[str, Any], where: str) -> Columns:
    count = len(plate.rows)
    found = redshifts.get("found", np.zeros(count, bool))

    def known(name: str, default: Any) -> Shaped[np.ndarray, "n"]:
        return np.where(found, redshifts[name], default) if name in redshifts else np.asarray(default)

    unknown, nothing = np.full(count, np.nan), np.full(count, "")
    z = known("z", unknown).astype(np.float64)
    z[~np.isfinite(z)] = np.nan
    zwarn = known("zwarning", np.zeros(count, np.int64)).astype(np.int64)
    fiber, plates, mjds = plate.fibers, np.full(count, plate.plate), np.full(count, plate.mjd)
    versions = np.unique(known("run2d", nothing)[found])
    run2d = str(versions[0]).strip() if len(versions) == 1 and versions[0] else plate.run2d
    identifier = redshifts.get("specobjid")
    if identifier is not None and not found.all():
        identifier = None
    status = statuses(z, zwarn, [plate.plugmap["objtype"], known("objtype", nothing)])
    status[~plate.plugmap["mapped"]] |= np.int32(Status.FIBER)
    return {
        "id": identities(identifier, plates, mjds, fiber, run2d, where),
        "ra": known("plug_ra", plate.plugmap.get("ra", unknown)).astype(np.float64),
        "dec": known("plug_dec", plate.plugmap.get("dec", unknown)).astype(np.float64),
        "z": z,
        "zwarn": zwarn,
        "class": known("class", nothing).astype(np.str_),
        "subclass": known("subclass", nothing).astype(np.str_),
        "ebv": np.full(count, np.nan, np.float32),
        "status": status,
        "plate": plates.astype(np.int64),
        "mjd": mjds.astype(np.int64),
        "fiber": fiber,
    }


def _read_images(
    file: FitsFile, plate: _Plate
) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"], Shaped[np.ndarray, "n"]]:
    """Read flux and inverse variance of some fibers, and say which of them were not plugged."""
    primary = file.units[0]
    check_vacuum(primary.header)
    check_flux_unit(primary.header.get("BUNIT"), primary.place)
    for number, what in enumerate(("flux", "inverse variance", "AND mask")):
        shape = file.units[number].image_shape if number < len(file.units) else ()
        if shape != primary.shape:
            raise SourceError(f"{file.path} [HDU {number}]: {what} is {shape}; expected {primary.shape} as the flux")
    if not len(plate.rows):
        empty = np.zeros((0, GRID.pixels), np.float32)
        return empty, empty, np.zeros(0, bool)
    start, stop = int(plate.rows.min()), int(plate.rows.max()) + 1
    flux, ivar, bits = (file.image(unit, start, stop)[plate.rows - start] for unit in file.units[:3])
    if bits.dtype.kind not in "iu":
        raise SourceError(f"{file.units[2].place}: the AND mask is stored as {bits.dtype}; expected integers")
    first, step = primary.header.value("COEFF0", float), primary.header.value("COEFF1", float)
    position = (first - FIRST + step * np.arange(primary.shape[1])) / STEP
    expected = "COEFF0 and COEFF1 as log10(Å) in whole steps of 0.0001"
    flux, ivar = place(position, flux, ivar, bits, primary.place, expected)
    return flux, ivar, (bits & NOPLUG != 0).all(axis=1)
