"""Spectra and everything derived from them, as rows x pixels on Zarr v3. The only room that knows zarr.

- `store`: `SpectraStore`, a survey on one grid; the layout on disk is described there.
- `layer`: `Layer`, arrays with one leading axis, written shard by shard.
- `frozen`: what belongs to the whole sample: `Statistics`, applied to every read, and how a store keeps it.
- `coding`: how the fields of a layer lie on disk.
- `marks`: which shards are written.
- `shard_files`: the chunks of an array, read straight into the array that is asked for.
- `ahead`: reading by threads, ahead of who wants the result.
- `inventory`: the files that rows came from.
- `places`: folders and buckets.
- `table`: a store as one table.
- `lazy`: a store as lazy arrays of dask, and as an xarray dataset.
- `arrow`: columns to Arrow, pandas and astropy.
- `columns`: units and meanings of catalogue columns and scores.
"""

from distspec.store.ahead import read_ahead
from distspec.store.coding import SCHEMA, Fields, field_of
from distspec.store.inventory import Inventory
from distspec.store.layer import Layer
from distspec.store.store import SpectraStore, StoreSpec, limit_threads

__all__ = [
    "SCHEMA",
    "Fields",
    "Inventory",
    "Layer",
    "SpectraStore",
    "StoreSpec",
    "field_of",
    "limit_threads",
    "read_ahead",
]
