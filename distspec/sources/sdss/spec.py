"""SDSS, BOSS and eBOSS `spec` files, lite or full: one spectrum a file, on the surveys' common logarithmic grid.

The tables are found by their columns, since their names and order differ between releases. Pixels are masked by the
survey's inverse variance and by those bits of the AND mask that say that a pixel is bad. With a catalog, files are
wanted or not by the plate, MJD and fiber in their names; one whose name does not say is opened.

References:
    Data model, https://data.sdss.org/datamodel/files/BOSS_SPECTRO_REDUX/RUN2D/spectra/PLATE4/spec.html
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from distspec.addresses import Place
from distspec.config import Sdss
from distspec.errors import ConfigError, SourceError
from distspec.sources import Entry, Piece, Source
from distspec.sources.catalogs.catalog import Catalog, locate
from distspec.sources.conventions import check_flux_unit, refuse_air
from distspec.sources.files.fits import FitsFile, Unit
from distspec.sources.files.places import Files
from distspec.sources.sdss.conventions import FIRST, GRID, KEYS, STEP, absent, check_vacuum, identities, place, statuses
from distspec.sources.sdss.plates import PLATE_NAME, SdssPlates
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["SdssFiles", "SdssSpectra", "open_sdss"]

_SPEC_NAME = re.compile(r"spec-(\d+)-(\d+)-(\d+)\.fits(?:\.gz)?", re.IGNORECASE)

# What else a tree of reductions holds.
_COMPANION = re.compile(r"sp[A-Z][A-Za-z]*-|specObj-|platelist|plates-|photo(Pos|Plate|Match)")

# A(u, g, r, i, z) / E(B-V) that SDSS catalogs were made with: Schlegel et al. (1998), Schlafly & Finkbeiner (2011).
_EXTINCTIONS = np.array([[5.155, 3.793, 2.751, 2.086, 1.479], [4.239, 3.303, 2.285, 1.698, 1.263]])


def open_sdss(settings: Sdss, scratch: Place) -> Source:
    """Give the source for the layout that the settings name."""
    if settings.layout == "plate":
        return SdssPlates(settings, scratch)
    if settings.layout == "spec":
        return SdssSpectra(settings, scratch)
    return SdssFiles(SdssSpectra(settings, scratch), SdssPlates(settings, scratch))


@dataclass(frozen=True)
class SdssFiles:
    """Either layout, as the files' names tell; a tree with both is refused, since it holds each spectrum twice."""

    spectra: "SdssSpectra"
    plates: SdssPlates

    @property
    def grid(self) -> WaveGrid:
        """Observed-frame grid of all SDSS spectra."""
        return GRID

    def files(self) -> list[Entry]:
        """List the files of the layout that is there; see `Source`.

        Raises:
            ConfigError: there are plates and `spec` files.
        """
        return self._found.files()

    def count(self, name: str) -> int:
        """Count the wanted spectra of a file; see `Source`."""
        return self._of(name).count(name)

    def missing(self) -> list[str]:
        """Name what the catalog wants and no file holds; see `Source`."""
        return self._found.missing()

    def identify(self, piece: Piece) -> Columns:
        """Give what is known of spectra that cannot be read; see `Source`."""
        return self._of(piece.name).identify(piece)

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read a piece; see `Source`."""
        return self._of(piece.name).read(piece)

    def _of(self, name: str) -> "SdssSpectra | SdssPlates":
        return self.plates if PLATE_NAME.fullmatch(PurePosixPath(name).name) else self.spectra

    @property
    def _found(self) -> "SdssSpectra | SdssPlates":
        names = [PurePosixPath(entry.name).name for entry in self.spectra.listed]
        plates = sum(PLATE_NAME.fullmatch(name) is not None for name in names)
        spectra = sum(_SPEC_NAME.fullmatch(name) is not None for name in names)
        if plates and spectra:
            raise ConfigError(
                f"{self.spectra.settings.path}: {plates} spPlate and {spectra} spec files, which hold the same spectra "
                'if they are of the same plates; set layout = "plate" or layout = "spec"'
            )
        return self.plates if plates else self.spectra


@dataclass(frozen=True)
class SdssSpectra:
    """A file, folder, archive or bucket of SDSS `spec` files; each file is one spectrum.

    Columns beyond those of every source: `plate`, `mjd`, `fiber` (int64, -1 where the file does not say). `id` is the
    survey's SPECOBJID in decimal digits, as text, for it can exceed int64. `ebv` is known to eBOSS catalogs only.
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
        """List the wanted files by name; none is opened.

        Raises:
            SourceError: the path does not exist or holds no FITS file, or the catalog cannot be used.
            ConfigError: a condition on the catalog does not suit it.
        """
        entries = [entry for entry in self.listed if not self._is_other(entry)]
        if not entries:
            raise SourceError(f"no spec file in {self.settings.path!r}; expected {self._files.expected}")
        if self._catalog is None:
            return [replace(entry, count=1) for entry in entries]
        wanted, _ = self._catalog.find(*_numbers([entry.name for entry in entries]))
        named = [_SPEC_NAME.fullmatch(PurePosixPath(entry.name).name) is not None for entry in entries]
        return [
            replace(entry, count=1 if is_named else None)
            for entry, is_named, is_wanted in zip(entries, named, wanted, strict=True)
            if is_wanted or not is_named
        ]

    def count(self, name: str) -> int:
        """Say whether a file is wanted (1) or not (0), by its catalog row.

        Raises:
            SourceError: the file is damaged or is not an SDSS spec file.
        """
        if self._catalog is None:
            return 1
        with FitsFile(self._files, name) as file:
            columns = _read_catalog(file)
        found, _ = self._catalog.find(columns["plate"], columns["mjd"], columns["fiber"])
        return int(found[0])

    def missing(self) -> list[str]:
        """Name the spectra that the catalog wants and no file is named for."""
        if self._catalog is None:
            return []
        return absent(self._catalog, _numbers([entry.name for entry in self.listed if not self._is_other(entry)]))

    def identify(self, piece: Piece) -> Columns:
        """Give nothing: what identifies the spectrum stands behind its flux."""
        return {}

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read one file: a batch of one spectrum and its catalog row.

        Raises:
            SourceError: the file is damaged, is not an SDSS spec file or is not in vacuum.
        """
        with FitsFile(self._files, piece.name) as file:
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
        return Spectra(rows, flux, ivar, GRID), columns

    @cached_property
    def listed(self) -> list[Entry]:
        """All FITS files that there are; listed once, for there may be millions."""
        return self._files.list()

    @cached_property
    def _files(self) -> Files:
        return Files(self.settings.path, "an SDSS spec file or a folder of them")

    @cached_property
    def _catalog(self) -> Catalog | None:
        if self.settings.catalog is None:
            return None
        path = locate(self.settings.catalog, self.settings.path)
        return Catalog.build(path, KEYS, (), self.settings.wanted, self.scratch)

    def _is_other(self, entry: Entry) -> bool:
        name = PurePosixPath(entry.name).name
        if len(self.listed) == 1 and PurePosixPath(self.settings.path).name == name:
            return False  # named by itself
        return _COMPANION.match(name) is not None or name == Path(self.settings.catalog or "").name


def _numbers(names: list[str]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Give plate, MJD and fiber of files by their names; -1 where a name does not say."""
    matches = (_SPEC_NAME.fullmatch(PurePosixPath(name).name) for name in names)
    found = [(-1, -1, -1) if match is None else (int(match[1]), int(match[2]), int(match[3])) for match in matches]
    plate, mjd, fiber = np.array(found, np.int64).reshape(-1, 3).T
    return plate, mjd, fiber


def _read_pixels(
    file: FitsFile, coadd: Unit
) -> tuple[Float32[np.ndarray, "1 pixels"], Float32[np.ndarray, "1 pixels"]]:
    primary = file.units[0].header
    check_vacuum(primary)
    refuse_air(coadd.header)
    check_flux_unit(primary.get("BUNIT"), coadd.place)
    check_flux_unit(coadd.header.get(f"TUNIT{coadd.columns['flux'].number}"), coadd.place)
    table = file.table(coadd, ["flux", "ivar", "loglam", "and_mask"])
    position = (table["loglam"].astype(np.float64) - FIRST) / STEP
    flux, ivar, bits = table["flux"][None], table["ivar"][None], table["and_mask"][None]
    return place(position, flux, ivar, bits, coadd.place, "LOGLAM as log10(Å) in whole steps of 0.0001")


def _read_catalog(file: FitsFile) -> Columns:
    unit = next((u for u in file.units if {"z", "zwarning"} <= u.columns.keys()), None)
    if unit is None or unit.rows != 1:
        found = file.contents if unit is None else f"{unit.rows} catalog rows"
        raise SourceError(f"{file.path}: holds {found}; expected one catalog row with Z and ZWARNING")
    wanted = ["z", "zwarning", "class", "subclass"]
    types = ["objtype", "sourcetype", "targettype"]
    optional = ["specobjid", "plate", "mjd", "fiberid", "run2d", "plug_ra", "plug_dec", "ra", "dec", "extinction"]
    row = file.table(unit, wanted + [name for name in optional + types if name in unit.columns])
    primary = file.units[0].header

    def integer(column: str, key: str) -> Int64[np.ndarray, "1"]:
        value = row[column][0] if column in row else primary.get(key)
        return np.array([-1 if value is None else int(value)], np.int64)

    plate, mjd, fiber = integer("plate", "PLATEID"), integer("mjd", "MJD"), integer("fiberid", "FIBERID")
    run2d = str(row["run2d"][0] if "run2d" in row else primary.get("RUN2D") or "").strip()
    # PLUG_RA is where the fiber was; RA of an eBOSS row belongs to the matched image, if there is one.
    unknown = np.array([np.nan])
    ra, dec = row.get("plug_ra", row.get("ra", unknown)), row.get("plug_dec", row.get("dec", unknown))
    z, zwarn = row["z"].astype(np.float64), row["zwarning"].astype(np.int64)
    return {
        "id": identities(row.get("specobjid"), plate, mjd, fiber, run2d, unit.place),
        "ra": ra.astype(np.float64),
        "dec": dec.astype(np.float64),
        "z": np.where(np.isfinite(z), z, np.nan),
        "zwarn": zwarn,
        "class": row["class"].astype(np.str_),
        "subclass": row["subclass"].astype(np.str_),
        "ebv": np.array([_reddening(row["extinction"][0] if "extinction" in row else None)], np.float32),
        "status": statuses(z, zwarn, [row[name] for name in types if name in row and row[name].dtype.kind == "U"]),
        "plate": plate,
        "mjd": mjd,
        "fiber": fiber,
    }


def _reddening(extinction: Any) -> float:
    """Give E(B-V) from the catalog's extinctions in u, g, r, i, z; NaN where there are none of a known calibration."""
    if extinction is None or np.shape(extinction) != (5,) or not (np.asarray(extinction) > 0).all():
        return float("nan")
    reddening = np.asarray(extinction, np.float64) / _EXTINCTIONS
    agreement = np.ptp(reddening, axis=1) / reddening.mean(axis=1)
    best = int(agreement.argmin())
    return float(reddening[best].mean()) if agreement[best] < 1e-3 else float("nan")
