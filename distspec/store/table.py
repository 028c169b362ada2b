"""A store as one table: catalogue, scores, latents and value-added columns, as Arrow, astropy or pandas.

Missing means: null in Arrow and pandas; in astropy NaN for floats and masked for everything else. Missing is what is
NaN (an unknown redshift, the score of a spectrum that is set aside), a value that a value-added table does not have,
and whatever a layer has not reached yet in a store that has grown. Ids and all other integers stay what they are,
whatever is missing beside them. A list is never null itself, since Arrow cannot read such lists of fixed length from
Parquet again: its elements are NaN, or null if they are no floats.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64, Shaped

from distspec.errors import LayoutError, StoreNotFoundError
from distspec.spectra import Spectra, Status
from distspec.store.arrow import arrow_type, to_arrow
from distspec.store.columns import COLUMN_INFO, ColumnInfo
from distspec.store.layer import Layer

__all__ = [
    "MISSING",
    "RESERVED",
    "SCORES",
    "VALUES",
    "Catalogue",
    "TableRows",
    "open_layers",
    "selected",
    "table_layers",
]

SCORES = ("score-", "detect-", "ensemble-")
"""How the names of layers with scores begin."""

VALUES = "values-"

MISSING = "missing/"
"""Companion fields of a layer: `missing/x` is 1 where a matched row has no value for `x`."""

RESERVED = ("row", "reasons", "spectrum", "flux", "ivar")
"""Names that no column from outside may take, besides those of the catalogue."""


class TableRows(Protocol):
    """What a table is made of: as much of a `SpectraStore` as is read here."""

    path: str
    base: Layer
    chunk_rows: int

    @property
    def rows(self) -> int: ...

    @property
    def shards(self) -> int: ...

    @property
    def column_names(self) -> list[str]: ...

    def status(self, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "n"]: ...

    def column(self, name: str, rows: Int64[np.ndarray, "m"] | None = None) -> Shaped[np.ndarray, "m ..."]: ...

    def take(self, rows: Int64[np.ndarray, "m"]) -> Spectra: ...

    def layer(self, name: str) -> Layer: ...

    def layers(self) -> list[str]: ...


@dataclass(frozen=True)
class _Column:
    """One column: a field of a layer, or made here where the layer is None."""

    name: str
    layer: Layer | None
    field: str
    type: pa.DataType
    info: ColumnInfo


class Catalogue:
    """All that is known of each row of a store, read by runs of rows or by single ones.

    Columns are `row`, those of the survey's catalogue with `status` as it finally is, `reasons` (the status in words),
    and the fields of the layers. Where layers share a name, each is `<name>_<digest of its layer>`.

    Arguments:
        store: the store.
        columns: names wanted, in this order; None for all.
        layers: layers that give columns; None for all scores and value-added tables (see `table_layers`).
        spectra: add a column `spectrum`, a struct of the lists flux, ivar and lambda (vacuum, Å).

    Raises:
        StoreNotFoundError: there is no such layer.
        LayoutError: there is no such column, or the layer holds no value for each row of the store.
    """

    def __init__(
        self,
        store: TableRows,
        columns: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
        *,
        spectra: bool = False,
    ) -> None:
        self.store = store
        names = table_layers(store) if layers is None else list(layers)
        there = _catalogue_columns(store) + _layer_columns([_per_row(store, name) for name in names])
        self._columns = there if columns is None else [_named(name, there) for name in columns]
        self._spectra = spectra
        self._holes: dict[str, tuple[Int64[np.ndarray, "k"], Int64[np.ndarray, "k"]]] = {}
        fields = [pa.field(c.name, c.type, metadata=c.info.to_dict()) for c in self._columns]
        if spectra:
            fields.append(pa.field("spectrum", _SPECTRUM, metadata=COLUMN_INFO["spectrum"].to_dict()))
        self.schema = pa.schema(fields)
        """Arrow schema; `unit`, `ucd` and `description` of a column are in the metadata of its field."""

    def runs(self) -> Iterator[tuple[int, int]]:
        """Cut the store into runs of rows whose table fits well into memory: shards, or chunks with spectra."""
        for shard in range(self.store.shards):
            start, stop = self.store.base.bounds(shard)
            step = self.store.chunk_rows if self._spectra else stop - start
            for first in range(start, stop, step):
                yield first, min(first + step, stop)

    def read(self, start: int, stop: int) -> pa.Table:
        """Read a run of rows."""
        return self._table(np.arange(start, stop, dtype=np.int64), whole=True)

    def take(self, rows: Int64[np.ndarray, "m"]) -> pa.Table:
        """Read single rows, in the order given."""
        return self._table(rows, whole=False)

    def all(self) -> pa.Table:
        """Read everything."""
        tables = [self.read(start, stop) for start, stop in self.runs()]
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    def _table(self, rows: Int64[np.ndarray, "m"], *, whole: bool) -> pa.Table:
        known: dict[str, Bool[np.ndarray, "m"]] = {}
        arrays = [self._array(column, rows, whole, known) for column in self._columns]
        if self._spectra:
            arrays.append(_spectrum(self.store, rows))
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _array(
        self, column: _Column, rows: Int64[np.ndarray, "m"], whole: bool, known: dict[str, Bool[np.ndarray, "m"]]
    ) -> pa.Array:
        """Read one column; `known` keeps where each layer holds something, for the other columns of the same rows."""
        layer, store = column.layer, self.store
        if column.name == "row" and layer is None:
            return pa.array(rows)
        if column.field in ("status", "reasons") and layer is None:
            whole_run = whole and len(rows)
            status = store.status(int(rows[0]), int(rows[-1]) + 1) if whole_run else store.column("status", rows)
            return pa.array(status) if column.field == "status" else pa.array(_reasons(status), pa.string())
        if layer is None:
            return to_arrow(_read(store.base, column.field, rows, whole))
        if layer.name not in known:
            known[layer.name] = self._known(layer, rows)
        there = known[layer.name]
        if column.field == "matched" and layer.name.startswith(VALUES):
            return pa.array(self._filled(layer, "matched", rows, whole) == 1, mask=~self._known(layer, rows, all_=True))
        values = self._filled(layer, column.field, rows, whole)
        if MISSING + column.field in layer.fields:
            there = there & (self._filled(layer, MISSING + column.field, rows, whole) == 0)
        return to_arrow(values, ~there)

    def _known(self, layer: Layer, rows: Int64[np.ndarray, "m"], *, all_: bool = False) -> Bool[np.ndarray, "m"]:
        """Say for which rows a layer holds something: it is written there and, unless `all_`, the object matched."""
        if layer.name not in self._holes:
            holes = [layer.bounds(shard) for shard in layer.pending()]
            holes += [(layer.rows, self.store.rows)] if layer.rows < self.store.rows else []
            starts, stops = np.array(holes, np.int64).reshape(-1, 2).T
            self._holes[layer.name] = (starts, stops)
        starts, stops = self._holes[layer.name]
        written = np.ones(len(rows), bool)
        if len(starts):
            last = np.searchsorted(starts, rows, side="right") - 1
            written = (last < 0) | (rows >= stops[last])
        if all_ or not layer.name.startswith(VALUES):
            return written
        matched = np.zeros(len(rows), bool)
        matched[written] = layer.take("matched", rows[written]) == 1
        return matched

    def _filled(
        self, layer: Layer, field: str, rows: Int64[np.ndarray, "m"], whole: bool
    ) -> Shaped[np.ndarray, "m ..."]:
        """Read a field of a layer, with anything in the rows that it does not hold."""
        written = self._known(layer, rows, all_=True)
        if written.all():
            return _read(layer, field, rows, whole)
        found = layer.take(field, rows[written]) if written.any() else _nothing(layer, field)
        values = np.zeros((len(rows), *found.shape[1:]), found.dtype)
        values[written] = found
        return values


def table_layers(store: TableRows) -> list[str]:
    """Name the layers that a table of the store shows: all scores, and each value-added table as it was last joined."""
    newest: dict[str, tuple[int, str]] = {}
    for layer in open_layers(store, VALUES):
        key = repr(sorted(layer.attributes["settings"].items()))
        newest[key] = max(newest.get(key, (-1, "")), (int(layer.attributes["changed"]), layer.name))
    scores = [layer.name for prefix in SCORES for layer in open_layers(store, prefix)]
    return scores + sorted(name for _, name in newest.values())


def open_layers(store: TableRows, prefix: str) -> list[Layer]:
    """Open the layers whose names begin so, without those whose making was interrupted."""
    found = []
    for name in store.layers():
        if name.startswith(prefix):
            with suppress(StoreNotFoundError):
                found.append(store.layer(name))
    return found


def _per_row(store: TableRows, name: str) -> Layer:
    layer = store.layer(name)
    if layer.parts != store.base.parts[: len(layer.parts)]:
        raise LayoutError(
            f"layer {name} holds no value for each row of {store.path}; choose a layer of scores or values"
        )
    return layer


def _catalogue_columns(store: TableRows) -> list[_Column]:
    made = {"row": pa.int64(), "status": pa.int32(), "reasons": pa.string()}
    columns = [_Column("row", None, "row", pa.int64(), COLUMN_INFO["row"])]
    for name in store.column_names:
        if name != "status":
            kind = arrow_type(*store.base.fields[f"columns/{name}"])
            columns.append(_Column(name, None, f"columns/{name}", kind, COLUMN_INFO.get(name, ColumnInfo())))
    return columns + [_Column(name, None, name, made[name], COLUMN_INFO[name]) for name in ("status", "reasons")]


def _layer_columns(layers: Iterable[Layer]) -> list[_Column]:
    columns = []
    for layer in layers:
        facts = layer.attributes.get("columns", {})
        for field, (dtype, shape) in layer.fields.items():
            if field.startswith(MISSING):
                continue
            # Of a column from outside only its own table says what it means, whatever its name.
            info = COLUMN_INFO.get(field, ColumnInfo())
            if layer.name.startswith(VALUES) and field != "matched":
                info = ColumnInfo(**{key: facts[field][key] for key in ("unit", "ucd", "description")})
            name = facts.get(field, {}).get("name", field)
            kind = (
                pa.bool_() if (field, layer.name.startswith(VALUES)) == ("matched", True) else arrow_type(dtype, shape)
            )
            columns.append(_Column(name, layer, field, kind, info))
    times = Counter(column.name for column in columns)
    return [
        _Column(f"{c.name}_{c.layer.name.rpartition('-')[2]}", c.layer, c.field, c.type, c.info)
        if times[c.name] > 1 and c.layer is not None
        else c
        for c in columns
    ]


def _named(name: str, there: list[_Column]) -> _Column:
    for column in there:
        if column.name == name:
            return column
    names = [column.name for column in there]
    several = [other for other in names if other.rpartition("_")[0] == name]
    if len(several) > 1:
        raise LayoutError(f"{name} is in several layers; ask for {' or '.join(several)}, or name the layer")
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    raise LayoutError(f"no column {name!r} in this store; {hint}")


def _read(layer: Layer, field: str, rows: Int64[np.ndarray, "m"], whole: bool) -> Shaped[np.ndarray, "m ..."]:
    if whole and len(rows):
        return layer.read(field, int(rows[0]), int(rows[-1]) + 1)
    return layer.take(field, rows)


def _nothing(layer: Layer, field: str) -> Shaped[np.ndarray, "0 ..."]:
    dtype, shape = layer.fields[field]
    return np.zeros((0, *shape), np.dtype("U1" if dtype == "string" else dtype))


def _reasons(status: Shaped[np.ndarray, "m"]) -> Shaped[np.ndarray, "m"]:
    found, where = np.unique(status, return_inverse=True)
    return np.array(["; ".join(Status(int(bits)).reasons) for bits in found], dtype=object)[where]


_SPECTRUM = pa.struct(
    [
        pa.field("flux", pa.list_(pa.float32())),
        pa.field("ivar", pa.list_(pa.float32())),
        pa.field("lambda", pa.list_(pa.float64())),
    ]
)


def _spectrum(store: TableRows, rows: Int64[np.ndarray, "m"]) -> pa.Array:
    spectra = store.take(rows)
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * spectra.grid.pixels)
    values = (spectra.flux.ravel(), spectra.ivar.ravel(), np.tile(spectra.grid.wave, len(rows)))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(array)) for array in values]
    return pa.StructArray.from_arrays(lists, fields=list(_SPECTRUM))


def selected(
    store: TableRows,
    rows: Any = None,
    columns: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
) -> pa.Table:
    """Read a table of some rows (positions, or a boolean for each row of the store) or of all; see `Catalogue`."""
    catalogue = Catalogue(store, columns, layers)
    if rows is None:
        return catalogue.all()
    wanted = np.atleast_1d(np.asarray(rows))
    if wanted.dtype == bool:
        if wanted.shape != (store.rows,):
            raise LayoutError(f"a mask of {wanted.shape} for {store.rows} rows; give one value for each row")
        wanted = np.flatnonzero(wanted)
    if wanted.size and wanted.dtype.kind not in "iu":
        raise LayoutError(
            f"rows are {wanted.dtype}; give positions in the store as integers, or a boolean for each row"
        )
    return catalogue.take(wanted.astype(np.int64))
