"""Value-added tables: facts about the same objects from elsewhere, joined to a store by id and kept as layers.

The layer `values-<digest>` has a field for each column, and `matched`, 1 where the table knows the object. What is
missing is NaN among floats and the empty text among texts; integers and booleans have a companion field `missing/<x>`
if the table lacks any of theirs, and stay integers. Units are in the layer's attributes. The digest is that of the
settings and of the file's size and time of change: a table that was changed is joined anew, a store that has grown is
joined where it has grown.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, Shaped

from distspec.addresses import Place
from distspec.config import Values, digest
from distspec.errors import ConfigError, DistspecWarning, SourceError
from distspec.files import in_place, remove
from distspec.sources.files.tables import read_table, require_table
from distspec.store import Fields, Layer, SpectraStore, field_of
from distspec.store.arrow import facts_of, to_numpy
from distspec.store.table import MISSING, RESERVED, VALUES, open_layers

__all__ = ["ShardJoiner", "Spread", "join_values", "require_values"]

_INT64 = (-(1 << 63), (1 << 63) - 1)

_SHOWN = 3

_FEW = 16
"""Shards that are joined in less time than workers take to start."""


def require_values(settings: tuple[Values, ...]) -> None:
    """Refuse, before any work is done, tables that are not there or of no known format.

    Raises:
        SourceError: there is no such file, or its name has no ending that tells the format.
    """
    for table in settings:
        require_table(table.path)


def join_values(settings: tuple[Values, ...], store: SpectraStore, spread: "Spread | None" = None) -> None:
    """Join tables to a store whose shards are all written; what is joined already is not joined again.

    A table is held in memory, in the columns that are taken, by this process; workers map a file that it writes.

    Arguments:
        settings: the tables.
        store: open for writing.
        spread: how many shards are joined by workers; None joins all in this process.

    Raises:
        SourceError: a table cannot be read, repeats an id, or shares none with the store.
        ConfigError: a table lacks a column, or one of its names is taken already.
    """
    for table in settings:
        name, facts = _identity(table)
        if name is None:
            _use_as_is(table, store, facts)
            continue
        there = open_layers(store, name)
        if not there or there[0].parts != store.base.parts or there[0].pending():
            _join(table, store, name, facts, spread)


def _identity(table: Values) -> tuple[str | None, dict[str, Any]]:
    """Name the layer of a table as the file is now; None where there is no file any more."""
    settings = table.model_dump(mode="json") | {"path": Path(table.path).name}
    settings = {key: ",".join(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        state = os.stat(table.path)
    except OSError:
        return None, {"settings": settings}
    facts = {"settings": settings, "size": state.st_size, "changed": state.st_mtime_ns}
    return f"{VALUES}{digest(facts)}", facts


def _use_as_is(table: Values, store: SpectraStore, facts: dict[str, Any]) -> None:
    ours = [layer for layer in open_layers(store, VALUES) if layer.attributes["settings"] == facts["settings"]]
    if not any(layer.parts == store.base.parts and not layer.pending() for layer in ours):
        require_table(table.path)
    warnings.warn(
        f"{table.path} is not there any more; its columns are used as they are", DistspecWarning, stacklevel=3
    )


class Spread(NamedTuple):
    """How workers join.

    Arguments:
        each: applies a class of work, its arguments and items.
        scratch: folder that all workers see.
    """

    each: Callable[[Any, tuple[Any, ...], Sequence[int]], Iterable[Any]]
    scratch: Place


@dataclass(frozen=True)
class _Joined:
    """A table ready to be looked up.

    Arguments:
        keys: its ids, as the store writes ids, sorted; each once.
        columns: by field of the layer, in the same order.
    """

    keys: Shaped[np.ndarray, "m"]
    columns: pa.Table

    @cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.keys, dtype=object)

    def places(self, ids: Shaped[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Give the row of the table for each id of the store, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(ids), -1, np.int64)
        if self.keys.dtype.kind == "O":
            texts = pd.Index(np.char.strip(ids).astype(object), dtype=object)
            return np.asarray(self._index.get_indexer(texts), np.int64)
        found = np.minimum(np.searchsorted(self.keys, ids), len(self.keys) - 1)
        return np.where(self.keys[found] == ids, found, -1)

    def write(self, path: Place) -> None:
        """Write it for workers to map; the ids come first."""
        ids = pa.array(self.keys, pa.string() if self.keys.dtype.kind == "O" else pa.int64())
        table = pa.Table.from_arrays(
            [ids, *self.columns.columns], schema=pa.schema([pa.field("", ids.type), *self.columns.schema])
        )
        with in_place(path) as partial, pa.ipc.new_file(str(partial), table.schema) as file:
            file.write_table(table)

    @classmethod
    def read(cls, path: Place) -> "_Joined":
        """Map what `write` wrote; from a bucket it is taken into memory."""
        source = pa.memory_map(str(path)) if isinstance(path, Path) else pa.BufferReader(path.read_bytes())
        table = pa.ipc.open_file(source).read_all().combine_chunks()
        ids = table.column(0)
        keys = np.array(ids.to_pylist(), dtype=object) if pa.types.is_string(ids.type) else ids.to_numpy()
        return cls(keys, table.remove_column(0))


class ShardJoiner:
    """Joins one shard after the other; lives in a worker."""

    def __init__(self, store: str, layer: str, table: Place) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer, self._joined = self._store.layer(layer), _Joined.read(table)

    def __call__(self, shard: int) -> None:
        self._layer.write(shard, _of_shard(self._joined, self._store, self._layer, shard))


def _join(table: Values, store: SpectraStore, name: str, facts: dict[str, Any], spread: Spread | None) -> None:
    text = store.base.fields["columns/id"][0] == "string"
    ids, columns = read_table(table.path, table.id, table.columns)
    keys, kept = _keys(ids, text, f"{table.path}: {table.id}")
    _require_unique(pd.Index(keys, dtype=object if text else np.int64), table)
    described = _described(columns, table, store)
    order = np.argsort(keys, kind="stable")
    columns = columns.take(pa.array(kept[order])).rename_columns(list(described)).combine_chunks()
    joined, fields = _Joined(keys[order], columns), _fields(columns, table)
    if not open_layers(store, name):
        _require_match(joined, store, table)
    described |= {"matched": {"name": f"{table.prefix}matched"}}
    layer = store.create_layer(name, fields, facts | {"path": table.path, "columns": described})
    pending = layer.pending()
    if spread is None or len(pending) <= _FEW:
        for shard in pending:
            layer.write(shard, _of_shard(joined, store, layer, shard))
        return
    path = spread.scratch / f"{name}.arrow"
    joined.write(path)
    for _ in spread.each(ShardJoiner, (store.address, name, path), pending):
        pass
    remove(path)


def _keys(ids: pa.ChunkedArray, text: bool, place: str) -> tuple[Shaped[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
    """Bring ids to the form of the store's, exactly; gives them and their rows, without those that can match none."""
    kind = ids.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
        raise SourceError(
            f"{place} is {kind}, which cannot hold ids exactly; expected integers or text: write the table again"
        )
    if pa.types.is_string(kind):
        ids = pc.utf8_trim_whitespace(ids)
        ids = pc.if_else(pc.equal(ids, ""), pa.scalar(None, pa.string()), ids)
    rows = np.flatnonzero(np.asarray(pc.is_valid(ids)))
    ids = ids.drop_null()
    if text:
        return np.array(ids.cast(pa.string()).to_pylist(), dtype=object), rows
    if pa.types.is_string(kind):
        odd = ids.filter(pc.invert(pc.match_substring_regex(ids, r"^[+-]?[0-9]{1,38}$")))
        if len(odd):
            raise SourceError(f"{place} holds {odd[0].as_py()!r}; expected integers, as the ids of the store are")
        ids = pc.replace_substring_regex(ids, r"^\+", "")
    # Wide enough for every integer that a table can hold; nothing here is a float.
    wide = ids.cast(pa.decimal128(38, 0))
    low, high = (pa.scalar(limit, pa.int64()).cast(pa.decimal128(38, 0)) for limit in _INT64)
    fits = pc.and_(pc.greater_equal(wide, low), pc.less_equal(wide, high))
    return wide.filter(fits).cast(pa.int64()).to_numpy(), rows[np.asarray(fits)]


def _require_unique(index: pd.Index, table: Values) -> None:
    if not index.is_unique:
        again = index[index.duplicated()]
        shown = ", ".join(str(value) for value in again.unique()[:_SHOWN])
        raise SourceError(
            f"{table.path}: {len(again)} rows repeat an id of {table.id} ({shown}); expected every id once: "
            "choose one row for each object"
        )


def _require_match(joined: _Joined, store: SpectraStore, table: Values) -> None:
    ids: Shaped[np.ndarray, "n"] = np.zeros(0, np.int64)
    for shard in range(store.shards):
        (ids,) = store.base.read_shard(shard, "columns/id")
        if (joined.places(ids) >= 0).any():
            return
    theirs, ours = (", ".join(str(value) for value in values[:_SHOWN]) for values in (joined.keys, ids))
    raise SourceError(
        f"{table.path}: no id of {table.id} ({theirs or 'none'}) is in the store ({ours}); "
        "expected the ids of the survey: see ingest.values.id"
    )


def _described(columns: pa.Table, table: Values, store: SpectraStore) -> dict[str, dict[str, str]]:
    """Say by field of the layer what each column is called and means.

    Raises:
        ConfigError: a name is taken, or too long.
    """
    taken = {*store.column_names, *RESERVED}
    described = {}
    for field in columns.schema:
        name = table.prefix + field.name
        # A name such as [Fe/H] would be a folder and a file in it.
        key = quote(name, safe=" []()+^*&,;:=!@#'")
        key = "%2E" + key[1:] if key.startswith(".") else "%5F" + key[1:] if key.startswith("__") else key
        if name in taken or name == f"{table.prefix}matched":
            raise ConfigError(f"{table.path}: the name {name!r} is taken already; set ingest.values.prefix, or columns")
        if not name.strip() or len(key) > 200:
            raise ConfigError(f"{table.path}: a column is named {name[:60]!r}; expected a name of 1 to 200 letters")
        facts = facts_of(field)
        described[key] = {"name": name} | {fact: facts.get(fact, "") for fact in ("unit", "ucd", "description")}
    return described


def _fields(columns: pa.Table, table: Values) -> Fields:
    fields: Fields = {"matched": ("u1", ())}
    for name in columns.column_names:
        values, _ = to_numpy(columns[name].slice(0, 1))
        if values.dtype == object:
            raise SourceError(f"{table.path}: {name} is {columns[name].type}; expected numbers or text: choose columns")
        fields[name] = field_of(values)
        if values.dtype.kind in "iub" and columns[name].null_count:
            fields[MISSING + name] = ("u1", ())
    return fields


def _of_shard(joined: _Joined, store: SpectraStore, layer: Layer, shard: int) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    ids = store.base.read("columns/id", *layer.bounds(shard))
    places = joined.places(ids)
    matched = places >= 0
    taken = joined.columns.take(pa.array(places, mask=~matched))
    found: dict[str, Shaped[np.ndarray, "n ..."]] = {"matched": matched.astype(np.uint8)}
    for name, values, missing in _arrays(taken):
        found[name] = values
        if MISSING + name in layer.fields:
            found[MISSING + name] = (missing & matched).astype(np.uint8)
    return found


def _arrays(table: pa.Table) -> Iterator[tuple[str, Shaped[np.ndarray, "n ..."], Shaped[np.ndarray, "n"]]]:
    for name in table.column_names:
        values, missing = to_numpy(table[name])
        yield name, values, missing
