"""Columns on their way to other programs: Arrow, and from there numpy, pandas and astropy.

A float is missing where it is NaN; of anything else a mask says so. Integers stay integers beside missing ones. A list
is never null itself, since Arrow cannot read such lists of fixed length from Parquet again: its elements are.
"""

from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Shaped

__all__ = ["arrow_type", "facts_of", "to_arrow", "to_numpy", "to_pandas", "to_qtable"]


def arrow_type(dtype: str, shape: tuple[int, ...]) -> pa.DataType:
    """Give the type of a field: text, a number, or a list of fixed length for each further axis."""
    kind = pa.string() if dtype == "string" else pa.from_numpy_dtype(np.dtype(dtype))
    return reduce(pa.list_, reversed(shape), kind)


def to_arrow(values: Shaped[np.ndarray, "n ..."], missing: Bool[np.ndarray, "n"] | None = None) -> pa.Array:
    """Turn an array into Arrow: NaN becomes null, further axes lists of fixed length, in which NaN stays.

    Arguments:
        values: numbers, booleans or text.
        missing: rows that are missing besides.
    """
    mask = np.zeros(len(values), bool) if missing is None else missing
    text = values.dtype.kind in "UOT"
    if values.ndim == 1:
        unknown = mask | np.isnan(values) if values.dtype.kind == "f" else mask
        return pa.array(values.astype(object) if text else values, pa.string() if text else None, mask=unknown)
    every = np.broadcast_to(mask.reshape(-1, *[1] * (values.ndim - 1)), values.shape)
    if values.dtype.kind == "f":
        array = pa.array(np.where(every, values.dtype.type(np.nan), values).ravel())
    else:
        flat = np.ascontiguousarray(values).ravel()
        array = pa.array(flat.astype(object) if text else flat, pa.string() if text else None, mask=every.ravel())
    for length in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array


def to_numpy(column: Any) -> tuple[Shaped[np.ndarray, "n ..."], Bool[np.ndarray, "n"]]:
    """Turn an Arrow column into an array and say which rows are missing, lists as a whole; undoes `to_arrow`.

    What is missing is NaN among floats, the empty text, False and 0 among the others.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        # More text than one Arrow array can hold.
        parts = [to_numpy(chunk) for chunk in array.chunks]
        return np.concatenate([values for values, _ in parts]), np.concatenate([missing for _, missing in parts])
    missing = np.asarray(array.is_null(nan_is_null=True).to_numpy(zero_copy_only=False))
    if not pa.types.is_fixed_size_list(array.type):
        return _flat(array), missing
    # `flatten` leaves out the null lists, which tables of others may have.
    inner, absent = to_numpy(array.flatten())
    shape = (array.type.list_size, *inner.shape[1:])
    values = np.full((len(array), *shape), np.nan if inner.dtype.kind == "f" else 0, inner.dtype)
    values[~missing] = inner.reshape(-1, *shape)
    whole = missing.copy()
    whole[~missing] = absent.reshape(-1, array.type.list_size).all(axis=1)
    return values, whole


def _flat(array: pa.Array) -> Shaped[np.ndarray, "n"]:
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return np.array(pc.fill_null(array, "").to_pylist(), dtype=str)
    if pa.types.is_floating(array.type):
        return np.asarray(pc.fill_null(array, pa.scalar(float("nan"), array.type)).to_numpy(zero_copy_only=False))
    filler = False if pa.types.is_boolean(array.type) else 0
    return np.asarray(pc.fill_null(array, pa.scalar(filler, array.type)).to_numpy(zero_copy_only=False))


def to_pandas(table: pa.Table) -> Any:
    """Turn a table into pandas with Arrow's own types, so that integers beside missing ones stay integers.

    `df.attrs` has `units` and `descriptions` by column.
    """
    import pandas as pd

    frame = table.to_pandas(types_mapper=pd.ArrowDtype)
    for key, plural in (("unit", "units"), ("description", "descriptions")):
        frame.attrs[plural] = {field.name: said[key] for field in table.schema if key in (said := facts_of(field))}
    return frame


def to_qtable(table: pa.Table) -> Any:
    """Turn a table into an astropy QTable; a column whose unit astropy does not know keeps it as text in its meta."""
    from astropy.table import QTable

    result = QTable()
    for field in table.schema:
        facts = facts_of(field)
        values, missing = to_numpy(table[field.name])
        result[field.name] = _astropy_column(values, missing, facts.get("unit", ""))
        result[field.name].info.description = facts.get("description")
        meta = {"ucd": facts["ucd"]} if "ucd" in facts else {}
        if facts.get("unit") and getattr(result[field.name], "unit", None) is None:
            meta["unit"] = facts["unit"]
        result[field.name].info.meta = meta
    return result


def _astropy_column(values: Shaped[np.ndarray, "n ..."], missing: Bool[np.ndarray, "n"], unit: str) -> Any:
    """Make a Quantity where there is a unit, else a plain column; integers stay integers."""
    from astropy import units
    from astropy.table import Column, MaskedColumn
    from astropy.utils.masked import Masked

    known = units.Unit(unit, parse_strict="silent") if unit else None
    numbers = values.dtype.kind in "iuf"
    masked = values.dtype.kind != "f" and bool(missing.any())
    mask = np.broadcast_to(missing.reshape(-1, *[1] * (values.ndim - 1)), values.shape)
    if known is None or isinstance(known, units.UnrecognizedUnit) or not numbers:
        return MaskedColumn(values, mask=mask) if masked else Column(values)
    quantity = units.Quantity(values, known, dtype=values.dtype)
    return Masked(quantity, mask=mask) if masked else quantity


def facts_of(field: pa.Field) -> dict[str, str]:
    """Give unit, ucd and description of a field, those that it has."""
    return {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
