"""DESI `coadd` files with their `redrock` files: many spectra a file, in three arms on one linear grid.

The arms b, r and z sample the same grid of 0.8 Å, so that they are joined by a weighted mean where they overlap and no
flux is resampled. A pixel with any mask bit is bad: the coadd keeps a bit only where no exposure was free of it. An arm
that a file lacks leaves its pixels without data. Redshifts are joined on TARGETID, never by the order of rows.
Wavelengths are vacuum by the data model, whose headers do not repeat it.

References:
    DESI Collaboration (2024), https://arxiv.org/abs/2306.06308
    Data model, https://desidatamodel.readthedocs.io
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from distspec.config import Desi
from distspec.errors import SourceError
from distspec.sources import Piece
from distspec.sources.conventions import check_flux_unit, find_files, pixel_numbers, refuse_air
from distspec.sources.fits import FitsFile, Unit, count_rows
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["GRID", "PIECE_ROWS", "DesiCoadds"]

GRID = WaveGrid("linear", 3600.0, 0.8, 7781)
"""3600-9824 Å, from the first pixel of the b arm to the last of z."""

PIECE_ROWS = 512
"""Spectra that are read at once, at most: a petal of a tile holds 500."""

# What the pipeline writes beside a coadd; their contents are derived from the coadd or already summed in it.
_COMPANION = re.compile(r"(redrock|rrdetails|zbest|emline|qso_mgii|qso_qn|zmtl|tile-qa|spectra|exp-qa)-")

_ZWARN_SKY = 1 << 0
_ZWARN_UNPLUGGED = 1 << 7
_ZWARN_BAD_TARGET = 1 << 8


@dataclass(frozen=True)
class DesiCoadds:
    """A DESI coadd file, or a folder of them; a piece is a run of at most 512 rows of one file.

    In a folder every FITS file is taken but the pipeline's known companions of coadds (redrock, emline, ...) and the
    catalog that the settings name: one that is no coadd is reported when it is read. A redshift comes from the redrock
    file beside the coadd, else from that catalog; `zwarn` is 0 where the catalog has no such column. `id` is the
    TARGETID. A FIBERMAP without a fiber status or an OBJTYPE counts as good fibers on targets.
    """

    settings: Desi

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid of all DESI spectra."""
        return GRID

    def pieces(self) -> list[Piece]:
        """List runs of rows, reading headers only.

        Raises:
            SourceError: the path does not exist or holds no coadd, or the catalog does not exist.
        """
        expected = "a DESI coadd file or a folder of them"
        root = Path(self.settings.path)
        files = find_files(root, expected)
        if root.is_dir():
            catalog = self._catalog()
            files = [f for f in files if not _COMPANION.match(f.name) and not (catalog and f.samefile(catalog))]
            if not files:
                raise SourceError(f"no coadd-*.fits or coadd-*.fits.gz in folder {str(root)!r}; expected {expected}")
        pieces = []
        for file in files:
            name = file.relative_to(root).as_posix() if file != root else file.name
            try:
                count = count_rows(file, "FIBERMAP") or 1
            except SourceError:
                # Reading the piece raises the same error, where it can be counted.
                count = 1
            pieces += [Piece(name, start, min(start + PIECE_ROWS, count)) for start in range(0, count, PIECE_ROWS)]
        return pieces

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read and join the arms of a run of rows, and look up their redshifts.

        Raises:
            SourceError: the file, its redrock file or the catalog is damaged or is not what it should be.
        """
        root = Path(self.settings.path)
        path = root if root.is_file() else root / piece.name
        with FitsFile(path) as file:
            fibermap = file.find("FIBERMAP")
            if fibermap is None or "targetid" not in fibermap.columns:
                raise SourceError(f"{path}: holds {file.contents}; expected a DESI coadd with a FIBERMAP of TARGETID")
            if fibermap.rows < piece.stop:
                raise SourceError(f"{fibermap.place}: {fibermap.rows} spectra; expected {piece.stop} or more")
            columns = _read_fibermap(file, fibermap, piece)
            flux, ivar = _read_arms(file, fibermap.rows, piece)
        self._add_redshifts(columns, path)
        columns["status"][~ivar.any(axis=1)] |= np.int32(Status.DEAD)
        return Spectra(np.arange(piece.start, piece.stop, dtype=np.int64), flux, ivar, GRID), columns

    def _catalog(self) -> Path | None:
        if self.settings.catalog is None:
            return None
        for path in (Path(self.settings.catalog), Path(self.settings.path) / self.settings.catalog):
            if path.is_file():
                return path
        raise SourceError(f"no catalog file {self.settings.catalog!r}; expected a FITS table with TARGETID and Z")

    def _add_redshifts(self, columns: Columns, path: Path) -> None:
        ids = columns["id"]
        z, zwarn = np.full(len(ids), np.nan), np.zeros(len(ids), np.int64)
        kind, subkind = np.zeros(len(ids), "U6"), np.zeros(len(ids), "U20")
        tables = [_load_redshifts(companion) for companion in _redrock_of(path)]
        catalog = self._catalog()
        if catalog is not None:
            stat = catalog.stat()
            tables.append(_keep_redshifts(catalog, stat.st_mtime_ns, stat.st_size))
        for table in tables:
            found, where = table.find(ids)
            use = found & np.isnan(z)
            z[use], zwarn[use] = table.z[where[use]], table.zwarn[where[use]]
            kind = np.where(use, table.kind[where], kind) if len(table.ids) else kind
            subkind = np.where(use, table.subkind[where], subkind) if len(table.ids) else subkind
        z[~np.isfinite(z)] = np.nan
        columns |= {"z": z, "zwarn": zwarn, "class": kind, "subclass": subkind}
        status = columns["status"]
        status[np.isnan(z)] |= np.int32(Status.NO_REDSHIFT)
        status[zwarn & _ZWARN_UNPLUGGED != 0] |= np.int32(Status.FIBER)
        status[zwarn & (_ZWARN_SKY | _ZWARN_BAD_TARGET) != 0] |= np.int32(Status.NOT_A_TARGET)


def _read_fibermap(file: FitsFile, fibermap: Unit, piece: Piece) -> Columns:
    names = ["targetid", "target_ra", "target_dec", "ebv", "objtype", "coadd_fiberstatus", "fiberstatus"]
    table = file.table(fibermap, [n for n in names if n in fibermap.columns], piece.start, piece.stop)
    ids = table["targetid"]
    if ids.dtype.kind not in "iu":
        raise SourceError(f"{fibermap.place}: TARGETID is stored as {ids.dtype}; expected 64-bit integers")
    unknown = np.full(len(ids), np.nan)
    ebv = table.get("ebv", unknown).astype(np.float32)
    # Targets that were added by hand carry 0, which the dust map never says.
    ebv[~(ebv > 0)] = np.nan
    status = np.zeros(len(ids), np.int32)
    fiber = table.get("coadd_fiberstatus", table.get("fiberstatus", status))
    status[fiber != 0] |= np.int32(Status.FIBER)
    if "objtype" in table:
        status[table["objtype"] != "TGT"] |= np.int32(Status.NOT_A_TARGET)
    return {
        "id": ids.astype(np.int64),
        "ra": table.get("target_ra", unknown).astype(np.float64),
        "dec": table.get("target_dec", unknown).astype(np.float64),
        "ebv": ebv,
        "status": status,
    }


def _read_arms(
    file: FitsFile, total: int, piece: Piece
) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"]]:
    """Read all arms and join them on the grid."""
    arms = [arm for arm in ("B", "R", "Z") if file.find(f"{arm}_FLUX")]
    if not arms and file.find("BRZ_FLUX"):
        arms = ["BRZ"]
    if not arms:
        raise SourceError(f"{file.path}: holds {file.contents}; expected B_FLUX, R_FLUX, Z_FLUX or BRZ_FLUX")
    flux = np.zeros((len(piece), GRID.pixels), np.float32)
    ivar = np.zeros((len(piece), GRID.pixels), np.float32)
    covered = 0
    for arm in arms:
        first, arm_flux, arm_ivar = _read_arm(file, arm, total, piece)
        last = first + arm_flux.shape[1]
        shared = min(max(covered - first, 0), arm_flux.shape[1])
        _join(
            flux[:, first : first + shared], ivar[:, first : first + shared], arm_flux[:, :shared], arm_ivar[:, :shared]
        )
        flux[:, first + shared : last] = arm_flux[:, shared:]
        ivar[:, first + shared : last] = arm_ivar[:, shared:]
        covered = max(covered, last)
    return flux, ivar


def _join(
    flux: Float32[np.ndarray, "n shared"],
    ivar: Float32[np.ndarray, "n shared"],
    other_flux: Float32[np.ndarray, "n shared"],
    other_ivar: Float32[np.ndarray, "n shared"],
) -> None:
    """Replace flux and ivar by the weighted mean with another arm's, Σ w f / Σ w, and the summed weight Σ w."""
    # In double precision the product of two singles is exact, so that a pixel of one arm keeps its flux to the bit.
    weight, other = ivar.astype(np.float64), other_ivar.astype(np.float64)
    total = weight + other
    mean = np.divide(flux * weight + other_flux * other, total, out=np.zeros_like(total), where=total > 0)
    flux[:], ivar[:] = mean, total


def _read_arm(
    file: FitsFile, arm: str, total: int, piece: Piece
) -> tuple[int, Float32[np.ndarray, "n m"], Float32[np.ndarray, "n m"]]:
    """Read one arm: its first pixel on the grid, and flux and ivar with bad pixels at 0."""
    units = {}
    for part in ("WAVELENGTH", "FLUX", "IVAR"):
        unit = file.find(f"{arm}_{part}")
        if unit is None:
            raise SourceError(f"{file.path}: holds {file.contents}; expected {arm}_{part} beside {arm}_FLUX")
        units[part] = unit
    refuse_air(file.units[0].header)
    refuse_air(units["WAVELENGTH"].header)
    check_flux_unit(units["FLUX"].header.get("BUNIT"), units["FLUX"].place)
    wave = file.image(units["WAVELENGTH"])
    pixel = pixel_numbers(GRID.position(wave.astype(np.float64)), units["WAVELENGTH"].place, f"a range of {GRID}")
    if wave.ndim != 1 or not len(pixel) or (np.diff(pixel) != 1).any() or pixel[0] < 0 or pixel[-1] >= GRID.pixels:
        raise SourceError(f"{units['WAVELENGTH'].place}: {wave.shape} wavelengths; expected a range of {GRID}")
    mask = file.find(f"{arm}_MASK")
    for unit in [units["FLUX"], units["IVAR"]] + ([mask] if mask else []):
        shape = unit.image_shape
        if shape != (total, len(pixel)):
            raise SourceError(f"{unit.place}: {unit.name} is {shape}; expected {(total, len(pixel))} as FIBERMAP says")
    with np.errstate(over="ignore"):
        flux = file.image(units["FLUX"], piece.start, piece.stop).astype(np.float32, copy=False)
        ivar = file.image(units["IVAR"], piece.start, piece.stop).astype(np.float32, copy=False)
    bad = ~((ivar > 0) & np.isfinite(ivar) & np.isfinite(flux))
    if mask:
        bad |= file.image(mask, piece.start, piece.stop) != 0
    flux[bad], ivar[bad] = 0, 0
    return int(pixel[0]), flux, ivar


@dataclass(frozen=True)
class _Redshifts:
    """Redshifts by TARGETID in ascending order; a target with two that differ has none."""

    ids: Int64[np.ndarray, "targets"]
    z: Float64[np.ndarray, "targets"]
    zwarn: Int64[np.ndarray, "targets"]
    kind: Shaped[np.ndarray, "targets"]
    subkind: Shaped[np.ndarray, "targets"]

    def find(self, ids: Int64[np.ndarray, "n"]) -> tuple[Bool[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Say which of these targets are known, and where."""
        if not len(self.ids):
            return np.zeros(len(ids), bool), np.zeros(len(ids), np.int64)
        where = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return self.ids[where] == ids, where


def _redrock_of(path: Path) -> list[Path]:
    """Find the redrock file of a coadd: same folder, same name but for the first word."""
    if not path.name.startswith("coadd-"):
        return []
    stem = path.name.removeprefix("coadd-").removesuffix(".gz").removesuffix(".fits")
    names = (path.with_name(f"redrock-{stem}.fits"), path.with_name(f"redrock-{stem}.fits.gz"))
    return [name for name in names if name.is_file()][:1]


@lru_cache(maxsize=1)
def _keep_redshifts(path: Path, changed: int, size: int) -> _Redshifts:
    """Load a catalog once a process, and again only when the file changes: one serves all pieces of a survey."""
    return _load_redshifts(path)


def _load_redshifts(path: Path) -> _Redshifts:
    with FitsFile(path) as file:
        unit = file.find("REDSHIFTS") or file.find_table("targetid", "z")
        if unit is None:
            raise SourceError(f"{path}: holds {file.contents}; expected a table with TARGETID and Z")
        names = [name for name in ("zwarn", "spectype", "subtype", "zcat_primary") if name in unit.columns]
        table: dict[str, Any] = file.table(unit, ["targetid", "z", *names])
        if table["targetid"].dtype.kind not in "iu":
            raise SourceError(f"{unit.place}: TARGETID is stored as {table['targetid'].dtype}; expected integers")
        # A quasar catalog names no class in its rows: its table's name does.
        default = "QSO" if unit.name == "QSO_CAT" else ""
    if "zcat_primary" in table:
        # Of a target's several entries the survey itself has chosen one.
        table = {name: values[table["zcat_primary"]] for name, values in table.items()}
    ids = table["targetid"].astype(np.int64)
    order = np.argsort(ids, kind="stable")
    ids, z = ids[order], table["z"][order].astype(np.float64)
    first = np.ones(len(ids), bool)
    first[1:] = ids[1:] != ids[:-1]
    group = np.cumsum(first) - 1
    z_first = z[first][group]
    differs = np.zeros(int(first.sum()), bool)
    np.logical_or.at(differs, group, (z != z_first) & ~(np.isnan(z) & np.isnan(z_first)))
    z = z[first]
    z[differs] = np.nan
    kept = order[first]
    zwarn = table["zwarn"][kept].astype(np.int64) if "zwarn" in table else np.zeros(len(kept), np.int64)
    kind = table["spectype"][kept] if "spectype" in table else np.full(len(kept), default)
    subkind = table["subtype"][kept] if "subtype" in table else np.full(len(kept), "")
    return _Redshifts(ids[first], z, zwarn, kind, subkind)
