"""Spectra and everything derived from them, as rows x pixels on Zarr v3. The only file that knows zarr.

    store.zarr/
      zarr.json            grid, recipe, schema number: written last, so a half-made store is not a store
      base/flux, ivar      float32 [rows, pixels], in shards of compressed, checksummed chunks
      base/columns/<name>  one array per catalogue column; ids are int64 or strings
      base/commits         one mark per shard, written after all other arrays of the shard
      layers/<name>-<digest>/<field>, commits    results, named by the settings that made them

A shard is the unit of work. It is written whole or refused, so no two writers meet; its mark is written last, so a
killed writer leaves nothing that a reader takes for whole; the same data give the same bytes, so a retry is safe. A
chunk that is missing or damaged is an error and never a fill value.
"""

import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int64, Shaped
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.sync import sync

from distspec.errors import LayoutError, PartialShardError, StoreError, StoreNotFoundError
from distspec.spectra import Columns, Spectra, WaveGrid

__all__ = ["SCHEMA", "Fields", "Layer", "SpectraStore", "field_of", "limit_threads"]

SCHEMA = 1
"""Number of the layout above; another one is refused."""

Fields = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype ("string" for text) and shape behind the leading axis."""

_SHARDED_BYTES = 1 << 22
"""Arrays whose shard is larger than this are cut into chunks inside the shard."""


def field_of(values: Shaped[np.ndarray, "n ..."]) -> tuple[str, tuple[int, ...]]:
    """Describe an array as a field: its dtype (text becomes "string") and its shape behind the leading axis."""
    return ("string" if values.dtype.kind in "UOT" else values.dtype.str.lstrip("<|="), values.shape[1:])


class Layer:
    """Named fields over the same rows, written and read by shard.

    Made by `SpectraStore.create_layer` and opened by `SpectraStore.layer`.
    """

    def __init__(self, group: zarr.Group, name: str) -> None:
        try:
            meta = group.attrs["distspec"]
        except KeyError:
            raise StoreNotFoundError(f"{_place(group)} holds no finished layer {name!r}; run its stage again") from None
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            found = meta.get("schema") if isinstance(meta, dict) else meta
            raise LayoutError(f"{_place(group)} has schema {found}; expected {SCHEMA}; make the store again")
        self.name = name
        self.rows = int(meta["rows"])
        self.shard_rows = int(meta["shard_rows"])
        self.attributes: dict[str, Any] = dict(meta["attributes"])
        self.fields: Fields = {key: (dtype, tuple(shape)) for key, (dtype, shape) in meta["fields"].items()}
        self._group = group
        self._readers: dict[str, Any] = {}

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Give the first and the one-past-last row of a shard."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def pending(self) -> list[int]:
        """Name the shards that are not yet written, in order."""
        marks = np.asarray(self._group["commits"][:])
        return [int(shard) for shard in np.flatnonzero(marks == 0)]

    def write(self, shard: int, values: Mapping[str, Shaped[np.ndarray, "n ..."]]) -> None:
        """Write all fields of one shard, then its mark.

        Raises:
            PartialShardError: a field is missing, unknown, or does not cover the shard.
            LayoutError: a field has another dtype or shape.
            StoreError: the disk refuses.
        """
        start, stop = self.bounds(shard)
        if set(values) != set(self.fields):
            raise PartialShardError(
                f"shard {shard} of {self.name} got fields {sorted(values)}; expected {sorted(self.fields)}, all at once"
            )
        checksum = 0
        arrays = {}
        for key in self.fields:
            dtype, shape = self.fields[key]
            array = np.asarray(values[key])
            if array.shape[:1] != (stop - start,):
                raise PartialShardError(
                    f"{key} has {len(array)} rows; shard {shard} of {self.name} is rows {start}-{stop}, written whole"
                )
            if array.shape[1:] != shape or field_of(array)[0] != dtype:
                raise LayoutError(
                    f"{key} is {array.dtype}{list(array.shape[1:])}; {self.name} keeps {dtype}{list(shape)}"
                )
            if dtype == "string":
                array = array.astype(object)
                checksum = zlib.crc32("\0".join(array.ravel().tolist()).encode(), checksum)
            else:
                array = np.ascontiguousarray(array)
                checksum = zlib.crc32(array.data, checksum)
            arrays[key] = array
        try:
            for key, array in arrays.items():
                self._writer(key)[start:stop] = array
            self._group["commits"][shard] = checksum + 1
        except OSError as error:
            raise StoreError(f"cannot write shard {shard} of {_place(self._group)}: {error}") from error

    def read(self, field: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "n ..."]:
        """Read rows `start` to `stop` of one field.

        Raises:
            PartialShardError: a shard in the range is not written yet.
            StoreError: a chunk is missing or damaged.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}-{stop} asked of {self.name}, which has {self.rows}")
        return self._load(field, start, stop)

    def read_shard(self, shard: int, *fields: str) -> tuple[Shaped[np.ndarray, "n ..."], ...]:
        """Read some fields of one shard."""
        start, stop = self.bounds(shard)
        return tuple(self.read(field, start, stop) for field in fields)

    def take(self, field: str, rows: Int64[np.ndarray, "m"]) -> Shaped[np.ndarray, "m ..."]:
        """Read single rows of one field, in the order given; only the chunks that hold them are decoded."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()}-{rows.max()} asked of {self.name}, which has {self.rows}")
        height = self._reader(field).chunks[0]
        unique, inverse = np.unique(rows, return_inverse=True)
        parts = [self._load(field, 0, 0)]
        for chunk in np.unique(unique // height):
            start, stop = int(chunk) * height, min((int(chunk) + 1) * height, self.rows)
            parts.append(self._load(field, start, stop)[unique[unique // height == chunk] - start])
        return np.concatenate(parts)[inverse]

    def _load(self, field: str, start: int, stop: int) -> Shaped[np.ndarray, "n ..."]:
        reader = self._reader(field)
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows) if stop > start else 0):
            self._require(reader, field, shard)
        # Whole chunks only: a codec that decodes a part of a chunk does not check its checksum. (For the same reason
        # arrays are read by zarr's own codecs: zarrs 0.2.3 skips the checksums of chunks inside a shard.)
        height = reader.chunks[0]
        first, last = start // height * height, min(-(-stop // height) * height, self.rows)
        try:
            values = reader[first:last][start - first : stop - first]
        except Exception as error:  # each codec fails in its own way; all mean a damaged chunk
            raise StoreError(
                f"{_place(self._group)}/{field} is damaged in rows {first}-{last} ({error}); "
                "remove the store or the layer and run its stage again"
            ) from error
        return np.array(values.tolist(), dtype=str) if self.fields[field][0] == "string" else np.asarray(values)

    def _writer(self, field: str) -> Any:
        # Written even where all values equal the fill value, so that a missing file always means loss.
        with zarr.config.set({"array.write_empty_chunks": True}):
            return self._group[field]

    def _reader(self, field: str) -> Any:
        if field not in self.fields:
            raise LayoutError(f"{self.name} has no field {field!r}; it has {', '.join(self.fields)}")
        if field not in self._readers:
            try:
                self._readers[field] = self._group[field]
            except Exception as error:  # whatever zarr makes of damaged JSON
                raise LayoutError(
                    f"the metadata of {_place(self._group)}/{field} are missing or damaged ({error!r}); "
                    "remove the store or the layer and run its stage again"
                ) from error
        return self._readers[field]

    def _require(self, array: Any, field: str, shard: int) -> None:
        """Refuse a shard that is not committed or has lost a file: zarr itself would read fill values there."""
        if int(self._group["commits"][shard]) == 0:
            start, stop = self.bounds(shard)
            raise PartialShardError(
                f"rows {start}-{stop} of {_place(self._group)} are not written yet; run the stage again to finish it"
            )
        key = array.metadata.encode_chunk_key((shard,) + (0,) * (array.ndim - 1))
        if not sync((array.store_path / key).exists()):
            start, stop = self.bounds(shard)
            raise StoreError(
                f"{_place(self._group)}/{field} has lost rows {start}-{stop} (file {key} is missing); "
                "remove the store or the layer and run its stage again"
            )

    def __repr__(self) -> str:
        done = self.shards - len(self.pending())
        return f"Layer({self.name}: {self.rows} rows, {', '.join(self.fields)}; {done} of {self.shards} shards)"


class SpectraStore:
    """A survey on one grid: flux, ivar, catalogue columns, and the layers derived from them.

    Example:
        >>> store = SpectraStore.open("survey.zarr")  # doctest: +SKIP
        >>> store.read(0)  # doctest: +SKIP
        Spectra(16384 on WaveGrid(log, 3388.0-8318.0 Å, 1000 pixels))
    """

    def __init__(self, root: zarr.Group) -> None:
        self._root = root
        self.base = _open_layer(root, "base")
        meta = root.attrs["distspec"]
        self.path = _place(root)
        self.chunk_rows = int(meta["chunk_rows"])
        self.grid = WaveGrid(**meta["grid"])
        self.frame = str(meta["frame"])
        self.digest = str(meta["digest"])
        self.recipe = str(meta["recipe"])
        self.settings: dict[str, Any] = dict(meta["settings"])

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
    ) -> "SpectraStore":
        """Make an empty store: all metadata, no spectra. What an interrupted call left at `path` is replaced.

        Arguments:
            path: folder of the store.
            grid: wavelengths of all spectra.
            frame: "rest" or "observed".
            rows: number of spectra, including those that will be set aside.
            shard_rows: spectra in a shard.
            chunk_rows: spectra in a chunk; divides `shard_rows`.
            columns: catalogue columns.
            digest: names what the store was made from.
            recipe: digest of the preparation of the spectra; a model is used only on its own recipe.
            settings: the resolved settings, kept for the reader.

        Raises:
            StoreError: the path cannot be written, or holds something that is not a store.
        """
        folder = Path(path)
        try:
            if folder.exists() and any(folder.iterdir()):
                # Only what an interrupted call of this function leaves may be replaced.
                if not all(p.name in ("zarr.json", "base", "layers") or ".partial" in p.name for p in folder.iterdir()):
                    raise StoreError(f"{path} exists and is not a store; choose another output or move it away")
                if cls.is_finished(path):
                    raise StoreError(f"{path} already is a store; open it instead")
                shutil.rmtree(folder)
            root = zarr.open_group(folder, mode="w", zarr_format=3)
        except OSError as error:
            raise StoreError(f"cannot make a store at {path}: {error.strerror or error}") from error
        pixels = {"flux": ("f4", (grid.pixels,)), "ivar": ("f4", (grid.pixels,))}
        fields = pixels | {f"columns/{name}": field for name, field in columns.items()}
        _create_layer(root, "base", rows, shard_rows, chunk_rows, fields, {})
        root.create_group("layers")
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
        if not (Path(path) / "zarr.json").is_file():
            return False
        try:
            return "distspec" in zarr.open_group(path, mode="r", use_consolidated=False).attrs
        except (ValueError, KeyError, TypeError) as error:
            raise LayoutError(f"the metadata of {path} are damaged: {error}; make the store again") from error

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> "SpectraStore":
        """Open a store for reading, or for adding shards and layers.

        Raises:
            StoreNotFoundError: there is none.
            LayoutError: its metadata are damaged or of another schema.
        """
        if not (Path(path) / "zarr.json").is_file():
            raise StoreNotFoundError(f"no store at {path}; run `distspec ingest` first")
        try:
            root = zarr.open_group(path, mode="r+" if write else "r", zarr_format=3, use_consolidated=False)
            meta = root.attrs.get("distspec")
        except (ValueError, KeyError, TypeError, zarr.errors.NodeNotFoundError) as error:
            raise LayoutError(f"the metadata of {path} are damaged: {error}; make the store again") from error
        if meta is None:
            raise StoreNotFoundError(f"{path} is not a finished store; run `distspec ingest` first")
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            raise LayoutError(f"{path} has another layout than schema {SCHEMA}; make the store again")
        return cls(root)

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

    def pending(self) -> list[int]:
        """Name the shards that are not yet ingested."""
        return self.base.pending()

    def write(self, shard: int, spectra: Spectra, columns: Columns) -> None:
        """Write one whole shard of spectra and its columns; see `Layer.write` for what is refused."""
        if spectra.grid != self.grid:
            raise LayoutError(f"spectra on {spectra.grid}; the store keeps {self.grid}")
        named = {f"columns/{name}": values for name, values in columns.items()}
        self.base.write(shard, {"flux": spectra.flux, "ivar": spectra.ivar, **named})

    def read(self, shard: int) -> Spectra:
        """Read one shard of spectra."""
        start, stop = self.base.bounds(shard)
        flux, ivar = self.base.read_shard(shard, "flux", "ivar")
        redshift = self.base.read("columns/z", start, stop) if self.frame == "observed" else None
        return Spectra(np.arange(start, stop, dtype=np.int64), flux, ivar, self.grid, redshift)

    def take(self, rows: Int64[np.ndarray, "m"]) -> Spectra:
        """Read single spectra, in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        redshift = self.base.take("columns/z", rows) if self.frame == "observed" else None
        return Spectra(rows, self.base.take("flux", rows), self.base.take("ivar", rows), self.grid, redshift)

    def column(self, name: str, rows: Int64[np.ndarray, "m"] | None = None) -> Shaped[np.ndarray, "m ..."]:
        """Read one catalogue column, whole or for some rows."""
        field = f"columns/{name}"
        return self.base.read(field) if rows is None else self.base.take(field, rows)

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

        Raises:
            LayoutError: a layer of this name has other fields or rows.
            StoreError: the store cannot be written.
        """
        rows = self.rows if rows is None else rows
        shard_rows = self.base.shard_rows if shard_rows is None else shard_rows
        layers = self._root["layers"]
        if name in layers and "distspec" in layers[name].attrs:
            layer = Layer(layers[name], name)
            if layer.fields != fields or (layer.rows, layer.shard_rows) != (rows, shard_rows):
                raise LayoutError(f"layer {name} has other fields or rows than asked for; remove it and run again")
            return layer
        try:
            chunk_rows = min(self.chunk_rows, shard_rows)
            _create_layer(layers, name, rows, shard_rows, chunk_rows, fields, attributes or {})
        except OSError as error:
            raise StoreError(f"cannot add layer {name} to {_place(self._root)}: {error}") from error
        return Layer(layers[name], name)

    def layer(self, name: str) -> Layer:
        """Open a layer.

        Raises:
            StoreNotFoundError: there is none of this name.
        """
        if name not in self._root["layers"]:
            raise StoreNotFoundError(f"{_place(self._root)} has no layer {name!r}; run its stage first")
        return _open_layer(self._root["layers"], name)

    def layers(self) -> list[str]:
        """Name all layers, in alphabetical order."""
        return sorted(self._root["layers"].group_keys())

    def __repr__(self) -> str:
        done = self.shards - len(self.pending())
        return (
            f"SpectraStore({self.rows} rows on {self.grid}; {done} of {self.shards} shards; "
            f"layers: {', '.join(self.layers()) or 'none'})"
        )


def _open_layer(parent: zarr.Group, name: str) -> Layer:
    try:
        group = parent[name]
    except Exception as error:  # whatever zarr makes of damaged JSON
        raise LayoutError(
            f"the metadata of {_place(parent)}/{name} are missing or damaged ({error!r}); make the store again"
        ) from error
    return Layer(group, name)


def limit_threads(threads: int) -> None:
    """Let this process decode chunks with at most so many threads; for workers that share a machine."""
    zarr.config.set({"threading.max_workers": threads, "async.concurrency": max(threads, 2)})


def _create_layer(
    parent: zarr.Group,
    name: str,
    rows: int,
    shard_rows: int,
    chunk_rows: int,
    fields: Fields,
    attributes: dict[str, Any],
) -> None:
    """Write the metadata of a layer; the attribute that makes it one comes last."""
    group = parent.create_group(name, overwrite=True)
    for key, (dtype, shape) in fields.items():
        _create_array(group, key, dtype, (rows, *shape), shard_rows, chunk_rows)
    shards = -(-rows // shard_rows)
    group.create_array(
        "commits", shape=(shards,), chunks=(1,), dtype="u8", fill_value=0, compressors=None, filters=None
    )
    group.attrs["distspec"] = {
        "schema": SCHEMA,
        "rows": rows,
        "shard_rows": shard_rows,
        "fields": {key: [dtype, list(shape)] for key, (dtype, shape) in fields.items()},
        "attributes": attributes,
    }


def _create_array(
    group: zarr.Group, key: str, dtype: str, shape: tuple[int, ...], shard_rows: int, chunk_rows: int
) -> None:
    text = dtype == "string"
    if text:
        group.create_array(key, shape=shape, dtype=str, chunks=(shard_rows, *shape[1:]), compressors=[Crc32cCodec()])
        return
    kind = np.dtype(dtype)
    # Bit planes of neighbouring pixels compress by a third where noise allows, and lz4 decodes faster than disks read.
    compressors = [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=kind.itemsize), Crc32cCodec()]
    big = kind.itemsize * int(np.prod(shape[1:])) * shard_rows > _SHARDED_BYTES and chunk_rows < shard_rows
    group.create_array(
        key,
        shape=shape,
        dtype=kind,
        chunks=(chunk_rows if big else shard_rows, *shape[1:]),
        shards=(shard_rows, *shape[1:]) if big else None,
        compressors=compressors,
        fill_value=np.nan if kind.kind == "f" else 0,
    )


def _place(group: zarr.Group) -> str:
    return str(group.store_path).removeprefix("file://")
