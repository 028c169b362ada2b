"""`distspec ingest`: survey files -> store.

The driver lists what there is, lets workers count what must be opened, and hands out shards; each worker reads the
pieces of its shard, prepares them and writes the shard whole. Files that are new since an earlier ingest become a
further part of the store. A file that cannot be read keeps its rows: they are set aside with the reason in the column
`note`. When all rows are there, a second look settles what only all of them can tell.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from gzip import BadGzipFile
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from distspec.config import Experiment, differences, digest
from distspec.errors import ConfigError, DistspecWarning, LayoutError, SourceError
from distspec.layout import ledger_path, recipe_digest, store_digest, store_identity, store_path
from distspec.ledger import write_ledger
from distspec.plan import Rows, new_files, require_rows
from distspec.prepare import Recipe
from distspec.runtime import connect, dask_scheduler, map_shards, workers_of
from distspec.runtime_threads import one_thread
from distspec.sample import check as check_sample
from distspec.second_look import Looker, duplicate_rows, statistics_of
from distspec.sources import Piece, Source, open_source
from distspec.spectra import Columns, Spectra, Status, first_reasons
from distspec.store import Fields, Inventory, SpectraStore, field_of
from distspec.tracking import Run
from distspec.values import join_values, require_values

__all__ = ["ingest"]

_BATCH = 512
"""Spectra prepared at a time; bounds memory whatever the size of files and shards."""

_GROUP = 256
"""Files that one worker counts at a time."""

_FEW = 8
"""So many files are counted at once by the driver: less than the start of a worker takes."""


@one_thread()
def ingest(experiment: Experiment) -> SpectraStore:
    """Make, finish or extend the store of an experiment.

    Raises:
        SourceError: there is nothing to read, or not a single file can be read.
        LayoutError: the output holds a store of other settings, or files have changed since.
        StoreError: the output cannot be written.
    """
    check_sample(experiment.ingest.prepare)
    require_values(experiment.ingest.values)
    store = _ingest(experiment)
    join_values(experiment.ingest.values, store)
    return store


def _ingest(experiment: Experiment) -> SpectraStore:
    source = open_source(experiment.ingest.source, experiment.seed, Path(experiment.output))
    store = _known_store(experiment)
    try:
        listed = source.files()
    except SourceError as error:
        if store is None or not store.finished:
            raise
        warnings.warn(f"{error}; the store is used as it is", DistspecWarning, stacklevel=2)
        return store
    known = None if store is None else store.inventory()
    counts = partial(_count, experiment, source)
    new = new_files(listed, known, store_path(experiment), counts, partial(_is_lost, store, known))
    if store is None:
        store = _create(experiment, source, new)
    elif len(new):
        # Files without a wanted spectrum are remembered too: they need not be opened again.
        store.extend(new.rows, new)
    if not store.finished:
        _fill(experiment, store)
    elif not ledger_path(experiment).is_file():
        write_ledger(store, source.missing(), ledger_path(experiment))
    return store


def _is_lost(store: SpectraStore | None, known: Inventory | None, index: int) -> bool:
    """Tell whether nothing of a file, by its place in the inventory, could be read."""
    assert store is not None and known is not None
    start, stop = Rows(known).of_file(index)
    rows = np.arange(start, stop)
    pending = [store.base.bounds(shard) for shard in store.pending()]
    if any(start < high and low < stop for low, high in pending):
        return False
    return bool(len(rows) and (store.base.take("columns/status", rows) & Status.UNREADABLE).all())


def _known_store(experiment: Experiment) -> SpectraStore | None:
    """Open the store that is there, if any, and refuse it where it was made by other settings."""
    path = store_path(experiment)
    if not SpectraStore.is_finished(path):
        return None
    store = SpectraStore.open(path, write=True)
    _warn_of_catalog(experiment, store)
    differs = differences(store.settings["identity"], store_identity(experiment))
    if differs:
        raise LayoutError(
            f"{path} was made by other settings: {'; '.join(differs)}; choose another output, or remove the store"
        )
    return store


def _create(experiment: Experiment, source: Source, inventory: Inventory) -> SpectraStore:
    require_rows(inventory)
    settings = experiment.ingest
    recipe = Recipe(settings.prepare, source.grid)
    resolved = settings.model_dump(mode="json", exclude_none=True)
    return SpectraStore.create(
        store_path(experiment),
        grid=recipe.grid,
        frame=settings.prepare.frame,
        rows=inventory.rows,
        shard_rows=settings.shard_rows,
        chunk_rows=settings.chunk_rows,
        columns=_learn_columns(source, recipe, inventory),
        digest=store_digest(experiment, inventory),
        recipe=recipe_digest(experiment),
        settings=resolved | {"identity": store_identity(experiment), "catalog": _catalog_stamp(experiment)},
        inventory=inventory,
    )


def _catalog_stamp(experiment: Experiment) -> list[int]:
    """Size and time of the source's catalogue; empty where there is none."""
    catalog = getattr(experiment.ingest.source, "catalog", None)
    root = getattr(experiment.ingest.source, "path", "")
    places = [] if catalog is None else [Path(catalog), Path(root) / catalog]
    found = next((place.stat() for place in places if place.is_file()), None)
    return [] if found is None else [found.st_size, found.st_mtime_ns]


def _warn_of_catalog(experiment: Experiment, store: SpectraStore) -> None:
    if _catalog_stamp(experiment) != store.settings.get("catalog", []):
        warnings.warn(
            f"the catalogue is not the one that {store.path} was made with: files that are in the store keep the "
            "spectra that it selected then; choose another output to select anew",
            DistspecWarning,
            stacklevel=2,
        )


def _fill(experiment: Experiment, store: SpectraStore) -> None:
    """Write the pending shards, take the second look, and say what became of everything."""
    settings = experiment.runtime
    connect(settings, experiment.train.workers)
    # Each extension is a run of its own; a run that was interrupted is gone on with.
    key = digest(store.digest, list(store.base.parts))
    with Run(experiment, "ingest", key, {"store": store.digest}) as run:
        rows = Rows(store.inventory())
        items = [(shard, rows.pieces(*store.base.bounds(shard))) for shard in store.pending()]
        for _ in map_shards(Ingester, (experiment, store.path), items, settings, "ingest"):
            pass
        source = open_source(experiment.ingest.source, experiment.seed, Path(experiment.output))
        missing = source.missing()
        try:
            _second_look(experiment, store)
        except ConfigError as error:
            # Why so few are left is what the user needs to know now.
            lines = write_ledger(store, missing, ledger_path(experiment))
            raise ConfigError(f"{error} ({lines} are set aside; {ledger_path(experiment)} says why)") from error
        write_ledger(store, missing, ledger_path(experiment))
        status = store.status()
        run.metrics({"spectra": len(status), "set_aside": int((status != 0).sum()), "missing": len(missing)})
        run.metrics({f"set_aside_{reason.lower()}": count for reason, count in first_reasons(status).items()})
        run.text(repr(store), "store.txt")
        # Last: until now a run that was killed does all of this again.
        store.looked()


def _second_look(experiment: Experiment, store: SpectraStore) -> None:
    duplicates = np.zeros(0, np.int64)
    if experiment.ingest.prepare.cuts.duplicates:
        duplicates = duplicate_rows(store)
    if not store.is_frozen:
        scheduler, parallel = dask_scheduler(), workers_of(experiment.runtime, store.shards)
        store.freeze(statistics_of(experiment, store, duplicates, scheduler, parallel))
    if store.statistics is not None or duplicates.size or store.has_look:
        pending = store.look().pending()
        cuts = [store.base.bounds(shard) for shard in pending]
        items = [
            (shard, duplicates[np.searchsorted(duplicates, start) : np.searchsorted(duplicates, stop)])
            for shard, (start, stop) in zip(pending, cuts, strict=True)
        ]
        for _ in map_shards(Looker, (store.path,), items, experiment.runtime, "look"):
            pass
    store.reload()


def _count(experiment: Experiment, source: Source, names: list[str]) -> Iterator[tuple[str, int]]:
    """Count the wanted spectra of files: in workers, unless there are few."""
    if len(names) <= _FEW:
        yield from _counts(source, names)
        return
    connect(experiment.runtime, experiment.train.workers)
    groups = [names[start : start + _GROUP] for start in range(0, len(names), _GROUP)]
    for found in map_shards(Counter, (experiment,), groups, experiment.runtime, "count"):
        yield from found


def _counts(source: Source, names: list[str]) -> list[tuple[str, int]]:
    counts = []
    for name in names:
        try:
            counts.append((name, source.count(name)))
        except SourceError:
            # It takes one row, which will tell why.
            counts.append((name, -1))
    return counts


class Counter:
    """Counts the wanted spectra of groups of files; lives in a worker."""

    def __init__(self, experiment: Experiment) -> None:
        self._source = open_source(experiment.ingest.source, experiment.seed, Path(experiment.output))

    def __call__(self, names: list[str]) -> list[tuple[str, int]]:
        return _counts(self._source, names)


def _learn_columns(source: Source, recipe: Recipe, inventory: Inventory) -> Fields:
    """Find the columns of the store by preparing the first spectrum that can be read."""
    failures = []
    for name, count in zip(inventory.names, inventory.counts, strict=True):
        if not count:
            continue
        try:
            spectra, columns = source.read(Piece(name, 0, 1))
        except SourceError as error:
            failures.append(error)
            continue
        _, columns = recipe(spectra, columns)
        text = np.array([""])
        return {key: field_of(values) for key, values in ({"file": text, "note": text} | columns).items()}
    if len(failures) == 1:
        raise failures[0]
    raise SourceError(f"none of {len(failures)} files can be read; the first: {failures[0]}")


class Ingester:
    """Reads, prepares and writes one shard; lives in a worker."""

    def __init__(self, experiment: Experiment, path: str) -> None:
        self._source = open_source(experiment.ingest.source, experiment.seed, Path(experiment.output))
        self._recipe = Recipe(experiment.ingest.prepare, self._source.grid)
        self._store = SpectraStore.open(path, write=True)
        self._fields = {
            name.removeprefix("columns/"): field
            for name, field in self._store.base.fields.items()
            if name.startswith("columns/")
        }

    def __call__(self, item: tuple[int, list[Piece]]) -> int:
        shard, pieces = item
        start, stop = self._store.base.bounds(shard)
        flux, ivar = np.empty((2, stop - start, self._store.grid.pixels), np.float32)
        tables: list[Columns] = []
        done = 0
        for spectra, columns in self._prepared(pieces):
            flux[done : done + len(spectra)], ivar[done : done + len(spectra)] = spectra.flux, spectra.ivar
            tables.append(columns)
            done += len(spectra)
        columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        rows = np.arange(start, stop, dtype=np.int64)
        self._store.write(shard, Spectra(rows, flux, ivar, self._store.grid), columns)
        return shard

    def _prepared(self, pieces: list[Piece]) -> Iterator[tuple[Spectra, Columns]]:
        """Read piece by piece and prepare in batches."""
        read: list[tuple[Spectra, Columns]] = []
        unreachable: dict[str, SourceError] = {}
        for piece in pieces:
            for start in range(piece.start, piece.stop, _BATCH):
                part = Piece(piece.name, start, min(start + _BATCH, piece.stop), piece.counted)
                read.append(self._read(part, unreachable))
                if sum(len(spectra) for spectra, _ in read) >= _BATCH:
                    yield self._prepare(read)
                    read = []
        names = {piece.name for piece in pieces}
        if len(names) > 1 and unreachable.keys() == names:
            # Not one bad file but a disk that is gone: to set all aside would make that final.
            first = unreachable[pieces[0].name]
            raise SourceError(f"none of {len(names)} files can be reached; the first: {first}")
        if read:
            yield self._prepare(read)

    def _read(self, piece: Piece, unreachable: dict[str, SourceError]) -> tuple[Spectra, Columns]:
        count = len(piece)
        notes = {"file": np.full(count, piece.name), "note": np.full(count, "")}
        try:
            if not piece.counted:
                self._source.count(piece.name)
                raise SourceError(f"{piece.name}: could not be counted when it was listed; touch it, and ingest again")
            spectra, columns = self._source.read(piece)
        except SourceError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, BadGzipFile):
                unreachable[piece.name] = error
            grid = self._source.grid
            blank = np.zeros((count, grid.pixels), np.float32)
            spectra = Spectra(np.arange(piece.start, piece.stop, dtype=np.int64), blank, blank, grid)
            made = {*Recipe.COLUMNS, *notes}
            columns = {name: self._blank(name, count) for name in self._fields if name not in made}
            columns |= self._source.identify(piece)
            columns["status"] = np.full(count, int(Status.UNREADABLE), np.int32)
            notes["note"] = np.full(count, str(error))
        return spectra, notes | columns

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
