"""Reading the chunks of an array straight into the array that is asked for, from files and from a bucket.

The same bytes and the same checks as through zarr's own pipeline (a test holds the two equal), at a multiple of its
rate: that one copies each chunk several times, reads, checks and decodes in one thread, and takes what is missing for
fill values, so that each file must be asked for twice. Of a bucket a whole shard is one request; a part of one that is
cut into chunks is two, one for the index and one for the chunks.

References:
    Zarr sharding codec, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import google_crc32c
import numpy as np
from jaxtyping import Shaped
from numcodecs import blosc
from numcodecs.vlen import VLenUTF8
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, VLenUTF8Codec
from zarr.storage import LocalStore, ObjectStore

from distspec.addresses import brief

__all__ = ["ChunkError", "ShardFiles", "shard_files", "side_by_side", "use_threads"]

_ENTRY = 16
"""Bytes of the index for each chunk: offset and length."""

_CRC = 4

_REQUESTS = 16
"""Requests to a bucket that are under way at once: they wait, whatever the number of processors."""

_threads = os.cpu_count() or 1

_own = threading.local()

T = TypeVar("T")


def use_threads(threads: int) -> None:
    """Decode with so many threads in this process."""
    global _threads
    _threads = threads


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # One for each process: a pool does not survive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix="distspec-chunks")


def side_by_side(work: Callable[[T], None], items: Sequence[T], threads: int) -> None:
    """Do some work for each item in threads; `work` must not call this function itself.

    Raises:
        Exception: that of the first item that fails, when all threads have ended.
    """
    strands = min(threads, len(items))
    if strands <= 1:
        for item in items:
            work(item)
        return
    failed: list[tuple[int, Exception]] = []
    numbers = iter(range(len(items)))

    def run() -> None:
        # Items are taken in their order: when one fails, all before it have been taken.
        while not failed and (number := next(numbers, None)) is not None:
            try:
                work(items[number])
            except Exception as error:  # raised below
                failed.append((number, error))

    wait([_pool(threads, os.getpid()).submit(run) for _ in range(strands)])
    if failed:
        raise min(failed, key=lambda found: found[0])[1]


class ChunkError(Exception):
    """A shard of an array is lost or damaged.

    Arguments:
        shard: its number.
        key: name of its file in the array.
        why: what is wrong with it; empty where the file is missing.
    """

    def __init__(self, shard: int, key: str, why: str) -> None:
        super().__init__(f"{key}: {why or 'missing'}")
        self.shard, self.key, self.why = shard, key, why


def shard_files(array: Any) -> "ShardFiles | None":
    """Give the direct reader of an array that is coded as layers are, in a folder or a bucket; None for any other."""
    codecs, store = array.metadata.codecs, array.store
    if not isinstance(store, LocalStore | ObjectStore) or tuple(array.chunks[1:]) != tuple(array.shape[1:]):
        return None
    outer = codecs[0] if len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) else None
    inner = codecs if outer is None else outer.codecs
    kinds = [type(codec) for codec in inner]
    text = kinds == [VLenUTF8Codec, Crc32cCodec] and outer is None
    if not text and kinds != [BytesCodec, BloscCodec, Crc32cCodec]:
        return None
    endian = None if text else inner[0].endian
    if endian is not None and endian.value != "little":
        return None
    if outer is not None:
        index = [type(codec) for codec in outer.index_codecs]
        if index != [BytesCodec, Crc32cCodec] or outer.index_location.value != "end":
            return None
    return ShardFiles(array, text)


class _Content(Protocol):
    """The bytes of one file; what `read` gives is good until the same thread reads again."""

    def whole(self) -> Shaped[np.ndarray, "bytes"]: ...

    def tail(self, length: int) -> Shaped[np.ndarray, "bytes"]: ...

    def fetch(self, ranges: list[tuple[int, int]]) -> None: ...

    def read(self, offset: int, length: int) -> Shaped[np.ndarray, "bytes"]: ...

    def close(self) -> None: ...


class _File:
    """The bytes of a file on a file system, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def whole(self) -> Shaped[np.ndarray, "bytes"]:
        return self.read(0, os.fstat(self._descriptor).st_size)

    def tail(self, length: int) -> Shaped[np.ndarray, "bytes"]:
        return self.read(max(os.fstat(self._descriptor).st_size - length, 0), length)

    def fetch(self, ranges: list[tuple[int, int]]) -> None:
        pass

    def read(self, offset: int, length: int) -> Shaped[np.ndarray, "bytes"]:
        found = _buffer(length)
        return found[: os.preadv(self._descriptor, [found.data], offset)] if length else found

    def close(self) -> None:
        os.close(self._descriptor)


class _Object:
    """The bytes of an object in a bucket, in as few requests as can be.

    Arguments:
        store: obstore's.
        path: of the object.
        all_of_it: get it whole at once.
    """

    def __init__(self, store: Any, path: str, all_of_it: bool) -> None:
        self._store, self._path = store, path
        self._parts: dict[int, Shaped[np.ndarray, "bytes"]] = {}
        self._whole = np.frombuffer(store.get(path).bytes(), np.uint8) if all_of_it else None

    def whole(self) -> Shaped[np.ndarray, "bytes"]:
        assert self._whole is not None
        return self._whole

    def tail(self, length: int) -> Shaped[np.ndarray, "bytes"]:
        if self._whole is not None:
            return self._whole[-length:]
        found = self._store.get(self._path, options={"range": {"suffix": length}})
        return np.frombuffer(found.bytes(), np.uint8)

    def fetch(self, ranges: list[tuple[int, int]]) -> None:
        if self._whole is None:
            starts, lengths = zip(*ranges, strict=True)
            found = self._store.get_ranges(self._path, starts=starts, lengths=lengths)
            self._parts = {at: np.frombuffer(part, np.uint8) for at, part in zip(starts, found, strict=True)}

    def read(self, offset: int, length: int) -> Shaped[np.ndarray, "bytes"]:
        return self._parts[offset] if self._whole is None else self._whole[offset : offset + length]

    def close(self) -> None:
        pass


class ShardFiles:
    """Reads runs of rows of one array.

    Arguments:
        array: a zarr array whose shards, or chunks, hold whole rows, coded as `create_layer` does.
        text: of text, not numbers.
    """

    def __init__(self, array: Any, text: bool) -> None:
        self._store, self._path = array.store, array.path
        self._encode_key = array.metadata.encode_chunk_key
        self._shape, self._dtype = tuple(array.shape), np.dtype(object) if text else np.dtype(array.dtype)
        self._chunk_rows = int(array.chunks[0])
        self._shard_rows = self._chunk_rows if array.shards is None else int(array.shards[0])
        self._indexed = array.shards is not None
        self._chunk_items = self._chunk_rows * int(np.prod(self._shape[1:]))
        self._chunk_bytes = self._chunk_items * self._dtype.itemsize

    @property
    def threads(self) -> int:
        """How many reads should be under way at once."""
        return _threads if isinstance(self._store, LocalStore) else max(_threads, _REQUESTS)

    def read(
        self, start: int, stop: int, room: Shaped[np.ndarray, "n ..."] | None = None
    ) -> Shaped[np.ndarray, "n ..."]:
        """Read rows `start` to `stop`, text as objects; shards, or the chunks of one, are read side by side.

        Arguments:
            start: first row.
            stop: one past the last.
            room: an array of this dtype and of the result's shape, contiguous, that becomes the result.

        Raises:
            ChunkError: a file is missing, cannot be read or is damaged.
        """
        out = np.empty((stop - start, *self._shape[1:]), self._dtype) if room is None else room
        shards = range(start // self._shard_rows, -(-stop // self._shard_rows) if stop > start else 0)

        def read(shard: int, threads: int = 1) -> None:
            first = shard * self._shard_rows
            low, high = max(start, first), min(stop, first + self._shard_rows)
            self._read_shard(shard, low - first, high - first, out[low - start : high - start], threads)

        if len(shards) == 1:
            read(shards[0], _threads)
        else:
            side_by_side(read, shards, self.threads)
        return out

    def _read_shard(self, shard: int, low: int, high: int, out: Shaped[np.ndarray, "n ..."], threads: int) -> None:
        key = self._encode_key((shard,) + (0,) * (len(self._shape) - 1))
        # The last shard may be short.
        rows = min(self._shard_rows, self._shape[0] - shard * self._shard_rows)
        try:
            content = self._open(key, not self._indexed or high - low == rows)
        except FileNotFoundError as error:
            raise ChunkError(shard, key, "") from error
        except Exception as error:  # object stores have errors of their own
            raise ChunkError(shard, key, brief(error)) from error
        try:
            if not self._indexed:
                self._decode(content.whole(), 0, low, high, out)
                return
            chunks = range(low // self._chunk_rows, -(-high // self._chunk_rows))
            entries = [self._entry(entry, chunk) for chunk, entry in enumerate(self._index(content)) if chunk in chunks]
            content.fetch(entries)

            def decode(chunk: int) -> None:
                self._decode(content.read(*entries[chunk - chunks.start]), chunk, low, high, out)

            side_by_side(decode, chunks, threads)
        except Exception as error:  # whatever damage makes of decoding, or the object store of reading
            raise ChunkError(shard, key, brief(error)) from error
        finally:
            # All threads have ended, those behind a failed chunk too.
            content.close()

    def _open(self, key: str, all_of_it: bool) -> _Content:
        if isinstance(self._store, LocalStore):
            return _File(Path(self._store.root) / self._path / key)
        return _Object(self._store.store, f"{self._path}/{key}" if self._path else key, all_of_it)

    def _index(self, content: _Content) -> Shaped[np.ndarray, "chunks 2"]:
        chunks = self._shard_rows // self._chunk_rows
        length = chunks * _ENTRY + _CRC
        found = content.tail(length).tobytes()
        if len(found) != length or google_crc32c.value(found[:-_CRC]) != struct.unpack("<I", found[-_CRC:])[0]:
            raise ValueError("the index of a shard is damaged")
        return np.frombuffer(found[:-_CRC], "<u8").reshape(chunks, 2)

    def _entry(self, entry: Shaped[np.ndarray, "2"], chunk: int) -> tuple[int, int]:
        """Check where a chunk is said to lie."""
        offset, length = (int(number) for number in entry)
        if offset == 2**64 - 1:
            raise ValueError(f"chunk {chunk} is missing")
        bound = self._chunk_bytes + self._chunk_bytes // 8 + 65536
        if not 16 + _CRC <= length <= bound:
            raise ValueError(f"chunk {chunk} has {length} bytes; expected at most {bound}")
        return offset, length

    def _decode(
        self, found: Shaped[np.ndarray, "bytes"], chunk: int, low: int, high: int, out: Shaped[np.ndarray, "n ..."]
    ) -> None:
        """Check a chunk and put those of its rows that are wanted, `low` to `high` of its shard, into `out`."""
        # Checked before it is decoded: the decoder trusts its input.
        data = found[:-_CRC]
        if len(found) <= _CRC or google_crc32c.value(data) != int.from_bytes(found[-_CRC:].tobytes(), "little"):
            raise ValueError(f"the checksum of chunk {chunk} is wrong")
        begin, end = chunk * self._chunk_rows, (chunk + 1) * self._chunk_rows
        if self._dtype.hasobject:
            texts = VLenUTF8().decode(data)
            if len(texts) != self._chunk_items:
                raise ValueError(f"chunk {chunk} holds {len(texts)} texts; expected {self._chunk_items}")
            whole = texts.reshape(self._chunk_rows, *self._shape[1:])
        else:
            # Bytes 4-7 of Blosc's header say what it unpacks to.
            unpacked = int.from_bytes(data[4:8].tobytes(), "little")
            if unpacked != self._chunk_bytes:
                raise ValueError(f"chunk {chunk} unpacks to {unpacked} bytes; expected {self._chunk_bytes}")
            if low <= begin and end <= high:
                blosc.decompress(data, out[begin - low : end - low].reshape(-1))
                return
            whole = np.empty((self._chunk_rows, *self._shape[1:]), self._dtype)
            blosc.decompress(data, whole.reshape(-1))
        inside = slice(max(low, begin), min(high, end))
        out[inside.start - low : inside.stop - low] = whole[inside.start - begin : inside.stop - begin]


def _buffer(length: int) -> Shaped[np.ndarray, "bytes"]:
    """Give this thread's buffer: fresh memory for each chunk would cost more than to fill it."""
    held = getattr(_own, "buffer", None)
    if held is None or len(held) < length:
        held = _own.buffer = np.empty(length, np.uint8)
    return held[:length]
