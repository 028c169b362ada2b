"""Work of `distspec ingest`, in workers: files counted; a shard read from the pieces of its files, prepared and written
whole; and the second look at it, by what only all rows could tell.

A file that cannot be read keeps its rows: they are set aside with the reason in the column `note`.
"""

from collections.abc import Iterator, Sequence
from gzip import BadGzipFile

import numpy as np
from jaxtyping import Int64, Shaped

from distspec import sources
from distspec.config import Experiment
from distspec.errors import ConfigError, SourceError, UnreachableError
from distspec.prepare.recipe import Recipe
from distspec.results.layout import output_of
from distspec.sources import Piece, Source
from distspec.spectra import Columns, Spectra, Status
from distspec.store import SpectraStore

__all__ = ["Counter", "Finisher", "Ingester", "counts_of"]

_BATCH = 512
"""Spectra prepared at a time; bounds memory whatever the size of files and shards."""


def counts_of(source: Source, names: list[str]) -> list[tuple[str, int]]:
    counts = []
    for name in names:
        try:
            counts.append((name, source.count(name)))
        except UnreachableError:
            raise
        except SourceError:
            # It takes one row, which will tell why.
            counts.append((name, -1))
    return counts


class Counter:
    """Counts the wanted spectra of groups of files; lives in a worker."""

    def __init__(self, experiment: Experiment) -> None:
        self._source = sources.build(experiment.ingest.source, experiment.seed, output_of(experiment))

    def __call__(self, names: list[str]) -> list[tuple[str, int]]:
        return counts_of(self._source, names)


class Ingester:
    """Reads, prepares and writes one shard; lives in a worker."""

    def __init__(self, experiment: Experiment, path: str) -> None:
        self._source = sources.build(experiment.ingest.source, experiment.seed, output_of(experiment))
        self._recipe = Recipe(experiment.ingest.prepare, self._source.grid)
        self._store = SpectraStore.open(path, write=True)
        self._fields = {
            name.removeprefix("columns/"): field
            for name, field in self._store.base.fields.items()
            if name.startswith("columns/")
        }

    def __call__(self, item: tuple[int, list[Piece]]) -> int:
        return self.without(item, (), "")

    def attempt(self, item: tuple[int, list[Piece]], start: int, stop: int) -> None:
        """Read and prepare some rows of a shard and keep nothing."""
        shard, pieces = item
        first, _ = self._store.base.bounds(shard)
        for _ in self._prepared([(piece, "") for piece in _part(pieces, start - first, stop - first)]):
            pass

    def without(self, item: tuple[int, list[Piece]], lost: Sequence[int], why: str) -> int:
        """Write a shard; some rows are not read but set aside with the reason."""
        shard, pieces = item
        start, stop = self._store.base.bounds(shard)
        parts: list[tuple[Piece, str]] = []
        done = 0
        for row in (*lost, stop):
            parts += [(piece, "") for piece in _part(pieces, done, row - start)]
            parts += [(piece, why) for piece in _part(pieces, row - start, min(row - start + 1, stop - start))]
            done = row - start + 1
        flux, ivar = np.empty((2, stop - start, self._store.grid.pixels), np.float32)
        tables: list[Columns] = []
        done = 0
        for spectra, columns in self._prepared(parts):
            flux[done : done + len(spectra)], ivar[done : done + len(spectra)] = spectra.flux, spectra.ivar
            tables.append(columns)
            done += len(spectra)
        columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        rows = np.arange(start, stop, dtype=np.int64)
        self._store.base.give_up(shard, lost, why)
        self._store.write(shard, Spectra(rows, flux, ivar, self._store.grid), columns)
        return shard

    def _prepared(self, parts: list[tuple[Piece, str]]) -> Iterator[tuple[Spectra, Columns]]:
        """Read piece by piece, but those with a reason not to, and prepare in batches."""
        read: list[tuple[Spectra, Columns]] = []
        unreachable: dict[str, SourceError] = {}
        for piece, why in parts:
            for start in range(piece.start, piece.stop, _BATCH):
                part = Piece(piece.name, start, min(start + _BATCH, piece.stop), piece.counted)
                read.append(self._nothing(part, why) if why else self._read(part, unreachable))
                if sum(len(spectra) for spectra, _ in read) >= _BATCH:
                    yield self._prepare(read)
                    read = []
        names = {piece.name for piece, _ in parts}
        if len(names) > 1 and unreachable.keys() == names:
            # Not one bad file but a disk that is gone: to set all aside would make that final.
            first = unreachable[parts[0][0].name]
            raise SourceError(f"none of {len(names)} files can be reached; the first: {first}")
        if read:
            yield self._prepare(read)

    def _read(self, piece: Piece, unreachable: dict[str, SourceError]) -> tuple[Spectra, Columns]:
        try:
            if not piece.counted:
                self._source.count(piece.name)
                raise SourceError(f"{piece.name}: could not be counted when it was listed; touch it, and ingest again")
            spectra, columns = self._source.read(piece)
        except UnreachableError:
            raise  # to set aside what could not be reached would make that final
        except SourceError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, BadGzipFile):
                unreachable[piece.name] = error
            return self._nothing(piece, str(error))
        return spectra, _notes(piece, "") | columns

    def _nothing(self, piece: Piece, why: str) -> tuple[Spectra, Columns]:
        """Stand in for spectra that are not read."""
        count, grid = len(piece), self._source.grid
        blank = np.zeros((count, grid.pixels), np.float32)
        notes = _notes(piece, why)
        made = {*Recipe.COLUMNS, *notes}
        columns = {name: self._blank(name, count) for name in self._fields if name not in made}
        columns |= self._source.identify(piece)
        columns["status"] = np.full(count, int(Status.UNREADABLE), np.int32)
        return Spectra(np.arange(piece.start, piece.stop, dtype=np.int64), blank, blank, grid), notes | columns

    def _blank(self, name: str, count: int) -> Shaped[np.ndarray, "n ..."]:
        """Fill a column for spectra of which nothing is known."""
        dtype, shape = self._fields[name]
        if dtype == "string":
            return np.full((count, *shape), "")
        kind = np.dtype(dtype)
        return np.full((count, *shape), np.nan if kind.kind == "f" else 0, kind)

    def _prepare(self, read: list[tuple[Spectra, Columns]]) -> tuple[Spectra, Columns]:
        names = {name for _, table in read for name in table}
        odd = names ^ set.intersection(*(set(table) for _, table in read))
        if odd:
            raise ConfigError(f"files of this source differ in their columns: {', '.join(sorted(odd))}")
        joined, columns = read[0]
        if len(read) > 1:
            joined = Spectra(
                np.concatenate([spectra.rows for spectra, _ in read]),
                np.concatenate([spectra.flux for spectra, _ in read]),
                np.concatenate([spectra.ivar for spectra, _ in read]),
                self._source.grid,
            )
            columns = {name: np.concatenate([table[name] for _, table in read]) for name in columns}
        spectra, prepared = self._recipe(joined, columns)
        # Of what cannot be read nothing else is known, so nothing else is held against it.
        unreadable = (prepared["status"] & Status.UNREADABLE) != 0
        prepared["status"] = np.where(unreadable, int(Status.UNREADABLE), prepared["status"]).astype(np.int32)
        missing = set(self._fields) ^ set(prepared)
        if missing:
            raise ConfigError(f"files of this source differ in their columns: {', '.join(sorted(missing))}")
        return spectra, prepared


def _notes(piece: Piece, note: str) -> Columns:
    return {"file": np.full(len(piece), piece.name), "note": np.full(len(piece), note)}


def _part(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[Piece]:
    """Give what holds the spectra `start` to `stop` of some pieces, counted through all of them."""
    begin = 0
    for piece in pieces:
        low, high = max(start - begin, 0), min(stop - begin, len(piece))
        if low < high:
            yield Piece(piece.name, piece.start + low, piece.start + high, piece.counted)
        begin += len(piece)


class Finisher:
    """Marks and scales the rows of one shard by what all rows told; lives in a worker."""

    def __init__(self, path: str) -> None:
        self._store = SpectraStore.open(path, write=True)
        self._layer = self._store.sample_layer()

    def __call__(self, item: tuple[int, Int64[np.ndarray, "m"]]) -> int:
        """Write the marks and factors of a shard; the item gives the shard and its rows that are duplicates."""
        shard, duplicates = item
        start, stop = self._store.base.bounds(shard)
        base = self._store.base.read("columns/status", start, stop)
        status = base.copy()
        status[duplicates - start] |= np.int32(Status.DUPLICATE)
        factor = np.ones(stop - start, np.float32)
        statistics = self._store.statistics
        if statistics is not None:
            factor = statistics.factor(self._store.read(shard, frozen=False))
            status = statistics.status(self._store.base.read("columns/snr", start, stop), status, factor)
        self._layer.write(shard, {"status": (status & ~base).astype(np.int32), "factor": factor})
        return shard
