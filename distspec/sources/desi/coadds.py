"""DESI `coadd` and `spectra` files with their `redrock` files: many spectra a file, in three arms on one linear grid.

The arms b, r and z sample the same grid of 0.8 Å, so that they are joined by a weighted mean where they overlap and no
flux is resampled. A pixel with any mask bit is bad: the coadd keeps a bit only where no exposure was free of it. An arm
that a file lacks leaves its pixels without data. A `spectra` file, taken where there is no coadd, holds each exposure
of a target; they are coadded here as the pipeline does, but for its search for cosmics. Wavelengths are vacuum by the
data model, whose headers do not repeat it.

References:
    DESI Collaboration (2024), https://arxiv.org/abs/2306.06308
    Data model, https://desidatamodel.readthedocs.io
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from distspec.addresses import Place
from distspec.config import Desi, Wanted
from distspec.errors import SourceError
from distspec.sources import Entry, Piece
from distspec.sources.catalogs.catalog import Catalog, locate
from distspec.sources.desi.arms import GRID, Rows, choose_rows, read_arms
from distspec.sources.desi.redshifts import CATALOG_COLUMNS, Redshifts, companion, match, read_catalog, read_companion
from distspec.sources.desi.targets import TARGET_COLUMNS, check_classes, fiber_status, has_class, target_status
from distspec.sources.files.fits import FitsFile, Unit, count_rows
from distspec.sources.files.kept import KeptFile
from distspec.sources.files.places import Files, Torn
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["DesiCoadds"]

# What the pipeline writes beside a coadd; their contents are derived from the coadd or already summed in it.
_COMPANION = re.compile(
    r"(redrock|rrdetails|zbest|emline|qso_mgii|qso_qn|zmtl|zpix|ztile|zall|tile-qa|exp-qa|exposure-qa|exposures|tiles"
    r"|[cs]?frame|sky|stdstars|fluxcalib|fiberflat\w*|psf|preproc)-"
)

_HEALPIX_NAME = re.compile(r"(?:coadd|spectra)-([a-z][a-z0-9]*)-([a-z][a-z0-9]*)-(\d+)\.fits(?:\.gz)?")

_TILE_NAME = re.compile(r"(?:coadd|spectra)-\d-(\d+)-\w+\.fits(?:\.gz)?")

_BASIC = (
    "targetid",
    "target_ra",
    "target_dec",
    "ebv",
    "objtype",
    "coadd_fiberstatus",
    "fiberstatus",
    "tileid",
    "fiber",
)

_BLOCK = 1 << 20

_ZWARN_SKY = 1 << 0

_ZWARN_UNPLUGGED = 1 << 7

_ZWARN_BAD_TARGET = 1 << 8


@dataclass(frozen=True)
class _Coadd:
    """What is known of a file before its flux is read.

    Arguments:
        fibermap: its FIBERMAP.
        rows: all wanted spectra.
        read: reads their redshifts from the redrock file.
    """

    fibermap: Unit
    rows: Rows
    read: Callable[[], Redshifts | None]

    @cached_property
    def redshifts(self) -> Redshifts | None:
        """Redshifts of the wanted spectra; None where there is no redrock file.

        Raises:
            SourceError: that file is damaged.
        """
        return self.read()


@dataclass(frozen=True)
class DesiCoadds:
    """DESI coadds by healpix or by tile: a file, a folder, an archive or a bucket of them.

    In a folder every FITS file is taken but the pipeline's known companions of coadds (redrock, emline, ...) and the
    catalog that the settings name: one that is no coadd is reported when it is read. A redshift comes from the redrock
    file beside the coadd, else from that catalog; `zwarn` is 0 where the catalog has no such column. `id` is the
    TARGETID. A FIBERMAP without a fiber status or an OBJTYPE counts as good fibers on targets.

    Columns beyond those of every source: `survey`, `program` (text, empty where unknown), `healpix`, `tile`, `fiber`
    (int64, -1 where unknown or, of `tile` and `fiber`, where there are several).

    Raises:
        ConfigError: a target class is unknown.
    """

    settings: Desi
    scratch: Place

    def __post_init__(self) -> None:
        check_classes(self.settings.targets)

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "scratch": self.scratch}

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid of all DESI spectra."""
        return GRID

    def files(self) -> list[Entry]:
        """List the files by name; none is opened. Of a coadd and its `spectra` file only the coadd is taken.

        Raises:
            SourceError: the path does not exist or holds no coadd, or the catalog cannot be used.
            ConfigError: a condition on the catalog does not suit it.
        """
        groups = self._wanted_groups
        if groups is None:
            return self._listed
        named = ((entry, _group(entry.name)) for entry in self._listed)
        return [entry for entry, group in named if group is None or group in groups]

    def count(self, name: str) -> int:
        """Count the wanted spectra of a file, reading no flux.

        Raises:
            SourceError: the file is damaged or is not a DESI coadd.
        """
        if not self._selects and not _is_spectra(name):
            count = count_rows(self._files, name, "FIBERMAP")
            if count is not None:
                return count
        try:
            return self._count(self._files, name)
        except SourceError:
            # What is torn has rows all the same, if its FIBERMAP can be read.
            return self._count(self._torn, name)

    def missing(self) -> list[str]:
        """Name the wanted targets whose coadd by healpix is not there.

        Nothing is known to be missing of tiles, or while there are files whose names do not say what they hold.
        """
        have = {_group(entry.name) for entry in self._listed}
        if self._wanted_groups is None or self._catalog is None or None in have:
            return []
        gone, ids = [], self._catalog.key("targetid")
        for start, names, number in _groups(self._catalog):
            lost = np.array([name not in have for name in names])
            for row in np.flatnonzero(lost[number]):
                gone.append(f"TARGETID {ids[start + row]} of coadd-{names[number[row]]}")
        return gone

    def identify(self, piece: Piece) -> Columns:
        """Give the columns of spectra whose flux cannot be read; nothing where the FIBERMAP cannot be read either."""
        try:
            with FitsFile(self._torn, piece.name) as file:
                fibermap = _find_fibermap(file)
                rows = self._choose(file, fibermap, piece.name).part(piece.start, piece.stop)
        except SourceError:
            return {}
        try:
            return self._columns(rows, self._read_redrock(piece.name, rows))
        except SourceError:
            return _describe(rows)

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read and join the arms of a run of wanted spectra, and look up their redshifts.

        Raises:
            SourceError: the file, its redrock file or the catalog is damaged or is not what it should be.
        """
        with self._kept.open(piece.name) as (file, coadd):
            total = len(coadd.rows)
            if total < piece.stop:
                raise SourceError(f"{coadd.fibermap.place}: {total} wanted spectra; expected {piece.stop} or more")
            if len(piece) < total:
                file.keep()
            rows = coadd.rows.part(piece.start, piece.stop)
            flux, ivar = read_arms(file, coadd.fibermap.rows, rows)
        if piece.stop == total:
            self._kept.close()
        redrock = coadd.redshifts
        columns = self._columns(rows, None if redrock is None else redrock.part(piece.start, piece.stop))
        columns["status"][~ivar.any(axis=1)] |= np.int32(Status.DEAD)
        return Spectra(np.arange(piece.start, piece.stop, dtype=np.int64), flux, ivar, GRID), columns

    @cached_property
    def _files(self) -> Files:
        return Files(self.settings.path, "a DESI coadd file or a folder of them")

    @cached_property
    def _kept(self) -> KeptFile["_Coadd"]:
        return KeptFile(self._files, self._find)

    @cached_property
    def _torn(self) -> Torn:
        return Torn(self._files.root, self._files.expected)

    @property
    def _selects(self) -> bool:
        return bool(self.settings.targets) or self.settings.wanted is not None

    @cached_property
    def _listed(self) -> list[Entry]:
        entries = self._files.list()
        if len(entries) == 1 and PurePosixPath(self.settings.path).name == entries[0].name:
            return entries
        catalog = PurePosixPath(self.settings.catalog or "").name
        names = {entry.name for entry in entries}
        kept = []
        for entry in entries:
            name = PurePosixPath(entry.name).name
            coadd = self._files.beside(entry.name, name.replace("spectra-", "coadd-", 1)).removesuffix(".gz")
            summed = _is_spectra(entry.name) and (coadd in names or f"{coadd}.gz" in names)
            if not summed and name != catalog and not _COMPANION.match(name):
                kept.append(entry)
        if not kept:
            raise SourceError(
                f"no coadd-*.fits or coadd-*.fits.gz in {self.settings.path!r}; expected {self._files.expected}"
            )
        return kept

    @cached_property
    def _catalog(self) -> Catalog | None:
        if self.settings.catalog is None:
            return None
        path = locate(self.settings.catalog, self.settings.path)
        wanted = self.settings.wanted or Wanted()
        catalog = Catalog.build(path, ("targetid",), CATALOG_COLUMNS, wanted, self.scratch)
        if "z" not in catalog.columns:
            raise SourceError(f"{path}: no column Z in the catalog; expected a table with TARGETID and Z")
        return catalog

    @cached_property
    def _wanted_groups(self) -> set[str] | None:
        """Coadds by healpix that hold wanted targets, where the catalog says so; None where it does not."""
        # Asked for first, so that a catalog that cannot be used is said before any file is read.
        catalog = self._catalog
        if catalog is None or self.settings.wanted is None:
            return None
        if not {"survey", "program", "healpix"} <= set(catalog.columns):
            return None
        return {name for _, names, _ in _groups(catalog) for name in names}

    def _count(self, files: Files, name: str) -> int:
        with FitsFile(files, name) as file:
            return len(self._choose(file, _find_fibermap(file), name))

    def _find(self, file: FitsFile, name: str) -> "_Coadd":
        fibermap = _find_fibermap(file)
        rows = self._choose(file, fibermap, name)
        return _Coadd(fibermap, rows, lambda: self._read_redrock(name, rows))

    def _choose(self, file: FitsFile, fibermap: Unit, name: str) -> Rows:
        """Find the wanted spectra of a file: one a target."""
        present = [column for column in (*_BASIC, *TARGET_COLUMNS) if column in fibermap.columns]
        table = file.table(fibermap, present)
        if table["targetid"].dtype.kind not in "iu" or table["targetid"].ndim != 1:
            raise SourceError(f"{fibermap.place}: TARGETID is stored as {table['targetid'].dtype}; expected integers")
        table["targetid"] = table["targetid"].astype(np.int64)
        rows = choose_rows(table, _is_spectra(name))
        rows.table.update(_whereabouts(rows, file, fibermap, name))
        wanted = np.ones(len(rows), bool)
        if self.settings.targets:
            survey = str(rows.table["survey"][0]) if len(rows) else ""
            wanted &= has_class(rows.table, self.settings.targets, survey)
        if self.settings.wanted is not None and self._catalog is not None:
            wanted &= match(self._catalog, rows.table["targetid"], _facts(rows), strict=True)[0]
        return rows if wanted.all() else rows.take(np.flatnonzero(wanted))

    def _read_redrock(self, name: str, rows: Rows) -> Redshifts | None:
        redrock = companion(self._files, name)
        return None if redrock is None else read_companion(self._files, redrock, rows.table["targetid"])

    def _columns(self, rows: Rows, redrock: Redshifts | None) -> Columns:
        columns = _describe(rows)
        ids = columns["id"]
        z, zwarn, status = columns["z"], columns["zwarn"], columns["status"]
        tables = [] if redrock is None else [redrock]
        if self._catalog is not None:
            tables.append(read_catalog(self._catalog, ids, _facts(rows)))
        for table in tables:
            use = table.found & np.isnan(z)
            z[use], zwarn[use] = table.z[use], table.zwarn[use]
            columns["class"] = np.where(use, table.kind, columns["class"])
            columns["subclass"] = np.where(use, table.subkind, columns["subclass"])
        status[~np.isnan(z)] &= ~np.int32(Status.NO_REDSHIFT)
        status[zwarn & _ZWARN_UNPLUGGED != 0] |= np.int32(Status.FIBER)
        status[zwarn & (_ZWARN_SKY | _ZWARN_BAD_TARGET) != 0] |= np.int32(Status.NOT_A_TARGET)
        return columns


def _is_spectra(name: str) -> bool:
    return PurePosixPath(name).name.startswith("spectra-")


def _find_fibermap(file: FitsFile) -> Unit:
    fibermap = file.find("FIBERMAP")
    if fibermap is None or "targetid" not in fibermap.columns:
        raise SourceError(f"{file.path}: holds {file.contents}; expected a DESI coadd with a FIBERMAP of TARGETID")
    return fibermap


def _group(name: str) -> str | None:
    """Name what a coadd by healpix holds, survey-program-pixel; None of other files."""
    found = _HEALPIX_NAME.fullmatch(PurePosixPath(name).name)
    return None if found is None else f"{found[1]}-{found[2]}-{int(found[3])}"


def _groups(catalog: Catalog) -> Iterator[tuple[int, list[str], Int64[np.ndarray, "n"]]]:
    """Give, by blocks of rows: the first row, the coadds that are named, and which of them each row is in."""
    for start in range(0, len(catalog), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(catalog)))
        survey, s = np.unique(catalog.values("survey", rows), return_inverse=True)
        program, p = np.unique(catalog.values("program", rows), return_inverse=True)
        healpix = catalog.values("healpix", rows).astype(np.int64)
        codes, number = np.unique((s * len(program) + p) << 40 | healpix, return_inverse=True)
        pairs = ((int(code) >> 40, int(code) & ((1 << 40) - 1)) for code in codes)
        names = [f"{survey[i // len(program)]}-{program[i % len(program)]}-{pixel}" for i, pixel in pairs]
        yield start, names, number


def _whereabouts(rows: Rows, file: FitsFile, fibermap: Unit, name: str) -> dict[str, Shaped[np.ndarray, "n"]]:
    """Say which survey, program, healpix and tile the spectra of a file are of."""
    primary, plain = file.units[0].header, PurePosixPath(name).name
    by_healpix, by_tile = _HEALPIX_NAME.fullmatch(plain), _TILE_NAME.fullmatch(plain)
    survey = primary.get("SURVEY") or (by_healpix[1] if by_healpix else fibermap.header.get("SURVEY"))
    program = primary.get("PROGRAM") or (by_healpix[2] if by_healpix else None)
    healpix = primary.get("HPXPIXEL")
    if healpix is None and primary.get("SPGRP") == "healpix":
        healpix = primary.get("SPGRPVAL")
    if healpix is None and by_healpix:
        healpix = int(by_healpix[3])
    tile = primary.get("TILEID")
    if tile is None and by_tile:
        tile = int(by_tile[1])
    count, table = len(rows), rows.table
    return {
        "survey": np.full(count, str(survey or "").strip().lower()),
        "program": np.full(count, str(program or "").strip().lower()),
        "healpix": np.full(count, healpix if isinstance(healpix, int) else -1, np.int64),
        "tileid": table.get("tileid", np.full(count, tile if isinstance(tile, int) else -1)).astype(np.int64),
        "fiber": table.get("fiber", np.full(count, -1)).astype(np.int64),
    }


def _facts(rows: Rows) -> dict[str, np.ndarray]:
    return {name: rows.table[name] for name in ("survey", "program", "healpix", "tileid")}


def _describe(rows: Rows) -> Columns:
    """Give what a FIBERMAP says of its spectra; their redshifts are unknown so far."""
    table, count = rows.table, len(rows)
    unknown = np.full(count, np.nan)
    ebv = table.get("ebv", unknown).astype(np.float32)
    # Targets that were added by hand carry 0, which the dust map never says.
    ebv[~(ebv > 0)] = np.nan
    fiber: Bool[np.ndarray, "n"] = table.get("coadd_fiberstatus", table.get("fiberstatus", np.zeros(count, np.int64)))
    status = target_status(table) | fiber_status(fiber.astype(np.int64)) | np.int32(Status.NO_REDSHIFT)
    return {
        "id": table["targetid"],
        "ra": table.get("target_ra", unknown).astype(np.float64),
        "dec": table.get("target_dec", unknown).astype(np.float64),
        "z": unknown.copy(),
        "zwarn": np.zeros(count, np.int64),
        "class": np.zeros(count, "U6"),
        "subclass": np.zeros(count, "U20"),
        "ebv": ebv,
        "status": status.astype(np.int32),
        "survey": table["survey"],
        "program": table["program"],
        "healpix": table["healpix"],
        "tile": table["tileid"],
        "fiber": table["fiber"],
    }
