"""`distspec ingest`: survey files -> store.

It reads the survey named by `ingest.source`, prepares every spectrum by the recipe `ingest.prepare`, and writes a
store: flux, inverse variance, the survey's catalogue columns, and `status`, which says why a spectrum is set aside.
Every spectrum keeps its row: spectra = used + set aside, always. `ledger.csv` in the output lists what is set aside
and why, files included.

    [ingest.source]
    kind = "sdss"        # desi, lamost, table, specutils, simulate
    path = "spectra"     # a file, a folder that is searched, a list (.txt),
                         # a .tar or .zip, or a bucket: s3://...

    [ingest.prepare]
    frame = "rest"       # or "observed"
    grid = { scale = "log", first = 3388.0, last = 8318.0, pixels = 1000 }
    dust.kind = "column" # the survey's E(B-V); or "sfd", a map, or "none"
    cuts = { z_max = 0.36, coverage_min = 0.6 }

Sources. SDSS: `spec` files, lite or full, or plates (`spPlate` with `spZbest`), selected by a `specObj` or `spAll`
catalogue. DESI: `coadd` or `spectra` files with `redrock`, by healpix or tile, by target class (`targets = ["LRG"]`)
or catalogue. LAMOST: low resolution, as DR1, DR8 and DR10 lay it out. Tables: Parquet with a spectrum a row: flat,
HATS or Multimodal Universe. `specutils`: whatever it reads, brought to one grid. A catalogue is narrowed by
conditions: min, max, above, below, one_of, any_bits, no_bits, and `highest` with `limit`:

    wanted.where = [{ column = "SN_MEDIAN_ALL", above = 4 }]

A DESI `catalog` alone lends its redshifts; `wanted`, if only `wanted = {}`, limits the ingest to it. Wavelengths are
vacuum: files that say otherwise, or do not say and could be either, are refused. Extinction is never taken as zero
silently: survey files are refused until `ingest.prepare.dust` says how to correct it, if only `kind = "none"`.

The recipe masks or patches sky lines, corrects Galactic extinction, shifts to the rest frame, rebins conserving flux
and propagating variance, normalizes, sets a noise floor and cuts. What it takes over the whole sample
(`ingest.prepare.sample`: mean spectrum, medians that fill gaps, wavelengths to drop, an S/N quantile) is computed
once, frozen into the store, and applied to whatever is added later; another store takes it over by `sample.store`.
Recipes of papers are presets: `distspec ingest pae ingest.source.kind=sdss ingest.source.path=spectra`.

Files that appear later extend the store: run it again. Rows that are there are not touched, models stay, and
`distspec score` scores what is new. A file that changed size is refused, an id that comes twice is set aside. A file
that could not be read may be put right (or touched) and comes in with the next ingest; its old row stays, set aside.

    distspec ingest sdss.toml --check    read the whole store and verify it
    distspec ingest sdss.toml --mend     and take out what is damaged, so that
                                         the next run makes it again

The store may lie in a bucket: `ingest.store=s3://bucket/survey.zarr`, or with everything else: `output=s3://bucket/run`
(credentials from the environment). `[[ingest.values]]` joins tables of your own by id. A store belongs to its
settings: with another recipe choose another `output`.

In the code: the driver lists what there is (`row_plan.py`), lets workers count what must be opened, and hands out
shards; each worker (`workers.py`) reads the pieces of its shard, prepares them and writes the shard whole. A file
that cannot be read keeps its rows: they are set aside with the reason in the column `note`. When all rows are there,
a second look settles what only all of them can tell (`finish.py`, `sample.py`).
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from distspec import sources
from distspec.config import Experiment, differences, digest
from distspec.errors import ConfigError, DistspecWarning, LayoutError, SourceError, UnreachableError
from distspec.prepare.recipe import Recipe
from distspec.results.layout import ledger_path, output_of, recipe_digest, store_digest, store_identity, store_path
from distspec.runtime.cluster import connect, dask_scheduler, workers_of
from distspec.runtime.passes import each
from distspec.runtime.threads import one_thread
from distspec.runtime.tracking import Run
from distspec.runtime.workers import Cut, map_items
from distspec.sources import Piece, Source
from distspec.sources.catalogs.catalog import locate, stamp_of
from distspec.spectra import Status, first_reasons
from distspec.stages.ingest.finish import AT_ONCE, duplicate_rows, statistics_of
from distspec.stages.ingest.ledger import write_ledger
from distspec.stages.ingest.row_plan import FileRows, new_files, require_rows
from distspec.stages.ingest.sample import check as check_sample
from distspec.stages.ingest.section import section
from distspec.stages.ingest.values import Spread, join_values, require_values
from distspec.stages.ingest.workers import Counter, Finisher, Ingester, counts_of
from distspec.stages.stage import Job, Products, Section, Stage, State
from distspec.store import Fields, Inventory, SpectraStore, StoreSpec, field_of

__all__ = ["IngestStage", "ingest"]

_GROUP = 256
"""Files that one worker counts at a time."""

_FEW = 8
"""So many files are counted at once by the driver: less than the start of a worker takes."""


class IngestStage(Stage):
    """Survey files -> store."""

    name, uses = "ingest", ()

    def state(self, job: Job) -> State:
        """Count the shards that are written, and the files that the store does not know."""
        experiment, path = job.experiment, store_path(job.experiment)
        source = sources.build(experiment.ingest.source, experiment.seed, output_of(experiment))
        if not SpectraStore.is_finished(path):
            files = len(source.files())
            return State(0, files, "files", "no store yet")
        store = SpectraStore.open(path)
        _require_identity(experiment, store)
        left = len(store.pending())
        if left:
            return State(store.shards - left, store.shards, "shards", "ingest was interrupted")
        if not store.finished:
            return State(0, 1, "looks over all rows", "ingest was interrupted")
        try:
            listed = {entry.name for entry in source.files()}
        except SourceError as error:
            return State(store.shards, store.shards, "shards", f"{error}; the store is used as it is")
        new = len(listed - set(store.inventory().names))
        if new:
            return State(store.shards, store.shards + 1, "shards", f"{new} new files: the store will grow")
        return State(store.shards, store.shards, "shards")

    def find(self, job: Job) -> Products:
        """Open the store.

        Raises:
            StoreNotFoundError: there is none.
            ConfigError: it is not finished.
        """
        return job.having(store=_finished_store(job.experiment))

    def make(self, job: Job) -> Products:
        """Make, finish or extend the store."""
        return job.having(store=ingest(job.experiment))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the store, and why spectra are set aside."""
        if made.store is not None:
            reasons = first_reasons(made.store.column("status"))
            yield "store", f"{made.store.path}: {made.store.rows} spectra, {sum(reasons.values())} set aside"
            for reason, count in reasons.items():
                yield "", f"{count} {reason.lower().replace('_', ' ')}"

    def sections(self, job: Job) -> Iterator[Section]:
        """Say what was read, and how it was prepared."""
        yield section(job)


def _finished_store(experiment: Experiment) -> SpectraStore:
    store = SpectraStore.open(store_path(experiment), write=True)
    if not store.finished:
        raise ConfigError(
            f"{store.path} lacks {len(store.pending())} of {store.shards} shards, or the look over all of them; "
            "run `distspec ingest` to finish it"
        )
    return store


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
    by_workers = partial(
        map_items, settings=experiment.runtime, label="join", needs=experiment.runtime.needs("ingest"), here=False
    )
    join_values(experiment.ingest.values, store, Spread(by_workers, output_of(experiment)))
    return store


def _ingest(experiment: Experiment) -> SpectraStore:
    source = sources.build(experiment.ingest.source, experiment.seed, output_of(experiment))
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
        _write_ledger(experiment, store, source.missing())
    return store


def _write_ledger(experiment: Experiment, store: SpectraStore, missing: Sequence[str]) -> int:
    each_shard = partial(each, experiment.runtime, "ingest", label="ledger")
    return write_ledger(store, missing, ledger_path(experiment), each_shard)


def _is_lost(store: SpectraStore | None, known: Inventory | None, index: int) -> bool:
    """Tell whether nothing of a file, by its place in the inventory, could be read."""
    assert store is not None and known is not None
    start, stop = FileRows(known).of_file(index)
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
    _require_identity(experiment, store)
    return store


def _require_identity(experiment: Experiment, store: SpectraStore) -> None:
    differs = differences(store.settings["identity"], store_identity(experiment))
    if differs:
        raise LayoutError(
            f"{store.path} was made by other settings: {'; '.join(differs)}; choose another output, or remove the store"
        )


def _create(experiment: Experiment, source: Source, inventory: Inventory) -> SpectraStore:
    require_rows(inventory)
    settings = experiment.ingest
    recipe = Recipe(settings.prepare, source.grid)
    resolved = settings.model_dump(mode="json", exclude_none=True)
    spec = StoreSpec(
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
    return SpectraStore.create(store_path(experiment), spec)


def _catalog_stamp(experiment: Experiment) -> list[int]:
    """Size and time of the source's catalogue; empty where there is none."""
    catalog = getattr(experiment.ingest.source, "catalog", None)
    root = getattr(experiment.ingest.source, "path", "")
    try:
        return [] if catalog is None else list(stamp_of(locate(catalog, root)))
    except UnreachableError:
        raise
    except SourceError:
        return []


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
    connect(settings)
    # Each extension is a run of its own; a run that was interrupted is gone on with.
    key = digest(store.digest, list(store.base.parts))
    with Run(experiment, "ingest", key, {"store": store.digest}) as run:
        rows = FileRows(store.inventory())
        items = [(shard, rows.pieces(*store.base.bounds(shard))) for shard in store.pending()]
        needs, cut = settings.needs("ingest"), Cut(lambda item: store.base.bounds(item[0]))
        arguments = (experiment, store.address)
        for _ in map_items(Ingester, arguments, items, settings, "ingest", needs=needs, cut=cut):
            pass
        source = sources.build(experiment.ingest.source, experiment.seed, output_of(experiment))
        missing = source.missing()
        try:
            _finish(experiment, store)
        except ConfigError as error:
            # Why so few are left is what the user needs to know now.
            lines = _write_ledger(experiment, store, missing)
            raise ConfigError(f"{error} ({lines} are set aside; {ledger_path(experiment)} says why)") from error
        _write_ledger(experiment, store, missing)
        status = store.status()
        run.metrics({"spectra": len(status), "set_aside": int((status != 0).sum()), "missing": len(missing)})
        run.metrics({f"set_aside_{reason.lower()}": count for reason, count in first_reasons(status).items()})
        run.text(repr(store), "store.txt")
        # Last: until now a run that was killed does all of this again.
        store.mark_finished()


def _finish(experiment: Experiment, store: SpectraStore) -> None:
    duplicates = np.zeros(0, np.int64)
    if experiment.ingest.prepare.cuts.duplicates:
        # One part is one worker's work, and then it is as well done here.
        each_part = partial(each, experiment.runtime, "ingest", label="duplicates", here=store.rows <= AT_ONCE)
        duplicates = duplicate_rows(store, each=each_part)
    needs = experiment.runtime.needs("ingest")
    if not store.is_frozen:
        scheduler, parallel = dask_scheduler(), workers_of(experiment.runtime, store.shards, needs)
        store.freeze(statistics_of(experiment, store, duplicates, scheduler, parallel))
    if store.statistics is not None or duplicates.size or store.has_sample_layer:
        pending = store.sample_layer().pending()
        cuts = [store.base.bounds(shard) for shard in pending]
        items = [
            (shard, duplicates[np.searchsorted(duplicates, start) : np.searchsorted(duplicates, stop)])
            for shard, (start, stop) in zip(pending, cuts, strict=True)
        ]
        for _ in map_items(Finisher, (store.address,), items, experiment.runtime, "look", needs=needs):
            pass
    store.reload()


def _count(experiment: Experiment, source: Source, names: list[str]) -> Iterator[tuple[str, int]]:
    """Count the wanted spectra of files: in workers, unless there are few."""
    if len(names) <= _FEW:
        yield from counts_of(source, names)
        return
    connect(experiment.runtime)
    groups = [names[start : start + _GROUP] for start in range(0, len(names), _GROUP)]
    needs = experiment.runtime.needs("ingest")
    for found in map_items(Counter, (experiment,), groups, experiment.runtime, "count", needs=needs):
        yield from found


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
