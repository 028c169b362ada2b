"""What only all rows together can tell, found before the second look: ids that come twice, and the
statistics of the sample, of another store or computed by `sample.py`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64, Shaped

from distspec.config import Experiment, Sample
from distspec.errors import ConfigError
from distspec.results.layout import recipe_digest
from distspec.runtime.passes import here
from distspec.spectra import Columns, Spectra, Status
from distspec.stages.ingest.sample import compute
from distspec.store import SpectraStore
from distspec.store.frozen import Statistics

__all__ = ["AT_ONCE", "duplicate_rows", "statistics_of"]

AT_ONCE = 1 << 23
"""Ids compared at once; more are parted by a hash, so that memory does not grow with the survey."""


def duplicate_rows(
    store: SpectraStore,
    at_once: int = AT_ONCE,
    each: Callable[..., Iterable[Int64[np.ndarray, "m"]]] = here,
) -> Int64[np.ndarray, "m"]:
    """Find the usable spectra whose id stands in an earlier row that is usable too.

    Arguments:
        store: with all shards written.
        at_once: ids held in memory.
        each: applies a class of work, its arguments and items, in the items' order.

    Returns:
        Rows in rising order.
    """
    parts = -(-store.rows // at_once)
    found = list(each(Twice, (store, parts), range(parts)))
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


class Twice:
    """Finds the ids that come twice among those of one hash after the other; lives in a worker."""

    def __init__(self, store: SpectraStore, parts: int) -> None:
        self._store, self._parts = store, parts

    def __call__(self, part: int) -> Int64[np.ndarray, "m"]:
        """Give the rows of all but the first of equal ids."""
        base, ids, rows = self._store.base, [], []
        for shard in range(self._store.shards):
            start, stop = base.bounds(shard)
            of_shard = base.read("columns/id", start, stop)
            wanted = base.read("columns/status", start, stop) == 0
            if self._parts > 1:
                wanted &= _hash(of_shard) % np.uint64(self._parts) == part
            ids.append(of_shard[wanted])
            rows.append(np.arange(start, stop)[wanted])
        again = pd.Series(np.concatenate(ids)).duplicated(keep="first").to_numpy()
        return np.asarray(np.concatenate(rows)[again])


def _hash(ids: Shaped[np.ndarray, "n"]) -> Shaped[np.ndarray, "n"]:
    return np.asarray(pd.util.hash_array(ids if ids.dtype.kind in "iu" else ids.astype(object)))


def statistics_of(
    experiment: Experiment,
    store: SpectraStore,
    duplicates: Int64[np.ndarray, "m"],
    scheduler: Any = None,
    parallel: int = 0,
) -> Statistics | None:
    """Give the statistics that the recipe asks for: of another store where it names one, else of this one's spectra.

    Arguments:
        experiment: the settings.
        store: with all shards written.
        duplicates: rows that do not count.
        scheduler: of dask; None takes threads of this process.
        parallel: shards in work at a time; 0 takes one for each core of this machine.

    Raises:
        ConfigError: the other store is of another recipe, or the sample is too small.
    """
    settings = experiment.ingest.prepare
    if settings.sample.store is not None:
        return _of_other(experiment, settings.sample.store, store)
    if settings.sample == Sample():
        return None
    # Of each shard its own: all of them with every shard would grow with the square of the survey.
    own = [_within(duplicates, *store.base.bounds(shard)) for shard in range(store.shards)]
    blocks = [partial(_spectra, store.address, shard, twice) for shard, twice in enumerate(own)]
    tables = [partial(_columns, store.address, shard, twice) for shard, twice in enumerate(own)]
    return compute(blocks, settings, tables=tables, scheduler=scheduler, parallel=parallel)


def _of_other(experiment: Experiment, path: str, store: SpectraStore) -> Statistics | None:
    other = SpectraStore.open(path)
    expected = recipe_digest(experiment)
    found = other.recipe.partition("-")[0]
    if (other.grid, other.frame, found) != (store.grid, store.frame, expected):
        raise ConfigError(
            f"prepare.sample.store {path} was prepared by recipe {found} on {other.grid}; expected {expected} on "
            f"{store.grid}: use the same ingest.prepare"
        )
    if not other.finished:
        raise ConfigError(f"prepare.sample.store {path} is not finished; run `distspec ingest` on it first")
    return other.statistics


def _spectra(path: str, shard: int, duplicates: Int64[np.ndarray, "m"]) -> tuple[Spectra, Columns]:
    """Read one shard as it was prepared, with the columns that statistics are taken of."""
    return SpectraStore.open(path).read(shard, frozen=False), _columns(path, shard, duplicates)


def _columns(path: str, shard: int, duplicates: Int64[np.ndarray, "m"]) -> Columns:
    store = SpectraStore.open(path)
    start, stop = store.base.bounds(shard)
    status = store.base.read("columns/status", start, stop)
    status[duplicates] |= np.int32(Status.DUPLICATE)
    return {"status": status, "snr": store.base.read("columns/snr", start, stop)}


def _within(rows: Int64[np.ndarray, "m"], start: int, stop: int) -> Int64[np.ndarray, "k"]:
    return rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
