"""Reading tables of others, whatever their format, into plain Arrow: numbers, text and lists of fixed length.

Ids are never guessed at: in separated text they are read as text, and a column of whole numbers too long for 64 bits
stays text instead of becoming a float.
"""

import difflib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distspec.errors import ConfigError, SourceError
from distspec.sources.files.parquet import open_parquet, reading
from distspec.sources.files.places import Files
from distspec.store.arrow import to_arrow

__all__ = ["read_table", "require_table"]

_FORMATS = {
    "parquet": (".parquet", ".parq", ".pq"),
    "csv": (".csv", ".csv.gz"),
    "fits": (".fits", ".fit", ".fits.gz"),
    "votable": (".vot", ".votable", ".xml"),
    "ascii.ecsv": (".ecsv",),
}

_EXACT = 2.0**53


def require_table(path: str, setting: str = "ingest.values") -> str:
    """Name the format of a table.

    Raises:
        SourceError: there is no such file, or its name has no ending that tells the format.
    """
    for name, endings in _FORMATS.items():
        if path.lower().endswith(endings):
            if not Path(path).is_file():
                raise SourceError(f"{setting}: no file {path!r}; expected a table on a disk of this machine")
            return name
    known = ", ".join(ending for endings in _FORMATS.values() for ending in endings)
    raise SourceError(f"{setting}: {path!r} tells no format; expected a name that ends in {known}")


def read_table(path: str, key: str, columns: Sequence[str]) -> tuple[pa.ChunkedArray, pa.Table]:
    """Read the ids and some columns of a table.

    Arguments:
        path: Parquet, CSV, FITS, VOTable or ECSV.
        key: the column of ids.
        columns: names of others; empty for all.

    Returns:
        The ids as they are, and the columns in plain types, with `unit`, `ucd` and `description` in the metadata.

    Raises:
        SourceError: the table cannot be read, or a column cannot be brought to a plain type.
        ConfigError: there is no such column.
    """
    kind = require_table(path)
    if kind == "parquet":
        table = _read_parquet(path, key, columns)
    elif kind == "csv":
        table = _read_csv(path, key, columns)
    else:
        table = _read_astropy(path, kind, key, columns)
    return _plain_id(table[key], path, key), _plain(table.drop_columns([key]), path)


def _wanted(there: Sequence[str], key: str, columns: Sequence[str], path: str) -> list[str]:
    """Name the columns to read, the ids first."""
    for name in (key, *columns):
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(there)}"
            raise ConfigError(f"{path} has no column {name!r}; {hint}")
    # What pandas calls an index is the number of the line.
    others = columns or [name for name in there if not name.startswith("__index_level_")]
    return [key, *(name for name in others if name != key)]


def _read_parquet(path: str, key: str, columns: Sequence[str]) -> pa.Table:
    files = Files(path, "a table")
    name = Path(path).name
    with reading(path), open_parquet(files, name) as file:
        try:
            wanted = _wanted(file.schema_arrow.names, key, columns, path)
        except ConfigError as error:
            refused = error
        else:
            return file.read(columns=wanted)
    raise refused


def _read_csv(path: str, key: str, columns: Sequence[str]) -> pa.Table:
    from pyarrow import csv

    # An incomplete line is damage, and is an error by default.
    parse = csv.ParseOptions(newlines_in_values=True)
    read = partial(csv.read_csv, path, parse_options=parse)
    with reading(path), csv.open_csv(path, parse_options=parse) as stream:
        there = stream.schema.names
    wanted = _wanted(there, key, columns, path)
    with reading(path):
        table = read(convert_options=csv.ConvertOptions(include_columns=wanted, column_types={key: pa.string()}))
        # Whole numbers beyond 64 bits come as floats; they are identifiers, not quantities.
        doubtful = [f.name for f in table.schema if pa.types.is_floating(f.type) and _beyond(table[f.name])]
        if doubtful:
            types = {key: pa.string(), **dict.fromkeys(doubtful, pa.string())}
            texts = read(convert_options=csv.ConvertOptions(include_columns=doubtful, column_types=types))
            for name in doubtful:
                filled = pc.fill_null(texts[name], "")
                if pc.all(pc.match_substring_regex(filled, "^[+-]?[0-9]*$")).as_py():
                    table = table.set_column(table.schema.get_field_index(name), name, filled)
    return table


def _beyond(column: pa.ChunkedArray) -> bool:
    largest = pc.max(pc.abs(column)).as_py()
    return largest is not None and largest >= _EXACT


def _read_astropy(path: str, kind: str, key: str, columns: Sequence[str]) -> pa.Table:
    from astropy.table import Table

    # Of a FITS table only the columns that are looked at are read from the disk.
    options = {"memmap": not path.lower().endswith(".gz"), "mask_invalid": False} if kind == "fits" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*truncated.*")
            table = Table.read(path, format=kind, **options)
            wanted = _wanted(table.colnames, key, columns, path)
            fields, arrays = [], []
            for name in wanted:
                array = _from_astropy(table[name], f"{path}: {name}")
                arrays.append(array)
                fields.append(pa.field(name, array.type, metadata=_facts(table[name])))
    except (SourceError, ConfigError):
        raise
    except Exception as error:  # each reader fails in its own way
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{path}: cannot be read ({text}); expected a whole table of format {kind}") from error
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _from_astropy(column: Any, place: str) -> pa.Array:
    """Turn a column into Arrow: native byte order, text decoded, masked values null."""
    if not isinstance(column, np.ndarray) or column.ndim == 0:
        raise SourceError(f"{place} is {type(column).__name__}; expected numbers or text: choose columns")
    values: np.ndarray = np.asarray(getattr(column, "unmasked", column))
    mask: np.ndarray = np.broadcast_to(np.asarray(getattr(column, "mask", False)), values.shape)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    if values.dtype.kind == "O":
        if values.ndim > 1 or not all(isinstance(value, str) for value in values[~mask]):
            raise SourceError(
                f"{place} holds objects or lists of different lengths; expected numbers or text: choose columns"
            )
        values = np.where(mask, "", values)
    if values.dtype.kind in "iuf" and mask.any():
        values = np.where(mask, values.dtype.type(np.nan if values.dtype.kind == "f" else 0), values)
    if values.dtype.kind not in "iufbUO" or (values.ndim > 1 and values.dtype.kind in "UO"):
        raise SourceError(
            f"{place} is {values.dtype}{list(values.shape[1:])}; expected numbers or text: choose columns"
        )
    native = values.astype(values.dtype.newbyteorder("=")) if values.dtype.kind in "iuf" else values
    return to_arrow(native, np.asarray(mask.reshape(len(native), -1).all(axis=1)) if len(native) else None)


def _facts(column: Any) -> dict[str, str]:
    info = column.info
    unit = info.unit
    known = {
        "unit": "" if unit is None else unit.to_string() if hasattr(unit, "to_string") else str(unit),
        "ucd": str((info.meta or {}).get("ucd") or ""),
        "description": " ".join(str(info.description or "").split()),
    }
    return {key: value for key, value in known.items() if value}


def _plain_id(ids: pa.ChunkedArray, path: str, key: str) -> pa.ChunkedArray:
    kind = ids.type
    if pa.types.is_dictionary(kind):
        return _plain_id(ids.cast(kind.value_type), path, key)
    if pa.types.is_decimal(kind) and kind.scale == 0:
        return ids.cast(pa.string())
    with reading(f"{path}: {key}"):
        text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_binary(kind)
        return ids.cast(pa.string()) if text or pa.types.is_large_binary(kind) else ids


def _plain(table: pa.Table, path: str) -> pa.Table:
    for number, field in enumerate(table.schema):
        column = _plain_column(table[field.name], f"{path}: {field.name}")
        kept = {key: value for key, value in (field.metadata or {}).items() if key in (b"unit", b"ucd", b"description")}
        table = table.set_column(number, pa.field(field.name, column.type, metadata=kept), column)
    return table.replace_schema_metadata(None)


def _plain_column(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    kind = column.type
    target = _plain_type(kind)
    if target is None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        lengths = pc.unique(pc.list_value_length(column.drop_null()))
        inner = _plain_type(kind.value_type)
        if len(lengths) > 1 or inner is None or pa.types.is_string(inner):
            what = "lists of different lengths" if len(lengths) > 1 else f"{kind}"
            raise SourceError(f"{place} holds {what}; expected numbers, text or lists of equal length: choose columns")
        target = pa.list_(inner, lengths[0].as_py() if len(lengths) else 0)
    if target is None:
        raise SourceError(f"{place} is {kind}; expected numbers, text or lists of equal length: choose columns")
    with reading(place):
        return column if target == kind else column.cast(target)


def _plain_type(kind: pa.DataType) -> pa.DataType | None:
    """Name the type that a column becomes; None where there is none."""
    types = pa.types
    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if types.is_fixed_size_list(kind):
        inner = _plain_type(kind.value_type)
        return None if inner is None or types.is_string(inner) else pa.list_(inner, kind.list_size)
    if types.is_float16(kind):
        return pa.float32()
    if types.is_decimal(kind):
        return pa.float64()
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_string(kind):
        return kind
    texts = (types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return pa.string() if types.is_null(kind) or types.is_temporal(kind) or any(test(kind) for test in texts) else None
