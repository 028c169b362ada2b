"""How the fields of a layer lie on disk: one array each, with its chunks and codecs; and the checksum of a shard."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.codecs import BloscCodec, Crc32cCodec

from distspec.store.marks import create_marks

__all__ = ["SCHEMA", "Fields", "checksum_of", "create_layer", "field_of", "kind_of", "length_of"]

SCHEMA = 2
"""Number of the layout that `distspec.store.store` describes; another one is refused."""

Fields = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype ("string" for text) and shape behind the leading axis."""

_SHARDED_BYTES = 1 << 22
"""Arrays whose shard is larger than this are cut into chunks inside the shard."""


def field_of(values: Shaped[np.ndarray, "n ..."]) -> tuple[str, tuple[int, ...]]:
    """Describe an array as a field: its dtype (text becomes "string") and its shape behind the leading axis."""
    return ("string" if values.dtype.kind in "UOT" else values.dtype.str.lstrip("<|="), values.shape[1:])


def create_layer(
    parent: zarr.Group,
    name: str,
    parts: Sequence[int],
    shard_rows: int,
    chunk_rows: int,
    fields: Fields,
    attributes: dict[str, Any],
) -> None:
    """Write the metadata of a layer; the attribute that makes it one comes last."""
    group = parent.create_group(name, overwrite=True)
    for key, (dtype, shape) in fields.items():
        _create_array(group, key, dtype, (length_of(parts, shard_rows), *shape), shard_rows, chunk_rows)
    shards = sum(-(-rows // shard_rows) for rows in parts)
    create_marks(group, shards)
    group.attrs["distspec"] = {
        "schema": SCHEMA,
        "parts": list(parts),
        "shard_rows": shard_rows,
        "fields": {key: [dtype, list(shape)] for key, (dtype, shape) in fields.items()},
        "attributes": attributes,
    }


def length_of(parts: Sequence[int], shard_rows: int) -> int:
    """Give the rows of the arrays: all shards whole, but for the last one of the last part."""
    whole = sum(-(-rows // shard_rows) for rows in parts[:-1]) * shard_rows
    return whole + (parts[-1] if parts else 0)


def kind_of(array: Any) -> str:
    """Give the dtype of an array as fields name it."""
    kind = np.dtype(array.dtype)
    return "string" if kind.kind in "OTU" else kind.str.lstrip("<|=")


def checksum_of(arrays: Any) -> int:
    """CRC-32 over the fields in their order; text is joined by NUL."""
    checksum = 0
    for array in arrays:
        data = "\0".join(array.ravel().tolist()).encode() if array.dtype == object else array.data
        checksum = zlib.crc32(data, checksum)
    return checksum


def _create_array(
    group: zarr.Group, key: str, dtype: str, shape: tuple[int, ...], shard_rows: int, chunk_rows: int
) -> None:
    if dtype == "string":
        group.create_array(key, shape=shape, dtype=str, chunks=(shard_rows, *shape[1:]), compressors=[Crc32cCodec()])
        return
    kind = np.dtype(dtype)
    # Byte planes of float32 spectra compress by a third, as far as noise allows. Bit planes gain another 1 % and take
    # four times as long to decode; lz4 on bytes decodes at 8-14 GB/s a core, faster than disks read.
    compressors = [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=kind.itemsize), Crc32cCodec()]
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
