"""`distspec ingest`: survey files -> store.

The driver lists what there is and hands out shards; each worker reads the pieces of its shard, prepares them and writes
the shard whole. A file that cannot be read keeps its rows: they are set aside with the reason in the column `note`.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped

from distspec.config import Experiment
from distspec.errors import ConfigError, LayoutError, SourceError
from distspec.layout import recipe_digest, store_digest, store_path
from distspec.prepare import Recipe
from distspec.runtime import connect, map_shards
from distspec.sources import Piece, Source, open_source
from distspec.spectra import Columns, Spectra, Status, first_reasons
from distspec.store import Fields, SpectraStore, field_of
from distspec.tracking import Run

__all__ = ["ingest"]

_BATCH = 512
"""Spectra prepared at a time; bounds memory whatever the size of files and shards."""


def ingest(experiment: Experiment) -> SpectraStore:
    """Make or finish the store of an experiment.

    Raises:
        SourceError: there is nothing to read, or not a single file can be read.
        LayoutError: the output holds a store of other settings or files.
        StoreError: the output cannot be written.
    """
    settings = experiment.ingest
    source = open_source(settings.source, experiment.seed)
    plan = _cut(source.pieces(), settings.shard_rows)
    inventory = [(piece.name, piece.start, piece.stop) for shard in plan for piece in shard]
    name = store_digest(experiment, inventory)
    store = _open_or_create(experiment, source, plan, name)
    pending = store.pending()
    if not pending:
        return store
    connect(experiment.runtime, experiment.train.workers)
    with Run(experiment, "ingest", name, {"store": name}) as run:
        arguments = (experiment, str(store_path(experiment)))
        items = [(shard, plan[shard]) for shard in pending]
        for _ in map_shards(Ingester, arguments, items, experiment.runtime, "ingest"):
            pass
        status = store.column("status")
        run.metrics({"spectra": len(status), "set_aside": int((status != 0).sum())})
        run.metrics({f"set_aside_{reason.lower()}": count for reason, count in first_reasons(status).items()})
        run.text(repr(store), "store.txt")
    return SpectraStore.open(store_path(experiment), write=True)


def _cut(pieces: list[Piece], shard_rows: int) -> list[list[Piece]]:
    """Lay the pieces one behind the other and cut them at the borders of the shards."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            if room == 0:
                shards.append([])
                room = shard_rows
            stop = min(piece.stop, start + room)
            shards[-1].append(Piece(piece.name, start, stop))
            room -= stop - start
            start = stop
    return shards


def _open_or_create(experiment: Experiment, source: Source, plan: list[list[Piece]], name: str) -> SpectraStore:
    path = store_path(experiment)
    if SpectraStore.is_finished(path):
        store = SpectraStore.open(path, write=True)
        if store.digest != name:
            raise LayoutError(
                f"{path} was made from other settings or files ({store.digest}, now {name}); "
                "choose another output, or remove the store to make it again"
            )
        return store
    settings = experiment.ingest
    recipe = Recipe(settings.prepare, source.grid)
    return SpectraStore.create(
        path,
        grid=recipe.grid,
        frame=settings.prepare.frame,
        rows=sum(len(piece) for shard in plan for piece in shard),
        shard_rows=settings.shard_rows,
        chunk_rows=settings.chunk_rows,
        columns=_learn_columns(source, recipe, plan),
        digest=name,
        recipe=recipe_digest(experiment),
        settings=experiment.ingest.model_dump(mode="json", exclude_none=True),
    )


def _learn_columns(source: Source, recipe: Recipe, plan: list[list[Piece]]) -> Fields:
    """Find the columns of the store by preparing the first spectrum that can be read."""
    failures = []
    for piece in (piece for shard in plan for piece in shard):
        try:
            spectra, columns = source.read(Piece(piece.name, piece.start, piece.start + 1))
        except SourceError as error:
            failures.append(error)
            continue
        _, columns = recipe(spectra, columns)
        text = np.array([""])
        return {key: field_of(values) for key, values in (columns | {"file": text, "note": text}).items()}
    if not failures:
        raise SourceError("the source holds no spectra; give a folder of spectra")
    if len(failures) == 1:
        raise failures[0]
    raise SourceError(f"none of {len(failures)} files can be read; the first: {failures[0]}")


class Ingester:
    """Reads, prepares and writes one shard; lives in a worker."""

    def __init__(self, experiment: Experiment, path: str) -> None:
        self._source = open_source(experiment.ingest.source, experiment.seed)
        self._recipe = Recipe(experiment.ingest.prepare, self._source.grid)
        self._store = SpectraStore.open(path, write=True)
        self._fields = {name: field for name, field in self._store.base.fields.items() if name.startswith("columns/")}

    def __call__(self, item: tuple[int, list[Piece]]) -> int:
        shard, pieces = item
        start, stop = self._store.base.bounds(shard)
        flux, ivar, tables = [], [], []
        for spectra, columns in self._prepared(pieces):
            flux.append(spectra.flux)
            ivar.append(spectra.ivar)
            tables.append(columns)
        columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        rows = np.arange(start, stop, dtype=np.int64)
        whole = Spectra(rows, np.concatenate(flux), np.concatenate(ivar), self._store.grid)
        self._store.write(shard, whole, columns)
        return shard

    def _prepared(self, pieces: list[Piece]) -> Iterator[tuple[Spectra, Columns]]:
        """Read piece by piece and prepare in batches."""
        read: list[tuple[Spectra, Columns]] = []
        for piece in pieces:
            for start in range(piece.start, piece.stop, _BATCH):
                read.append(self._read(Piece(piece.name, start, min(start + _BATCH, piece.stop))))
                if sum(len(spectra) for spectra, _ in read) >= _BATCH:
                    yield self._prepare(read)
                    read = []
        if read:
            yield self._prepare(read)

    def _read(self, piece: Piece) -> tuple[Spectra, Columns]:
        count = len(piece)
        notes = {"file": np.full(count, piece.name)}
        try:
            spectra, columns = self._source.read(piece)
        except SourceError as error:
            grid = self._source.grid
            blank = np.zeros((count, grid.pixels), np.float32)
            spectra = Spectra(np.arange(piece.start, piece.stop, dtype=np.int64), blank, blank, grid)
            columns = {name: self._blank(name, count) for name in self._source_columns()}
            columns["status"] = np.full(count, int(Status.UNREADABLE), np.int32)
            return spectra, columns | notes | {"note": np.full(count, str(error))}
        return spectra, columns | notes | {"note": np.full(count, "")}

    def _source_columns(self) -> list[str]:
        made = {"file", "note", "snr", "total_snr", "coverage", "norm"}
        return [name.removeprefix("columns/") for name in self._fields if name.removeprefix("columns/") not in made]

    def _blank(self, name: str, count: int) -> Shaped[np.ndarray, "n ..."]:
        """Fill a column for spectra of which nothing is known."""
        dtype, shape = self._fields[f"columns/{name}"]
        if dtype == "string":
            return np.full((count, *shape), "")
        kind = np.dtype(dtype)
        return np.full((count, *shape), np.nan if kind.kind == "f" else 0, kind)

    def _prepare(self, read: list[tuple[Spectra, Columns]]) -> tuple[Spectra, Columns]:
        joined = Spectra(
            np.concatenate([spectra.rows for spectra, _ in read]),
            np.concatenate([spectra.flux for spectra, _ in read]),
            np.concatenate([spectra.ivar for spectra, _ in read]),
            self._source.grid,
        )
        columns = {name: np.concatenate([table[name] for _, table in read]) for name in read[0][1]}
        spectra, prepared = self._recipe(joined, columns)
        # Of a file that cannot be read nothing else is known, so nothing else is held against it.
        unreadable = (prepared["status"] & Status.UNREADABLE) != 0
        prepared["status"] = np.where(unreadable, int(Status.UNREADABLE), prepared["status"]).astype(np.int32)
        missing = {name.removeprefix("columns/") for name in self._fields} ^ set(prepared)
        if missing:
            raise ConfigError(f"pieces of this source differ in their columns: {', '.join(sorted(missing))}")
        return spectra, prepared
