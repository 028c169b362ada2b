"""Small surveys without spectra to speak of: columns and layers of scores, made by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distspec.spectra import Spectra, WaveGrid
from distspec.store import Layer, SpectraStore, StoreSpec, field_of

GRID = WaveGrid("linear", 5000.0, 10.0, 2)


def make_survey(folder: Path, columns: Mapping[str, np.ndarray], shard_rows: int = 10_000, **more: Any) -> SpectraStore:
    """Write columns to a store; `id` and `status` are made where they are not given."""
    rows = len(next(iter(columns.values())))
    own = {"id": np.arange(rows, dtype=np.int64) + 2**60 + 1, "status": np.zeros(rows, np.int32)}
    told = {**own, **columns}
    store = SpectraStore.create(
        folder / "store.zarr",
        StoreSpec(
            grid=GRID,
            frame="rest",
            rows=rows,
            shard_rows=shard_rows,
            chunk_rows=shard_rows,
            columns={name: field_of(values) for name, values in told.items()},
            digest="survey",
            recipe="recipe",
            settings={},
            **more,
        ),
    )
    write_rows(store, told)
    store.freeze(None)
    store.mark_finished()
    return store


def write_rows(store: SpectraStore, columns: Mapping[str, np.ndarray]) -> None:
    """Write the shards of a store that are not there yet."""
    flux = np.ones((store.rows, GRID.pixels), np.float32)
    spectra = Spectra(np.arange(store.rows, dtype=np.int64), flux, flux, GRID)
    for shard in store.pending():
        part = slice(*store.base.bounds(shard))
        store.write(shard, spectra[part], {name: values[part] for name, values in columns.items()})


def make_layer(store: SpectraStore, name: str, fields: Mapping[str, np.ndarray], **attributes: Any) -> Layer:
    """Write a layer, or what is left of it; float fields become float32."""
    told = {key: values.astype(np.float32) if values.dtype.kind == "f" else values for key, values in fields.items()}
    layer = store.create_layer(name, {key: field_of(values) for key, values in told.items()}, attributes)
    for shard in layer.pending():
        part = slice(*layer.bounds(shard))
        layer.write(shard, {key: values[part] for key, values in told.items()})
    return layer
