"""A survey on one grid, and how it lies on disk.

    store.zarr/
      zarr.json            grid, recipe, schema number: written last, so a half-made store is not a store
      base/flux, ivar      float32 [rows, pixels], in shards of compressed, checksummed chunks
      base/columns/<name>  one array per catalogue column; ids are int64 or strings
      base/commits         one mark per shard, written after all other arrays of the shard
      inventory/<part>     the files that each part of the rows came from
      sample/<name>        statistics of the sample that the recipe asks for, frozen; applied whenever spectra are read
      layers/second-look   what only a look over all rows can tell: duplicates, the sample's S/N limit and norm
      layers/<name>-<digest>/<field>, commits    results, named by the settings that made them

A shard is the unit of work. It is written whole or refused, so no two writers meet; its mark is written last, so a
killed writer leaves nothing that a reader takes for whole; the same data give the same bytes, so a retry is safe. A
chunk that is missing or damaged is an error and never a fill value. Rows added later are further parts (`layer.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float32, Int32, Int64, Shaped

from distspec.addresses import absolute
from distspec.errors import LayoutError, StoreError, StoreNotFoundError
from distspec.spectra import Columns, Spectra, WaveGrid
from distspec.store.coding import SCHEMA, Fields, create_layer
from distspec.store.frozen import SAMPLE_FIELDS, SAMPLE_LAYER, SampleRecord, Statistics
from distspec.store.inventory import Inventory, read_inventory, write_inventory
from distspec.store.layer import Layer, group_of, layer_group, open_layer
from distspec.store.places import clear, has, names_in, open_place, place_of
from distspec.store.shard_files import use_threads

__all__ = ["SpectraStore", "StoreSpec", "limit_threads"]


@dataclass(frozen=True)
class StoreSpec:
    """What a store is made of before it holds a spectrum.

    Arguments:
        grid: wavelengths of all spectra.
        frame: "rest" or "observed".
        rows: number of spectra, including those that will be set aside.
        shard_rows: spectra in a shard.
        chunk_rows: spectra in a chunk; divides `shard_rows`.
        columns: catalogue columns.
        digest: names what the store was made from.
        recipe: digest of the preparation of the spectra; a model is used only on its own recipe.
        settings: the resolved settings, kept for the reader.
        inventory: the files that the rows come from, in order.
    """

    grid: WaveGrid
    frame: str
    rows: int
    shard_rows: int
    chunk_rows: int
    columns: Fields
    digest: str
    recipe: str
    settings: dict[str, Any]
    inventory: Inventory | None = None


class SpectraStore:
    """A survey on one grid: flux, ivar, catalogue columns, and the layers derived from them.

    Example:
        >>> store = SpectraStore.open("survey.zarr")  # doctest: +SKIP
        >>> store.read(0)  # doctest: +SKIP
        Spectra(16384 on WaveGrid(log, 3388.0-8318.0 Å, 1000 pixels))
    """

    def __init__(self, root: zarr.Group) -> None:
        self._root = root
        self.base = open_layer(root, "base")
        meta = root.attrs["distspec"]
        self.path = place_of(root)
        self.chunk_rows = int(meta["chunk_rows"])
        self.grid = WaveGrid(**meta["grid"])
        self.frame = str(meta["frame"])
        self.digest = str(meta["digest"])
        self.settings: dict[str, Any] = dict(meta["settings"])
        self._recipe = str(meta["recipe"])
        self._sample = SampleRecord(root)

    @classmethod
    def create(cls, path: str | Path, spec: StoreSpec) -> "SpectraStore":
        """Make an empty store: all metadata, no spectra. What an interrupted call left at `path` is replaced.

        Arguments:
            path: folder or URL of the store.
            spec: what it is made of.

        Raises:
            StoreError: the path cannot be written, or holds something that is not a store.
        """
        place = open_place(path, write=True)
        try:
            found = names_in(place)
            # Only what an interrupted call of this function leaves may be replaced.
            ours = ("zarr.json", "base", "layers", "inventory", "sample")
            if not all(name in ours or ".partial" in name for name in found):
                raise StoreError(f"{path} exists and is not a store; choose another output or move it away")
            if found and cls.is_finished(path):
                raise StoreError(f"{path} already is a store; open it instead")
            if found:
                clear(place)
            root = zarr.open_group(place, mode="w", zarr_format=3)
        except OSError as error:
            raise StoreError(f"cannot make a store at {path}: {error.strerror or error}") from error
        pixels = {"flux": ("f4", (spec.grid.pixels,)), "ivar": ("f4", (spec.grid.pixels,))}
        fields = pixels | {f"columns/{name}": field for name, field in spec.columns.items()}
        create_layer(root, "base", [spec.rows], spec.shard_rows, spec.chunk_rows, fields, {})
        root.create_group("layers")
        root.create_group("inventory")
        write_inventory(root["inventory"], 0, Inventory.empty() if spec.inventory is None else spec.inventory)
        root.attrs["distspec"] = {
            "schema": SCHEMA,
            "grid": spec.grid.to_dict(),
            "frame": spec.frame,
            "digest": spec.digest,
            "recipe": spec.recipe,
            "settings": spec.settings,
            "chunk_rows": spec.chunk_rows,
        }
        return cls(root)

    @staticmethod
    def is_finished(path: str | Path) -> bool:
        """Tell whether there is a store whose metadata are complete; its shards may be pending."""
        place = open_place(path, write=False)
        if not has(place, "zarr.json"):
            return False
        try:
            return "distspec" in zarr.open_group(place, mode="r", zarr_format=3, use_consolidated=False).attrs
        except (ValueError, KeyError, TypeError) as error:
            raise LayoutError(f"the metadata of {path} are damaged: {error}; make the store again") from error

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> "SpectraStore":
        """Open a store for reading, or for adding shards and layers.

        Raises:
            StoreNotFoundError: there is none.
            LayoutError: its metadata are damaged or of another schema.
        """
        place = open_place(path, write=write)
        if not has(place, "zarr.json"):
            raise StoreNotFoundError(f"no store at {path}; run `distspec ingest` first")
        try:
            root = zarr.open_group(place, mode="r+" if write else "r", zarr_format=3, use_consolidated=False)
            meta = root.attrs.get("distspec")
        except (ValueError, KeyError, TypeError, zarr.errors.NodeNotFoundError) as error:
            raise LayoutError(f"the metadata of {path} are damaged: {error}; make the store again") from error
        if meta is None:
            raise StoreNotFoundError(f"{path} is not a finished store; run `distspec ingest` first")
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            raise LayoutError(f"{path} has another layout than schema {SCHEMA}; make the store again")
        return cls(root)

    @property
    def address(self) -> str:
        """The store's URL, or its path from the root: the same for a process in another folder."""
        return absolute(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        # By its address, to be read.
        return SpectraStore.open, (self.address,)

    @property
    def rows(self) -> int:
        """Number of spectra, those set aside included."""
        return self.base.rows

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.base.shards

    @property
    def column_names(self) -> list[str]:
        """Names of the catalogue columns."""
        return [name.removeprefix("columns/") for name in self.base.fields if name.startswith("columns/")]

    @property
    def recipe(self) -> str:
        """Digest of all that was done to the spectra, the frozen statistics of the sample included."""
        return self._recipe if self.statistics is None else f"{self._recipe}-{self.statistics.digest}"

    @property
    def finished(self) -> bool:
        """True when every shard is written and the look over all rows is done."""
        return self._sample.covers(self.base.parts) and not self.pending()

    def pending(self) -> list[int]:
        """Name the shards that are not yet ingested."""
        return self.base.pending()

    def inventory(self) -> Inventory:
        """Give the files that all rows came from, in the order of the rows."""
        return read_inventory(self._root, len(self.base.parts))

    def extend(self, rows: int, inventory: Inventory) -> None:
        """Make room for the rows of further files; what is there is not touched.

        Arguments:
            rows: number of new spectra, those that will be set aside included.
            inventory: the files that they come from, in order.
        """
        write_inventory(self._root["inventory"], len(self.base.parts), inventory)
        self.base.extend([*self.base.parts, rows])

    def write(self, shard: int, spectra: Spectra, columns: Columns) -> None:
        """Write one whole shard of spectra and its columns; see `Layer.write` for what is refused."""
        if spectra.grid != self.grid:
            raise LayoutError(f"spectra on {spectra.grid}; the store keeps {self.grid}")
        named = {f"columns/{name}": values for name, values in columns.items()}
        self.base.write(shard, {"flux": spectra.flux, "ivar": spectra.ivar, **named})

    def read(self, shard: int, *, frozen: bool = True) -> Spectra:
        """Read one shard of spectra, with the frozen statistics of the sample applied unless told otherwise."""
        return self.between(*self.base.bounds(shard), frozen=frozen)

    def between(
        self,
        start: int,
        stop: int,
        *,
        frozen: bool = True,
        rooms: Sequence[Float32[np.ndarray, "n pixels"] | None] = (None, None),
    ) -> Spectra:
        """Read a run of rows, as `read` does; see `Layer.read` for the rooms of flux and ivar."""
        flux, ivar = (
            self.base.read(name, start, stop, room) for name, room in zip(("flux", "ivar"), rooms, strict=True)
        )
        redshift = self.base.read("columns/z", start, stop) if self.frame == "observed" else None
        spectra = Spectra(np.arange(start, stop, dtype=np.int64), flux, ivar, self.grid, redshift)
        statistics = self.statistics
        if statistics is None or not frozen:
            return spectra
        layer = self._sample.layer_below(stop, self.rows)
        return statistics.apply(spectra, None if layer is None else layer.read("factor", start, stop))

    def take(self, rows: Int64[np.ndarray, "m"], *, frozen: bool = True) -> Spectra:
        """Read single spectra, in the order given, as `read` does."""
        rows = np.asarray(rows, dtype=np.int64)
        redshift = self.base.take("columns/z", rows) if self.frame == "observed" else None
        spectra = Spectra(rows, self.base.take("flux", rows), self.base.take("ivar", rows), self.grid, redshift)
        statistics = self.statistics
        if statistics is None or not frozen:
            return spectra
        layer = self._sample.layer_below(int(rows.max()) + 1 if len(rows) else 0, self.rows)
        return statistics.apply(spectra, None if layer is None else layer.take("factor", rows))

    def status(self, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "n"]:
        """Read the status of a run of rows: what preparation found, and what the look over all rows added."""
        status: Int32[np.ndarray, "n"] = self.base.read("columns/status", start, stop)
        layer = self._sample.layer_below(self.rows if stop is None else stop, self.rows)
        return status if layer is None else status | layer.read("status", start, stop)

    def column(self, name: str, rows: Int64[np.ndarray, "m"] | None = None) -> Shaped[np.ndarray, "m ..."]:
        """Read one catalogue column, whole or for some rows; `status` as the method of that name gives it."""
        if name == "status":
            if rows is None:
                return self.status()
            status = self.base.take("columns/status", rows)
            layer = self._sample.layer_below(int(rows.max()) + 1 if len(rows) else 0, self.rows)
            return status if layer is None else status | layer.take("status", rows)
        field = f"columns/{name}"
        return self.base.read(field) if rows is None else self.base.take(field, rows)

    @property
    def statistics(self) -> Statistics | None:
        """The frozen statistics of the sample; None where the recipe asks for none.

        Raises:
            LayoutError: they are damaged.
        """
        return self._sample.statistics

    @property
    def is_frozen(self) -> bool:
        """True once the statistics of the sample are settled, if only that there are none."""
        return self._sample.is_frozen

    def freeze(self, statistics: Statistics | None) -> None:
        """Keep the statistics of the sample; from now on they are applied to all that is read.

        Raises:
            StoreError: other statistics are frozen already.
        """
        self._sample.freeze(statistics)

    @property
    def has_sample_layer(self) -> bool:
        """True where an earlier look over all rows found something to keep."""
        return self._sample.has_layer

    def sample_layer(self) -> Layer:
        """Open the layer of what a look over all rows finds for writing, or make it; it covers all rows."""
        return self.create_layer(SAMPLE_LAYER, SAMPLE_FIELDS)

    def forget_sample_layer(self) -> None:
        """Let the next ingest make that layer again, where it is lost; what it finds does not change."""
        self._sample.forget_layer()

    def mark_finished(self) -> None:
        """Say that the look over all rows is done, by a layer or because nothing asked for one."""
        self._sample.mark_finished(self.base.parts)

    def reload(self) -> None:
        """Read again what belongs to the whole sample."""
        self._sample.reload()

    @property
    def damage(self) -> list[str]:
        """What is wrong with what belongs to the whole sample; such a store is not read."""
        return self._sample.damage

    def create_layer(
        self,
        name: str,
        fields: Fields,
        attributes: dict[str, Any] | None = None,
        *,
        rows: int | None = None,
        shard_rows: int | None = None,
    ) -> Layer:
        """Open the layer of this name, or make it empty.

        Arguments:
            name: stage and digest, such as `score-0123456789ab`.
            fields: what is kept per row.
            attributes: facts about the whole layer, for the reader.
            rows: length of the leading axis, if not that of the store (a list of selected rows).
            shard_rows: rows in a shard, if not those of the store.

        A layer over the rows of the store grows with it: its new shards are pending.

        Raises:
            LayoutError: a layer of this name has other fields or rows.
            StoreError: the store cannot be written.
        """
        parts = list(self.base.parts) if rows is None else [rows]
        shard_rows = self.base.shard_rows if shard_rows is None else shard_rows
        layers = layer_group(self._root)
        group = group_of(layers, name) if has(self._root.store, f"{layers.path}/{name}/zarr.json") else None
        if group is not None and "distspec" in group.attrs:
            layer = Layer(group, name)
            if (
                layer.fields != fields
                or layer.shard_rows != shard_rows
                or list(layer.parts) != parts[: len(layer.parts)]
            ):
                raise LayoutError(f"layer {name} has other fields or rows than asked for; remove it and run again")
            layer.extend(parts)
            return layer
        try:
            chunk_rows = min(self.chunk_rows, shard_rows)
            create_layer(layers, name, parts, shard_rows, chunk_rows, fields, attributes or {})
        except OSError as error:
            raise StoreError(f"cannot add layer {name} to {place_of(self._root)}: {error}") from error
        return Layer(layers[name], name)

    def layer(self, name: str) -> Layer:
        """Open a layer.

        Raises:
            StoreNotFoundError: there is none of this name.
        """
        layers = layer_group(self._root)
        if not has(self._root.store, f"{layers.path}/{name}/zarr.json"):
            raise StoreNotFoundError(f"{place_of(self._root)} has no layer {name!r}; run its stage first")
        return open_layer(layers, name)

    def layers(self) -> list[str]:
        """Name all layers of results, in alphabetical order."""
        # By their folders: a damaged layer is named too, and opening it says what is wrong.
        names = names_in(self._root.store, layer_group(self._root).path)
        return sorted(name for name in names if name not in (SAMPLE_LAYER, "zarr.json") and ".partial" not in name)

    def all_layers(self) -> list[Layer]:
        """Open the base arrays, the layer of the sample and all layers of results."""
        sample = [] if self._sample.layer is None else [self._sample.layer]
        return [self.base, *sample, *(self.layer(name) for name in self.layers())]

    def arrow(self, rows: Any = None, columns: Sequence[str] | None = None, layers: Sequence[str] | None = None) -> Any:
        """Give catalogue, scores and value-added columns as a `pyarrow.Table`, units in the metadata of its fields.

        Arguments:
            rows: positions, or a boolean for each row of the store; None takes all, which for tens of millions needs
                gigabytes: name `columns`, or use `distspec export`.
            columns: names wanted; None takes all (see `distspec.store.table.Catalogue`).
            layers: layers that give columns; None takes all scores and value-added tables.
        """
        from distspec.store.table import selected

        return selected(self, rows, columns, layers)

    def table(self, rows: Any = None, columns: Sequence[str] | None = None, layers: Sequence[str] | None = None) -> Any:
        """Give the same as an `astropy.table.QTable`: NaN or masked where missing, quantities where there is a unit."""
        from distspec.store.arrow import to_qtable

        return to_qtable(self.arrow(rows, columns, layers))

    def pandas(
        self, rows: Any = None, columns: Sequence[str] | None = None, layers: Sequence[str] | None = None
    ) -> Any:
        """Give the same as a `pandas.DataFrame` with Arrow's types: ids stay exact; units are in `attrs["units"]`."""
        from distspec.store.arrow import to_pandas

        return to_pandas(self.arrow(rows, columns, layers))

    def to_dask(self, columns: Sequence[str] | None = None, layers: Sequence[str] = ()) -> Any:
        """Give flux, ivar, columns and layers as lazy dask arrays in the store's chunks (see `distspec.store.lazy`)."""
        from distspec.store.lazy import to_dask

        return to_dask(self, columns, layers)

    def to_xarray(self, columns: Sequence[str] | None = None, layers: Sequence[str] = ()) -> Any:
        """Give the same as a lazy `xarray.Dataset` with wavelengths and units."""
        from distspec.store.lazy import to_xarray

        return to_xarray(self, columns, layers)

    def __repr__(self) -> str:
        done = self.shards - len(self.pending())
        return (
            f"SpectraStore({self.rows} rows on {self.grid}; {done} of {self.shards} shards; "
            f"layers: {', '.join(self.layers()) or 'none'})"
        )


def limit_threads(threads: int) -> None:
    """Let this process decode chunks with at most so many threads; for workers that share a machine."""
    use_threads(threads)
    zarr.config.set({"threading.max_workers": threads, "async.concurrency": max(threads, 2)})
