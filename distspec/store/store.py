"""Spectra and everything derived from them, as rows x pixels on Zarr v3. The only package that knows zarr.

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
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int32, Int64, Shaped

from distspec.errors import LayoutError, PartialShardError, StoreError, StoreNotFoundError
from distspec.spectra import Columns, Spectra, WaveGrid
from distspec.store.frozen import Statistics
from distspec.store.inventory import Inventory, read_inventory, write_inventory
from distspec.store.layer import SCHEMA, Fields, Layer, create_layer, group_of, open_layer
from distspec.store.places import clear, has, names_in, open_place, place_of
from distspec.store.shard_files import use_threads

__all__ = ["SpectraStore", "limit_threads"]

SECOND_LOOK = "second-look"

_COPY = "put them back from a copy, or make the store again"

_SECOND_LOOK_FIELDS: Fields = {"status": ("i4", ()), "factor": ("f4", ())}


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
        self.reload()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        grid: WaveGrid,
        frame: str,
        rows: int,
        shard_rows: int,
        chunk_rows: int,
        columns: Fields,
        digest: str,
        recipe: str,
        settings: dict[str, Any],
        inventory: Inventory | None = None,
    ) -> "SpectraStore":
        """Make an empty store: all metadata, no spectra. What an interrupted call left at `path` is replaced.

        Arguments:
            path: folder or URL of the store.
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
        pixels = {"flux": ("f4", (grid.pixels,)), "ivar": ("f4", (grid.pixels,))}
        fields = pixels | {f"columns/{name}": field for name, field in columns.items()}
        create_layer(root, "base", [rows], shard_rows, chunk_rows, fields, {})
        root.create_group("layers")
        root.create_group("inventory")
        write_inventory(root["inventory"], 0, Inventory.empty() if inventory is None else inventory)
        root.attrs["distspec"] = {
            "schema": SCHEMA,
            "grid": grid.to_dict(),
            "frame": frame,
            "digest": digest,
            "recipe": recipe,
            "settings": settings,
            "chunk_rows": chunk_rows,
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
        return self.path if "://" in self.path else str(Path(self.path).resolve())

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
        """True when every shard is written and the second look has been taken over all rows."""
        if self._root.attrs["distspec"].get("looked") != list(self.base.parts) or self.pending():
            return False
        return self._look is None or not self._look.pending()

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
        start, stop = self.base.bounds(shard)
        flux, ivar = self.base.read_shard(shard, "flux", "ivar")
        redshift = self.base.read("columns/z", start, stop) if self.frame == "observed" else None
        spectra = Spectra(np.arange(start, stop, dtype=np.int64), flux, ivar, self.grid, redshift)
        if self.statistics is None or not frozen:
            return spectra
        look = self._second(stop)
        return self.statistics.apply(spectra, None if look is None else look.read("factor", start, stop))

    def take(self, rows: Int64[np.ndarray, "m"], *, frozen: bool = True) -> Spectra:
        """Read single spectra, in the order given, as `read` does."""
        rows = np.asarray(rows, dtype=np.int64)
        redshift = self.base.take("columns/z", rows) if self.frame == "observed" else None
        spectra = Spectra(rows, self.base.take("flux", rows), self.base.take("ivar", rows), self.grid, redshift)
        if self.statistics is None or not frozen:
            return spectra
        look = self._second(int(rows.max()) + 1 if len(rows) else 0)
        return self.statistics.apply(spectra, None if look is None else look.take("factor", rows))

    def status(self, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "n"]:
        """Read the status of a run of rows: what preparation found, and what the second look added."""
        status: Int32[np.ndarray, "n"] = self.base.read("columns/status", start, stop)
        look = self._second(self.rows if stop is None else stop)
        return status if look is None else status | look.read("status", start, stop)

    def column(self, name: str, rows: Int64[np.ndarray, "m"] | None = None) -> Shaped[np.ndarray, "m ..."]:
        """Read one catalogue column, whole or for some rows; `status` as the method of that name gives it."""
        if name == "status":
            if rows is None:
                return self.status()
            status = self.base.take("columns/status", rows)
            look = self._second(int(rows.max()) + 1 if len(rows) else 0)
            return status if look is None else status | look.take("status", rows)
        field = f"columns/{name}"
        return self.base.read(field) if rows is None else self.base.take(field, rows)

    def freeze(self, statistics: Statistics | None) -> None:
        """Keep the statistics of the sample; from now on they are applied to all that is read.

        Raises:
            StoreError: other statistics are frozen already.
        """
        meta = self._root.attrs["distspec"]
        if "sample" in meta:
            if meta["sample"] != (None if statistics is None else statistics.digest):
                raise StoreError(f"{self.path} has frozen statistics {meta['sample']}; they cannot be changed")
            return
        if statistics is not None:
            group = self._root.create_group("sample", overwrite=True)
            for name, values in statistics.to_arrays().items():
                group.create_array(name, data=np.asarray(values))
        self._root.attrs["distspec"] = dict(meta) | {"sample": None if statistics is None else statistics.digest}
        self.reload()

    @property
    def is_frozen(self) -> bool:
        """True once the statistics of the sample are settled, if only that there are none."""
        return "sample" in self._root.attrs["distspec"]

    @property
    def has_look(self) -> bool:
        """True where an earlier second look found something to keep."""
        return self._look is not None or bool(self._root.attrs["distspec"].get("look"))

    def look(self) -> Layer:
        """Open the layer of the second look for writing, or make it; it covers all rows."""
        return self.create_layer(SECOND_LOOK, _SECOND_LOOK_FIELDS)

    def looked(self) -> None:
        """Say that the second look has been taken over all rows, by a layer or because nothing asked for one."""
        self.reload()
        told = {"looked": list(self.base.parts), "look": self._look is not None}
        self._root.attrs["distspec"] = dict(self._root.attrs["distspec"]) | told

    def forget_look(self) -> None:
        """Let the next ingest take the second look again, where it is lost; what it finds does not change."""
        if not self._look_damage:
            return
        meta = dict(self._root.attrs["distspec"])
        meta.pop("looked", None)
        meta.pop("look", None)
        self._root.attrs["distspec"] = meta
        self._layers.create_group(SECOND_LOOK, overwrite=True)
        self.reload()

    @property
    def damage(self) -> list[str]:
        """What is wrong with the frozen statistics and the second look; such a store is not read."""
        return [problem for problem in (self._sample_damage, self._look_damage) if problem]

    def reload(self) -> None:
        """Read again what belongs to the whole sample: the frozen statistics and the second look."""
        meta = self._root.attrs["distspec"]
        self._statistics, self._sample_damage = _read_statistics(self._root, meta.get("sample"))
        self._look, self._look_damage = None, ""
        try:
            if SECOND_LOOK in self._layers and "distspec" in self._layers[SECOND_LOOK].attrs:
                self._look = open_layer(self._layers, SECOND_LOOK)
        except Exception as error:  # whatever zarr makes of damaged JSON
            self._look_damage = f"{self.path}/layers/{SECOND_LOOK} is damaged ({' '.join(repr(error).split())})"
        if meta.get("look") and self._look is None and not self._look_damage:
            self._look_damage = f"{self.path}/layers/{SECOND_LOOK} is missing"
        if self._look_damage:
            self._look_damage += "; `distspec ingest --mend`, then `distspec ingest`, make it again"

    @property
    def statistics(self) -> Statistics | None:
        """The frozen statistics of the sample; None where the recipe asks for none.

        Raises:
            LayoutError: they are damaged.
        """
        if self._sample_damage:
            raise LayoutError(self._sample_damage)
        return self._statistics

    def _second(self, stop: int) -> Layer | None:
        """Give the second look for rows below `stop`, None where there was nothing to keep."""
        if self._look_damage:
            raise LayoutError(self._look_damage)
        if self._look is not None and stop > self._look.rows:
            raise PartialShardError(
                f"rows {self._look.rows}-{self.rows} of {self.path} are not settled; run `distspec ingest` to finish"
            )
        return self._look

    @property
    def _layers(self) -> zarr.Group:
        try:
            return self._root["layers"]
        except Exception as error:  # whatever zarr makes of damaged JSON
            raise LayoutError(
                f"the metadata of {self.path}/layers are missing or damaged ({' '.join(repr(error).split())}); "
                "make the store again"
            ) from error

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
        layers = self._layers
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
        if not has(self._root.store, f"{self._layers.path}/{name}/zarr.json"):
            raise StoreNotFoundError(f"{place_of(self._root)} has no layer {name!r}; run its stage first")
        return open_layer(self._layers, name)

    def layers(self) -> list[str]:
        """Name all layers of results, in alphabetical order."""
        # By their folders: a damaged layer is named too, and opening it says what is wrong.
        names = names_in(self._root.store, self._layers.path)
        return sorted(name for name in names if name not in (SECOND_LOOK, "zarr.json") and ".partial" not in name)

    def all_layers(self) -> list[Layer]:
        """Open the base arrays, the second look and all layers of results."""
        look = [] if self._look is None else [self._look]
        return [self.base, *look, *(self.layer(name) for name in self.layers())]

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

    def __repr__(self) -> str:
        done = self.shards - len(self.pending())
        return (
            f"SpectraStore({self.rows} rows on {self.grid}; {done} of {self.shards} shards; "
            f"layers: {', '.join(self.layers()) or 'none'})"
        )


def _read_statistics(root: zarr.Group, digest: str | None) -> tuple[Statistics | None, str]:
    """Read the frozen statistics of that digest; or say what is wrong with them."""
    if not digest:
        return None, ""
    place = f"{place_of(root)}/sample"
    try:
        group = root["sample"]
        found = Statistics.from_arrays({name: group[name][...] for name in group.array_keys()})
    except Exception as error:  # whatever zarr, its codecs and the statistics make of damage
        return None, f"the frozen statistics in {place} are damaged ({' '.join(repr(error).split())}); {_COPY}"
    if found.digest != digest:
        return None, f"the frozen statistics in {place} are {found.digest}; expected {digest}: damaged; {_COPY}"
    return found, ""


def limit_threads(threads: int) -> None:
    """Let this process decode chunks with at most so many threads; for workers that share a machine."""
    use_threads(threads)
    zarr.config.set({"threading.max_workers": threads, "async.concurrency": max(threads, 2)})
