"""Spectra in any format that `specutils` reads, brought to one grid.

For formats that no reader here knows: each spectrum is converted to Å and, where its flux has a physical unit, to 1e-17
erg/s/cm²/Å, then rebinned. That costs far more than the bulk readers, and of the correlations that it makes between
neighboring pixels only the diagonal is kept. A spectrum that cannot be converted without guessing is set aside.
"""

import tempfile
import warnings
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float64

from distspec.config import Specutils
from distspec.errors import ConfigError, SourceError, UnreachableError, extra
from distspec.sources import Entry, Piece
from distspec.sources.catalogs.catalog import locate
from distspec.sources.files.fits import FitsFile
from distspec.sources.files.places import Files
from distspec.sources.specutils.objects import (
    UnusableError,
    cards_of,
    plain_spectrum,
    rebin_spectra,
    redshift_of,
    single_spectra,
)
from distspec.spectra import Columns, Spectra, Status, WaveGrid

__all__ = ["SpecutilsFiles"]

_MEDIUM = ("VACUUM", "AIRORVAC")


class SpecutilsFiles:
    """Files that `specutils` reads, each with one or more spectra.

    Columns beyond those of every source: `note` (text), why a spectrum is set aside. `id` is text: the catalog's, else
    the file's name, with `#` and a number where a file holds several. Rows of the catalog that name the same file
    belong to its spectra in their order.

    Arguments:
        settings: where the files lie, and the grid that they are brought to.
    """

    def __init__(self, settings: Specutils) -> None:
        if settings.first >= settings.last:
            raise ConfigError(f"source.first = {settings.first:g}, last = {settings.last:g}; expected first < last")
        self.settings = settings
        self.grid = WaveGrid.between(settings.scale, settings.first, settings.last, settings.pixels)
        self._files = Files(settings.path, "spectra that specutils reads")
        self._loaded: tuple[str, list[Any]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what is loaded.
        return SpecutilsFiles, (self.settings,)

    def __repr__(self) -> str:
        return f"SpecutilsFiles({self.settings.path!r})"

    def files(self) -> list[Entry]:
        """List all files by name, but for hidden ones and the catalog; none is opened.

        Raises:
            SourceError: there is no file, or the catalog cannot be used.
        """
        listed = self._files.list(("",))
        if self.settings.catalog is None:
            return listed
        _ = self._catalog
        catalog = Path(locate(self.settings.catalog, self.settings.path)).resolve()
        return [entry for entry in listed if self._files.local(entry.name).resolve() != catalog]

    def count(self, name: str) -> int:
        """Count the spectra of a file, for which specutils must read it.

        Raises:
            SourceError: it cannot be read.
        """
        return len(self._load(name))

    def missing(self) -> list[str]:
        """Name the files of the catalog that are not there."""
        listed = {path for entry in self._files.list(("",)) for path in (entry.name, PurePosixPath(entry.name).name)}
        return sorted(set(self._catalog) - listed)

    def identify(self, piece: Piece) -> Columns:
        """Give what the catalog says of spectra that cannot be read."""
        names = self._catalog_rows(piece.name)
        count = max(piece.stop, len(names))
        return {
            key: column[piece.start : piece.stop] for key, column in self._columns(piece.name, [None] * count).items()
        }

    def read(self, piece: Piece) -> tuple[Spectra, Columns]:
        """Read some spectra of one file and bring them to the grid.

        Raises:
            SourceError: specutils cannot read the file, or the catalog has another number of spectra in it.
        """
        items = self._load(piece.name)
        headers = _headers(self._files, piece.name)
        stated = len(self._catalog_rows(piece.name))
        if stated not in (0, len(items)):
            raise SourceError(
                f"{self._files.place(piece.name)}: {len(items)} spectra; expected {stated} as in the catalog"
            )
        columns = {key: column[piece.start : piece.stop] for key, column in self._columns(piece.name, items).items()}
        flux, ivar = np.zeros((2, len(piece), self.grid.pixels), np.float32)
        notes = [""] * len(piece)
        for row, item in enumerate(items[piece.start : piece.stop]):
            try:
                plain = plain_spectrum(item, self.settings.vacuum, headers)
                flux[row : row + 1], ivar[row : row + 1] = rebin_spectra([plain], self.grid)
            except UnusableError as error:
                notes[row] = f"{self._files.place(piece.name)} spectrum {piece.start + row}: {error}"
        unusable = np.array([bool(note) for note in notes])
        status = np.where(np.isfinite(columns["z"]), 0, int(Status.NO_REDSHIFT))
        status |= np.where(unusable, int(Status.UNREADABLE), np.where(ivar.any(axis=1), 0, int(Status.DEAD)))
        rows = np.arange(piece.start, piece.stop, dtype=np.int64)
        return Spectra(rows, flux, ivar, self.grid), columns | {
            "status": status.astype(np.int32),
            "note": np.array(notes, np.str_),
        }

    def _load(self, name: str) -> list[Any]:
        """Read all spectra of a file, or give those of the file that was read last."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = name, _read_file(self._files, name, self.settings.format)
        return self._loaded[1]

    @cached_property
    def _catalog(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of the catalog by file."""
        if self.settings.catalog is None:
            return {}
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in _read_catalog(locate(self.settings.catalog, self.settings.path)):
            rows.setdefault(row["file"], []).append(row)
        return rows

    def _catalog_rows(self, name: str) -> list[dict[str, Any]]:
        return self._catalog.get(name) or self._catalog.get(PurePosixPath(name).name) or []

    def _columns(self, name: str, items: list[Any]) -> Columns:
        """Give the catalog values of all spectra of a file; those of the catalog come first."""
        stated = self._catalog_rows(name) or [{}] * len(items)
        cards = [{} if item is None else cards_of(item) for item in items]
        own = [name if len(items) == 1 else f"{name}#{index}" for index in range(len(items))]

        def numbers(key: str, others: list[Any]) -> Float64[np.ndarray, "n"]:
            return np.array([_number(row.get(key), other) for row, other in zip(stated, others, strict=True)])

        def text(key: str) -> list[str]:
            return [str(row.get(key) or "").strip() for row in stated]

        return {
            "id": np.array([given or other for given, other in zip(text("id"), own, strict=True)]),
            "ra": numbers("ra", [card.get("RA") for card in cards]),
            "dec": numbers("dec", [card.get("DEC") for card in cards]),
            "z": numbers("z", [None if item is None else redshift_of(item) for item in items]),
            "zwarn": np.zeros(len(items), np.int64),
            "class": np.array(text("class"), np.str_),
            "subclass": np.array(text("subclass"), np.str_),
            "ebv": np.full(len(items), np.nan, np.float32),
        }


def _number(*values: Any) -> float:
    """Give the first of these that is a finite number, else NaN."""
    for value in values:
        try:
            if value is not None and np.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError):
            continue
    return float("nan")


def _read_file(files: Files, name: str, form: str | None) -> list[Any]:
    with extra("specutils"):
        from specutils import Spectrum, SpectrumList

    place = files.place(name)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # Loaders warn of units and headers; what matters of these is checked here.
        warnings.simplefilter("ignore")
        try:
            path = files.local(name)
            if not path.is_file():
                # Loaders tell formats by name and want a path.
                with files.open(name) as file:
                    path = Path(folder) / PurePosixPath(name).name
                    path.write_bytes(file.read())
        except UnreachableError:
            raise
        except OSError as error:
            raise SourceError(f"{place}: {error.strerror or error}; expected a readable file") from error
        failures = []
        for kind in (SpectrumList, Spectrum):
            try:
                return list(single_spectra(kind.read(str(path), format=form)))
            except Exception as error:  # loaders raise whatever they meet
                failures.append((str(error).strip().splitlines() or [type(error).__name__])[0])
    raise SourceError(f"{place}: specutils cannot read it ({failures[0]}); expected another file or source.format")


def _headers(files: Files, name: str) -> list[dict[str, Any]]:
    """Give what all headers of a FITS file say of the medium: loaders keep only one of them, or none."""
    try:
        with FitsFile(files, name) as file:
            headers = [(unit.header, unit.header.keys()) for unit in file.units]
        wanted = [
            (header, [key for key in keys if key in _MEDIUM or key.startswith("CTYPE")]) for header, keys in headers
        ]
        return [{key: header.get(key) for key in keys} for header, keys in wanted]
    except SourceError:
        return []


def _read_catalog(path: str) -> list[dict[str, Any]]:
    """Read a table with `file`, and perhaps `id`, `z`, `ra`, `dec`, `class`, `subclass`, in any case of letters.

    Raises:
        SourceError: it cannot be read, has no column `file`, or ids that are not exact.
    """
    from astropy.table import Table

    names = ("file", "id", "z", "ra", "dec", "class", "subclass")
    try:
        if path.lower().endswith((".parquet", ".parq", ".pq")):
            table = _read_parquet(path)
        else:
            # Text stays text in separated files, so that no id becomes a float on the way.
            ending = PurePosixPath(path).name.lower().removesuffix(".gz")
            plain = {"format": "ascii.csv", "converters": {"*": [str]}} if ending.endswith(".csv") else {}
            table = {key.lower(): column for key, column in Table.read(path, **plain).columns.items()}
    except Exception as error:  # readers raise whatever they meet
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{path}: cannot be read ({text}); expected a table with file, id and z") from error
    if "file" not in table:
        raise SourceError(f"{path}: no column file; expected file, id and z")
    columns = {
        name: [None if np.ma.is_masked(value) else value for value in table[name]] for name in names if name in table
    }
    if any(isinstance(value, float | np.floating) for value in columns.get("id", [])):
        raise SourceError(f"{path}: ids are floats, which lose digits; expected integers or text")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [row | {"file": str(row["file"]).strip()} for row in rows]


def _read_parquet(path: str) -> dict[str, Any]:
    # Imported here: not needed for any other catalog.
    from distspec.sources.files.parquet import open_parquet

    folder, _, name = path.rpartition("/")
    with open_parquet(Files(folder or ".", "a catalog"), name) as file:
        table = file.read()
    return {key.lower(): table[key].to_pylist() for key in table.column_names}
