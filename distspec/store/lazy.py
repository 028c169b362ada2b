"""A store as lazy arrays of dask, and as an xarray dataset, in the store's own chunks.

Nothing is read before it is asked for; what is read then is what `SpectraStore.read` and `column` give.
"""

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from jaxtyping import Shaped

from distspec.errors import LayoutError, extra
from distspec.store.columns import COLUMN_INFO
from distspec.store.layer import Layer
from distspec.store.store import SpectraStore

__all__ = ["to_dask", "to_xarray"]


class _Rows:
    """One quantity of all rows as dask asks for it: by slices. It travels as a name and is opened where it is read."""

    def __init__(self, store: str, layer: str, field: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.ndim = np.dtype(dtype), shape, len(shape)
        self._of = (store, layer, field, dtype, shape)
        self._store: SpectraStore | None = None

    def __reduce__(self) -> Any:
        return _Rows, self._of

    def __getitem__(self, key: tuple[slice, ...]) -> Shaped[np.ndarray, "n ..."]:
        address, layer, field, *_ = self._of
        if self._store is None:
            self._store = SpectraStore.open(address)
        start, stop, _ = key[0].indices(self.shape[0])
        if layer:
            values = self._store.layer(layer).read(field, start, stop)
        elif field in ("flux", "ivar"):
            values = getattr(self._store.take(np.arange(start, stop)), field)
        elif field == "status":
            values = self._store.status(start, stop)
        else:
            values = self._store.base.read(f"columns/{field}", start, stop)
        return np.asarray(values[(slice(None), *key[1:])], self.dtype)


def _lazy(store: SpectraStore, layer: str, field: str, dtype: str, shape: tuple[int, ...]) -> da.Array:
    whole = (store.rows, *shape)
    # Text has no fixed length before it is read.
    kind = "O" if dtype == "string" else dtype
    rows = [
        min(store.chunk_rows, stop - first)
        for start, stop in map(store.base.bounds, range(store.shards))
        for first in range(start, stop, store.chunk_rows)
    ]
    # Of one store and its state: rows that are there never change, and more of them change the shape.
    name = f"{field}-{tokenize(store.address, store.digest, layer, field, whole)}"
    chunks = (tuple(rows), *((length,) for length in shape))
    return da.from_array(_Rows(store.address, layer, field, kind, whole), chunks, name, asarray=False, fancy=False)


def to_dask(
    store: SpectraStore, columns: Sequence[str] | None = None, layers: Sequence[str] = ()
) -> dict[str, da.Array]:
    """Give flux, ivar, catalogue columns and fields of layers as dask arrays.

    Arguments:
        store: finished.
        columns: names wanted; None for all.
        layers: layers whose fields are wanted, with a value for each row of the store; a field that two of them have is
            named `<field>_<layer>`.

    Returns:
        Name -> array `[rows ...]` in chunks of the store's; flux and ivar `[rows pixels]`, float32.

    Raises:
        LayoutError: there is no such column, or a layer is of other rows.
        StoreNotFoundError: there is no such layer.
    """
    names = store.column_names if columns is None else list(columns)
    unknown = set(names) - set(store.column_names)
    if unknown:
        raise LayoutError(f"no column {sorted(unknown)[0]!r}; there are {', '.join(store.column_names)}")
    pixels = (store.grid.pixels,)
    found = {"flux": _lazy(store, "", "flux", "f4", pixels), "ivar": _lazy(store, "", "ivar", "f4", pixels)}
    found |= {name: _lazy(store, "", name, *store.base.fields[f"columns/{name}"]) for name in names}
    opened = [_of_all_rows(store, layer) for layer in layers]
    fields = [field for layer in opened for field in layer.fields]
    for layer in opened:
        for field, described in layer.fields.items():
            twice = fields.count(field) > 1 or field in found
            found[f"{field}_{layer.name}" if twice else field] = _lazy(store, layer.name, field, *described)
    return found


def _of_all_rows(store: SpectraStore, name: str) -> Layer:
    layer = store.layer(name)
    if layer.parts != store.base.parts:
        raise LayoutError(f"{name} has {layer.rows} rows of its own; the store has {store.rows}")
    return layer


def to_xarray(store: SpectraStore, columns: Sequence[str] | None = None, layers: Sequence[str] = ()) -> Any:
    """Give the same as an `xarray.Dataset` over `row` and `wave` (vacuum, Å), with units and descriptions.

    Raises:
        ConfigError: xarray is not installed.
    """
    with extra("xarray"):
        import xarray
    variables = {}
    for name, array in to_dask(store, columns, layers).items():
        others = ("wave",) if name in ("flux", "ivar") else tuple(f"{name}_{axis}" for axis in range(1, array.ndim))
        info = COLUMN_INFO.get(name)
        told = {} if info is None else info.to_dict()
        # The name that xarray and its figures look for.
        variables[name] = (("row", *others), array, {"units" if key == "unit" else key: told[key] for key in told})
    wave = ("wave", store.grid.wave, {"units": "Angstrom", "description": "vacuum wavelength of the pixel's middle"})
    attributes = {"frame": store.frame, "store": store.address, "digest": store.digest}
    return xarray.Dataset(variables, {"row": np.arange(store.rows), "wave": wave}, attributes)
