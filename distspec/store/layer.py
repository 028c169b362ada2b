"""Named fields over the same rows, written and read by shard: the base arrays of a store and all that is derived.

Rows come in parts: those of the first ingest, then those of each extension. A part begins with a shard of its own, so
that no shard that is written is ever touched again; only the last shard of a part may be short. In the arrays each
shard takes `shard_rows` rows, so that behind a short one in the middle some rows hold fill values and are never read.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int64, Shaped
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from distspec.addresses import absolute
from distspec.errors import LayoutError, PartialShardError, StoreError, StoreNotFoundError
from distspec.store.coding import SCHEMA, Fields, checksum_of, field_of, kind_of, length_of
from distspec.store.marks import mark_of, set_mark, written_shards
from distspec.store.places import open_place, place_of
from distspec.store.shard_files import ChunkError, ShardFiles, shard_files, side_by_side

__all__ = ["Layer", "group_of", "layer_group", "open_layer"]

_GIVEN_UP = "given-up"
"""Folder in a layer: for each shard with rows that ended their workers, which, and why."""


def _open_again(address: str, name: str) -> "Layer":
    return Layer(zarr.open_group(open_place(address, write=False), mode="r", use_consolidated=False), name)


class Layer:
    """Named fields over the same rows.

    Made by `SpectraStore.create_layer` and opened by `SpectraStore.layer`.
    """

    def __init__(self, group: zarr.Group, name: str) -> None:
        try:
            meta = group.attrs["distspec"]
        except KeyError:
            raise StoreNotFoundError(
                f"{place_of(group)} holds no finished layer {name!r}; run its stage again"
            ) from None
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            found = meta.get("schema") if isinstance(meta, dict) else meta
            raise LayoutError(f"{place_of(group)} has schema {found}; expected {SCHEMA}; make the store again")
        self.name = name
        self.shard_rows = int(meta["shard_rows"])
        self.attributes: dict[str, Any] = dict(meta["attributes"])
        self.fields: Fields = {key: (dtype, tuple(shape)) for key, (dtype, shape) in meta["fields"].items()}
        self._group = group
        self._known = np.zeros(0, bool)  # shards that are known to be written
        self._readers: dict[str, Any] = {}
        self._direct: dict[str, ShardFiles | None] = {}
        self._set_parts(meta["parts"])

    def __reduce__(self) -> tuple[Any, ...]:
        # By its address, to be read: what travels to a worker is short, and is opened there.
        return _open_again, (absolute(place_of(self._group)), self.name)

    def _set_parts(self, parts: Sequence[int]) -> None:
        self.parts = tuple(int(rows) for rows in parts)
        self.rows = sum(self.parts)
        # First row and first shard of each part, and one past the last.
        self._part_rows = np.array([0, *accumulate(self.parts)], np.int64)
        self._part_shards = np.array([0, *accumulate(-(-rows // self.shard_rows) for rows in self.parts)], np.int64)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return int(self._part_shards[-1])

    def bounds(self, shard: int) -> tuple[int, int]:
        """Give the first and the one-past-last row of a shard."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} asked of {self.name}, which has {self.shards}")
        part = int(np.searchsorted(self._part_shards, shard, side="right")) - 1
        start = int(self._part_rows[part]) + (shard - int(self._part_shards[part])) * self.shard_rows
        return start, min(start + self.shard_rows, int(self._part_rows[part + 1]))

    def pending(self) -> list[int]:
        """Name the shards that are not yet written, in order."""
        return [int(shard) for shard in np.flatnonzero(~written_shards(self._group, self.shards))]

    def require_finished(self, advice: str) -> None:
        """Refuse a layer of which shards are not written.

        Arguments:
            advice: what to do about it.

        Raises:
            StoreError: some are pending.
        """
        missing = len(self.pending())
        if missing:
            raise StoreError(f"{self.name} lacks {missing} of {self.shards} shards; {advice}")

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
            arrays[key] = array.astype(object) if dtype == "string" else np.ascontiguousarray(array)
        place = shard * self.shard_rows
        try:
            for key, array in arrays.items():
                self._writer(key)[place : place + stop - start] = array
            set_mark(self._group, shard, checksum_of(arrays.values()) + 1)
        except OSError as error:
            raise StoreError(f"cannot write shard {shard} of {place_of(self._group)}: {error}") from error
        except Exception as error:
            # obstore's errors share no public base with OSError.
            if not type(error).__module__.startswith("obstore"):
                raise
            raise StoreError(f"cannot write shard {shard} of {place_of(self._group)}: {error}") from error

    def give_up(self, shard: int, rows: Sequence[int], why: str) -> None:
        """Keep beside a shard which of its rows have no values though they are usable; to be called before `write`.

        Arguments:
            shard: that is about to be written.
            rows: none where nothing is given up, also where it was earlier.
            why: in words.
        """
        place = self._group.store_path / _GIVEN_UP / f"{shard}.json"
        if rows:
            text = json.dumps({"rows": [int(row) for row in rows], "why": why})
            sync(place.set(default_buffer_prototype().buffer.from_bytes(text.encode())))
        elif sync(place.exists()):
            sync(place.delete())

    def given_up(self) -> dict[int, str]:
        """Give the usable rows without values, and why they have none.

        Raises:
            LayoutError: what is kept of them is damaged.
        """
        folder = self._group.store_path / _GIVEN_UP
        found: dict[int, str] = {}
        for key in sync(_keys(folder)):
            buffer = sync((folder / key).get(default_buffer_prototype()))
            try:
                told = {"rows": [], "why": ""} if buffer is None else json.loads(buffer.to_bytes())
                found.update({int(row): str(told["why"]) for row in told["rows"]})
            except (ValueError, KeyError, TypeError) as error:
                raise LayoutError(
                    f"{place_of(self._group)}/{_GIVEN_UP}/{key} is damaged ({error!r}); remove the layer and run its "
                    "stage again"
                ) from error
        return dict(sorted(found.items()))

    def read(
        self, field: str, start: int = 0, stop: int | None = None, room: Shaped[np.ndarray, "n ..."] | None = None
    ) -> Shaped[np.ndarray, "n ..."]:
        """Read rows `start` to `stop` of one field; a `room` like the result may become it, which saves fresh memory.

        Raises:
            PartialShardError: a shard in the range is not written yet.
            StoreError: a chunk is missing or damaged.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}-{stop} asked of {self.name}, which has {self.rows}")
        found = list(self._runs(start, stop))
        runs = [self._load(field, *run, room if len(found) == 1 else None) for run in found]
        return runs[0] if len(runs) == 1 else np.asarray(np.concatenate(runs or [self._load(field, 0, 0)]))

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
        part = np.searchsorted(self._part_rows, unique, side="right") - 1
        place = unique - self._part_rows[part] + self._part_shards[part] * self.shard_rows
        # Rows in order stand in order in the arrays, too: those of a chunk follow one another.
        chunks, firsts = np.unique(place // height, return_index=True)
        held = np.split(place, firsts)[1:]
        found = [self._load(field, 0, 0)] * (len(chunks) + 1)

        def load(number: int) -> None:
            start = int(chunks[number]) * height
            found[number] = self._load(field, start, min(start + height, self._end))[held[number] - start]

        direct = self._direct[field]
        side_by_side(load, range(len(chunks)), 1 if direct is None else direct.threads)
        return np.asarray(np.concatenate(found)[inverse])

    def written(self) -> list[int]:
        """Name the shards that are written, in order."""
        return [int(shard) for shard in np.flatnonzero(written_shards(self._group, self.shards))]

    def verify(self, shard: int) -> str:
        """Read all fields of a written shard and compare them with its mark.

        Returns:
            What is wrong with it; empty where nothing is.
        """
        try:
            arrays = self.read_shard(shard, *self.fields)
        except StoreError as error:
            return str(error)
        whole = checksum_of(
            array.astype(object) if self.fields[key][0] == "string" else np.ascontiguousarray(array)
            for key, array in zip(self.fields, arrays, strict=True)
        )
        if whole + 1 != mark_of(self._group, shard):
            start, stop = self.bounds(shard)
            return f"{place_of(self._group)}: rows {start}-{stop} are not what their mark says was written"
        return ""

    def reopen(self, shard: int) -> None:
        """Take the mark of a shard away, so that its stage writes it again."""
        set_mark(self._group, shard, 0)
        self._known = np.zeros(0, bool)

    def extend(self, parts: Sequence[int]) -> None:
        """Make room for more parts; rows that are there stay as they are.

        Arguments:
            parts: rows of all parts, those that are there first.

        Raises:
            LayoutError: the parts do not begin with those that are there.
        """
        if tuple(parts[: len(self.parts)]) != self.parts:
            raise LayoutError(f"{self.name} has parts of {list(self.parts)} rows; {list(parts)} do not continue them")
        if len(parts) == len(self.parts):
            return
        self._set_parts(parts)
        for key in self.fields:
            array = self._group[key]
            array.resize((self._end, *array.shape[1:]))
        self._group["commits"].resize((self.shards,))
        # Only now is the room part of the layer; until then it is not read.
        meta = dict(self._group.attrs["distspec"]) | {"parts": list(self.parts)}
        self._group.attrs["distspec"] = meta
        self._readers.clear()

    @property
    def _end(self) -> int:
        """Length of the leading axis of the arrays."""
        return length_of(self.parts, self.shard_rows)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Give the runs of the arrays' leading axis that hold rows `start` to `stop`: one for each part."""
        for part, first in enumerate(self._part_rows[:-1]):
            low, high = max(start, int(first)), min(stop, int(self._part_rows[part + 1]))
            if low < high:
                shift = int(self._part_shards[part]) * self.shard_rows - int(first)
                yield low + shift, high + shift

    def _load(
        self, field: str, start: int, stop: int, room: Shaped[np.ndarray, "n ..."] | None = None
    ) -> Shaped[np.ndarray, "n ..."]:
        """Read a run of the arrays' leading axis."""
        reader, direct = self._reader(field), self._direct[field]
        self._require_written(range(start // self.shard_rows, -(-stop // self.shard_rows) if stop > start else 0))
        # Whole chunks only: a codec that decodes a part of a chunk does not check its checksum. (For the same reason
        # zarrs does not read for us: 0.2.3 skips the checksums of chunks inside a shard.)
        height = reader.chunks[0]
        first, last = start // height * height, min(-(-stop // height) * height, reader.shape[0])
        try:
            if direct is None:
                self._require_files(reader, field, start, stop)
                values = reader[first:last][start - first : stop - first]
            else:
                values = direct.read(start, stop, room)
        except StoreError:
            raise
        except ChunkError as error:
            if not error.why:
                raise self._lost(field, error.shard, error.key) from error
            begin = error.shard * self.shard_rows
            raise self._damaged(field, max(first, begin), min(last, begin + self.shard_rows), error.why) from error
        except Exception as error:  # each codec fails in its own way; all mean a damaged chunk
            raise self._damaged(field, first, last, str(error)) from error
        if self.fields[field][0] == "string":
            return np.array(values.tolist(), dtype=str).reshape(values.shape)
        return np.asarray(values)

    def _damaged(self, field: str, first: int, last: int, why: str) -> StoreError:
        rows = self._rows_at(first, last)
        return StoreError(
            f"{place_of(self._group)}/{field} is damaged in rows {rows[0]}-{rows[1]} ({why}); "
            "`distspec ingest --check` tells what else is, `--mend` makes it again"
        )

    def _lost(self, field: str, shard: int, key: str) -> StoreError:
        start, stop = self.bounds(shard)
        return StoreError(
            f"{place_of(self._group)}/{field} has lost rows {start}-{stop} (file {key} is missing); "
            "`distspec ingest --check` tells what else is missing, `--mend` makes it again"
        )

    def _rows_at(self, first: int, last: int) -> tuple[int, int]:
        """Give the rows that a run of the leading axis holds."""
        shard = first // self.shard_rows
        start, stop = self.bounds(shard)
        shift = start - shard * self.shard_rows
        return first + shift, min(last + shift, stop) if last <= (shard + 1) * self.shard_rows else last + shift

    def _writer(self, field: str) -> Any:
        # Written even where all values equal the fill value, so that a missing file always means loss.
        with zarr.config.set({"array.write_empty_chunks": True}):
            return self._group[field]

    def _reader(self, field: str) -> Any:
        if field not in self.fields:
            raise LayoutError(f"{self.name} has no field {field!r}; it has {', '.join(self.fields)}")
        if field not in self._readers:
            try:
                array = self._group[field]
            except Exception as error:  # whatever zarr makes of damaged JSON
                raise LayoutError(
                    f"the metadata of {place_of(self._group)}/{field} are missing or damaged ({error!r}); "
                    "remove the store or the layer and run its stage again"
                ) from error
            dtype, shape = self.fields[field]
            expected = (self._end, *shape)
            # A killed extension leaves arrays longer than they need to be. Anything else is foreign, and is refused
            # before memory is allocated for what it claims.
            if array.shape[1:] != shape or array.shape[0] < self._end or kind_of(array) != dtype:
                raise LayoutError(
                    f"{place_of(self._group)}/{field} is {kind_of(array)}{list(array.shape)}; expected "
                    f"{dtype}{list(expected)}; make the store again"
                )
            self._direct[field] = shard_files(array)
            self._readers[field] = array
        return self._readers[field]

    def _require_written(self, shards: range) -> None:
        """Refuse shards that are not written."""
        asked = slice(shards.start, shards.stop)
        if len(self._known) < shards.stop or not self._known[asked].all():
            # All at once, and again only for what was not written then.
            self._known = written_shards(self._group, self.shards)
        if not self._known[asked].all():
            start, stop = self.bounds(shards.start + int(np.argmin(self._known[asked])))
            raise PartialShardError(
                f"rows {start}-{stop} of {place_of(self._group)} are not written yet; run the stage again to finish it"
            )

    def _require_files(self, array: Any, field: str, start: int, stop: int) -> None:
        """Refuse a run of the leading axis that has lost a file: zarr itself would read fill values there."""
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows) if stop > start else 0):
            key = array.metadata.encode_chunk_key((shard,) + (0,) * (array.ndim - 1))
            if not sync((array.store_path / key).exists()):
                raise self._lost(field, shard, key)

    def __repr__(self) -> str:
        done = self.shards - len(self.pending())
        return f"Layer({self.name}: {self.rows} rows, {', '.join(self.fields)}; {done} of {self.shards} shards)"


async def _keys(folder: Any) -> list[str]:
    return [key async for key in folder.store.list_dir(folder.path)]


def open_layer(parent: zarr.Group, name: str) -> Layer:
    """Open a layer that lies in a group.

    Raises:
        StoreNotFoundError: it is not finished.
        LayoutError: its metadata are damaged or of another schema.
    """
    return Layer(group_of(parent, name), name)


def group_of(parent: zarr.Group, name: str) -> zarr.Group:
    """Open the group of a layer, finished or not.

    Raises:
        LayoutError: its metadata are missing or damaged.
    """
    try:
        return parent[name]
    except Exception as error:  # whatever zarr makes of damaged JSON
        # What is in the folder of results can be made again by itself.
        result = parent.basename == "layers"
        advice = "remove it and run its stage again" if result else "make the store again"
        raise LayoutError(
            f"the metadata of {place_of(parent)}/{name} are missing or damaged ({error!r}); {advice}"
        ) from error


def layer_group(root: zarr.Group) -> zarr.Group:
    """Open the group of a store's results.

    Raises:
        LayoutError: its metadata are missing or damaged.
    """
    try:
        return root["layers"]
    except Exception as error:  # whatever zarr makes of damaged JSON
        raise LayoutError(
            f"the metadata of {place_of(root)}/layers are missing or damaged ({' '.join(repr(error).split())}); "
            "make the store again"
        ) from error
