"""A store as a Ray Data dataset, and results per row back into it: for models and computations of one's own.

    import distspec

    spectra = distspec.dataset(store, columns=["row", "status"])
    scored = spectra.map_batches(MyModel, batch_format="numpy", compute=...)   # keeps "row", adds "my_score"
    distspec.write_layer(scored, store, "mine")

The stages themselves do not go this way: a worker that reads its own shard passes nothing on to anybody.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.data.extensions import ArrowTensorArray

from distspec.errors import LayoutError, ShardError
from distspec.runtime.cluster import connect
from distspec.store import Fields, Layer, SpectraStore, field_of

__all__ = ["StoreSource", "dataset", "write_layer"]

_SHARD = "shard"
"""Column that tells where rows go that are not together yet."""


def dataset(
    store: SpectraStore,
    columns: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    *,
    spectra: bool = True,
) -> Any:
    """Give a store as a `ray.data.Dataset` of a row for each spectrum; one read task a shard.

    Arguments:
        store: the spectra.
        columns: names wanted, in this order; None for all, as `store.arrow` gives them: `row`, the survey's catalogue
            with ids as they are, int64 or text, and the fields of the layers.
        layers: layers that give columns; None for all scores and value-added tables.
        spectra: also give `flux` and `ivar`, float32 `[pixels]` on `store.grid`; ivar is 0 where nothing was measured.

    Raises:
        LayoutError: there is no such column.
        StoreNotFoundError: there is no such layer.
    """
    # Ray itself would start where there is none, open to the network.
    from distspec.config import Runtime

    connect(Runtime())
    # As many blocks as shards: Ray would cut them for more workers, and a shard is what is written again as a whole.
    source = StoreSource(store, columns, layers, spectra=spectra)
    return ray.data.read_datasource(source, override_num_blocks=store.shards)


class StoreSource(Datasource):  # type: ignore[misc]
    """Reads a store for Ray Data: a task and a block for each shard.

    Arguments:
        store, columns, layers, spectra: as of `dataset`.
    """

    def __init__(
        self,
        store: SpectraStore,
        columns: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
        *,
        spectra: bool = True,
    ) -> None:
        super().__init__()
        self._address, self._columns, self._layers, self._spectra = store.address, columns, layers, spectra
        self._bounds = [store.base.bounds(shard) for shard in range(store.shards)]
        empty = store.arrow(np.zeros(0, np.int64), columns, layers)  # refuses what there is not
        self._row_bytes = 16 * len(empty.schema) + (8 * store.grid.pixels if spectra else 0)

    def estimate_inmemory_data_size(self) -> int:
        """Give the bytes of all rows, about."""
        return sum(stop - start for start, stop in self._bounds) * self._row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Give a task for each shard, whatever number is asked for: a shard is what is read at once."""
        tasks = []
        for shard, (start, stop) in enumerate(self._bounds):
            size = (stop - start) * self._row_bytes
            expected = BlockMetadata(num_rows=stop - start, size_bytes=size, input_files=None, exec_stats=None)
            read = _Reader(self._address, shard, self._columns, self._layers, self._spectra)
            tasks.append(ReadTask(read, expected, per_task_row_limit=per_task_row_limit))
        return tasks


class _Reader:
    """Reads one shard, in a worker."""

    def __init__(
        self, address: str, shard: int, columns: Sequence[str] | None, layers: Sequence[str] | None, spectra: bool
    ) -> None:
        self._address, self._shard, self._spectra = address, shard, spectra
        self._columns, self._layers = columns, layers

    def __call__(self) -> Iterable[pa.Table]:
        store = SpectraStore.open(self._address)
        rows = np.arange(*store.base.bounds(self._shard))
        table = store.arrow(rows, self._columns, self._layers)
        if self._spectra:
            read = store.read(self._shard)
            for name in ("flux", "ivar"):
                table = table.append_column(name, ArrowTensorArray.from_numpy(getattr(read, name)))
        yield table


def write_layer(results: Any, store: SpectraStore, name: str) -> Layer:
    """Write results per row into a layer of a store, whole shards at a time, in the workers that have them.

    Arguments:
        results: `ray.data.Dataset` with a column `row` and one column for each field of the layer: numbers, or arrays
            of one shape, for each usable row of the store exactly once, in any order. Rows that are set aside may be
            there, too; those that are not get NaN, or -1 where numbers are whole.
        store: what the rows belong to.
        name: of the layer; one that an interruption left unfinished is finished.

    Returns:
        The finished layer. Its scalar fields count as scores.

    Raises:
        LayoutError: there is no column `row`, a field holds neither numbers nor arrays of them, or there is such a
            layer.
        ShardError: a usable row is missing or comes twice, or a row is none of the store's; what else there is is
            written.
    """
    first = {key: np.asarray([value]) for row in results.take(1) for key, value in row.items()}
    if "row" not in first or len(first) < 2:
        raise LayoutError(f"results have the columns {', '.join(first)}; expected `row` and what is found for each row")
    fields: Fields = {key: field_of(values) for key, values in first.items() if key != "row"}
    # What is missing becomes NaN or -1, which other kinds cannot say.
    odd = [key for key, (dtype, _) in fields.items() if dtype == "string" or np.dtype(dtype).kind not in "fi"]
    if odd:
        raise LayoutError(
            f"results {', '.join(odd)} hold no numbers; turn them into numbers, or leave them out by drop_columns"
        )
    if _SHARD in fields:
        raise LayoutError(f"results have a column {_SHARD!r}, a name that is taken; rename it")
    scores = [key for key, (dtype, shape) in fields.items() if shape == () and dtype.startswith("f")]
    store = SpectraStore.open(store.address, write=True)
    if name in store.layers() and not store.layer(name).pending():
        raise LayoutError(f"there is a finished layer {name!r} already; choose another name")
    layer = store.create_layer(name, fields, {"scores": scores})
    # A block is one shard's as long as nobody has mixed rows: then nothing is sent anywhere.
    writer = _Writer(store.address, name)

    def write(batch: dict[str, Any]) -> dict[str, Any]:
        return writer(batch)

    rest = results.map_batches(write, batch_size=None, batch_format="numpy", zero_copy_batch=True).materialize()
    if rest.count():
        rest.groupby(_SHARD).map_groups(write, batch_format="numpy").materialize()
    layer = store.layer(name)
    missing = layer.pending()
    if missing:
        start, stop = layer.bounds(missing[0])
        raise ShardError(
            f"results lack usable rows of {len(missing)} of {layer.shards} shards, such as of rows {start} to {stop}, "
            "hold some twice, or hold others than the store has"
        )
    return layer


class _Writer:
    """Writes the shards that a batch holds all usable rows of, and gives back the rest, with its shards."""

    def __init__(self, address: str, name: str) -> None:
        self._address, self._name = address, name

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        store = SpectraStore.open(self._address, write=True)
        layer = store.layer(self._name)
        rows = np.asarray(batch["row"], np.int64)
        starts = np.array([layer.bounds(shard)[0] for shard in range(layer.shards)], np.int64)
        shards = np.maximum(np.searchsorted(starts, rows, side="right") - 1, 0)
        arrays = {key: np.asarray(values) for key, values in batch.items() if key != _SHARD}
        left = np.zeros(len(rows), bool)
        for shard in np.unique(shards):
            mine = shards == shard
            if not _write(store, layer, int(shard), {key: values[mine] for key, values in arrays.items()}):
                left |= mine
        return {key: values[left] for key, values in arrays.items()} | {_SHARD: shards[left]}


def _write(store: SpectraStore, layer: Layer, shard: int, batch: dict[str, Any]) -> bool:
    """Write a shard, if all its usable rows are there once; tell whether."""
    start, stop = layer.bounds(shard)
    if batch["row"].min() < start or batch["row"].max() >= stop:
        return False
    counts = np.bincount(batch["row"] - start, minlength=stop - start)
    usable = store.status(start, stop) == 0
    if (counts[usable] != 1).any() or (counts > 1).any():
        return False
    values = {}
    for key, (dtype, shape) in layer.fields.items():
        empty = np.nan if np.dtype(dtype).kind == "f" else -1
        values[key] = np.full((stop - start, *shape), empty, dtype)
        values[key][batch["row"] - start] = batch[key]
    layer.write(shard, values)
    return True
