"""Reading the chunks of a shard file straight into the array that is asked for.

The same bytes and the same checks as through zarr's own pipeline (a test holds the two equal), at a multiple of its
rate: that one copies each chunk several times and reads, checks and decodes in one thread.

References:
    Zarr sharding codec, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Shaped
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

__all__ = ["ShardFiles", "shard_files", "use_threads"]

_ENTRY = 16
"""Bytes of the index for each chunk: offset and length."""

_CRC = 4

_threads = os.cpu_count() or 1

_own = threading.local()


def use_threads(threads: int) -> None:
    """Decode with so many threads in this process."""
    global _threads
    _threads = threads


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # One for each process: a pool does not survive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix="distspec-chunks")


def shard_files(array: Any) -> "ShardFiles | None":
    """Give the direct reader of a sharded array on a file system; None for any other array."""
    codecs = array.metadata.codecs
    if not isinstance(array.store, LocalStore) or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return None
    outer = codecs[0]
    inner = [type(codec) for codec in outer.codecs]
    index = [type(codec) for codec in outer.index_codecs]
    plain = inner == [BytesCodec, BloscCodec, Crc32cCodec] and index == [BytesCodec, Crc32cCodec]
    whole_rows = tuple(outer.chunk_shape[1:]) == tuple(array.shape[1:])
    endian = outer.codecs[0].endian if plain else None
    little = endian is None or endian.value == "little"
    if not (plain and whole_rows and little and outer.index_location.value == "end"):
        return None
    return ShardFiles(array)


class ShardFiles:
    """Reads runs of rows of one sharded array.

    Arguments:
        array: a zarr array whose shards hold chunks of whole rows, coded as `create_layer` does.
    """

    def __init__(self, array: Any) -> None:
        self._folder = Path(array.store.root) / array.path
        self._encode_key = array.metadata.encode_chunk_key
        self._shape, self._dtype = tuple(array.shape), np.dtype(array.dtype)
        self._shard_rows, self._chunk_rows = int(array.shards[0]), int(array.chunks[0])
        self._chunk_bytes = self._chunk_rows * int(np.prod(self._shape[1:])) * self._dtype.itemsize

    def read(
        self, start: int, stop: int, room: Shaped[np.ndarray, "n ..."] | None = None
    ) -> Shaped[np.ndarray, "n ..."]:
        """Read rows `start` to `stop`; chunks are read, checked and decoded side by side.

        Arguments:
            start: first row.
            stop: one past the last.
            room: an array of this dtype and of the result's shape, contiguous, that becomes the result.

        Raises:
            ValueError: a chunk is missing or damaged.
            OSError: a file is missing or cannot be read.
        """
        out = np.empty((stop - start, *self._shape[1:]), self._dtype) if room is None else room
        for shard in range(start // self._shard_rows, -(-stop // self._shard_rows)):
            first = shard * self._shard_rows
            low, high = max(start, first), min(stop, first + self._shard_rows)
            if low < high:
                self._read_shard(shard, low - first, high - first, out[low - start : high - start])
        return out

    def _read_shard(self, shard: int, low: int, high: int, out: Shaped[np.ndarray, "n ..."]) -> None:
        path = self._folder / self._encode_key((shard,) + (0,) * (len(self._shape) - 1))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            entries = self._index(descriptor)

            def decode(chunk: int) -> None:
                begin, end = chunk * self._chunk_rows, (chunk + 1) * self._chunk_rows
                data = self._chunk(descriptor, int(entries[chunk, 0]), int(entries[chunk, 1]), chunk)
                if low <= begin and end <= high:
                    blosc.decompress(data, out[begin - low : end - low].reshape(-1))
                    return
                whole = np.empty((self._chunk_rows, *self._shape[1:]), self._dtype)
                blosc.decompress(data, whole.reshape(-1))
                inside = slice(max(low, begin), min(high, end))
                out[inside.start - low : inside.stop - low] = whole[inside.start - begin : inside.stop - begin]

            chunks = range(low // self._chunk_rows, -(-high // self._chunk_rows))
            if _threads == 1 or len(chunks) == 1:
                for chunk in chunks:
                    decode(chunk)
            else:
                # All must have ended before the file is closed, those behind a failed one too.
                done = [_pool(_threads, os.getpid()).submit(decode, chunk) for chunk in chunks]
                wait(done)
                for one in done:
                    one.result()
        finally:
            os.close(descriptor)

    def _index(self, descriptor: int) -> Shaped[np.ndarray, "chunks 2"]:
        chunks = self._shard_rows // self._chunk_rows
        length = chunks * _ENTRY + _CRC
        size = os.fstat(descriptor).st_size
        found = os.pread(descriptor, length, max(size - length, 0))
        if len(found) != length or google_crc32c.value(found[:-_CRC]) != struct.unpack("<I", found[-_CRC:])[0]:
            raise ValueError(f"the index of a shard file of {size} bytes is damaged")
        return np.frombuffer(found[:-_CRC], "<u8").reshape(chunks, 2)

    def _chunk(self, descriptor: int, offset: int, length: int, chunk: int) -> Shaped[np.ndarray, "bytes"]:
        """Read one chunk and check it before it is decoded: the decoder trusts its input."""
        if offset == 2**64 - 1:
            raise ValueError(f"chunk {chunk} is missing")
        bound = self._chunk_bytes + self._chunk_bytes // 8 + 65536
        if not 16 + _CRC <= length <= bound:
            raise ValueError(f"chunk {chunk} has {length} bytes; expected at most {bound}")
        found = _buffer(length)
        read = os.preadv(descriptor, [found.data], offset)
        data = found[:-_CRC]
        if read != length or google_crc32c.value(data) != int(found[-_CRC:].view("<u4")[0]):
            raise ValueError(f"the checksum of chunk {chunk} is wrong")
        # Bytes 4-7 of Blosc's header say what it unpacks to.
        unpacked = int(data[4:8].view("<u4")[0])
        if unpacked != self._chunk_bytes:
            raise ValueError(f"chunk {chunk} unpacks to {unpacked} bytes; expected {self._chunk_bytes}")
        return data


def _buffer(length: int) -> Shaped[np.ndarray, "bytes"]:
    """Give this thread's buffer: fresh memory for each chunk would cost more than to fill it."""
    held = getattr(_own, "buffer", None)
    if held is None or len(held) < length:
        held = _own.buffer = np.empty(length, np.uint8)
    return held[:length]
