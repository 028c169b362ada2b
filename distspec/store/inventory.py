"""Which files the rows of a store came from, kept so that a later ingest knows what is there already."""

from dataclasses import dataclass

import numpy as np
import zarr
from jaxtyping import Int64
from zarr.codecs import Crc32cCodec, ZstdCodec

__all__ = ["Inventory", "read_inventory", "write_inventory"]

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Inventory:
    """Files in the order of the rows.

    Arguments:
        names: path of each file relative to the source's root.
        sizes: bytes.
        changed: time of the last change, ns since 1970; 0 where unknown.
        counts: rows that the file takes; 1 for a file that could not be read.
    """

    names: list[str]
    sizes: Int64[np.ndarray, "files"]
    changed: Int64[np.ndarray, "files"]
    counts: Int64[np.ndarray, "files"]

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return int(self.counts.sum())

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: "Inventory") -> "Inventory":
        return Inventory(
            self.names + other.names,
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.changed, other.changed]),
            np.concatenate([self.counts, other.counts]),
        )


def write_inventory(parent: zarr.Group, part: int, inventory: Inventory) -> None:
    """Write the files of one part, in place of what an interrupted call left."""
    group = parent.create_group(str(part), overwrite=True)
    names = group.create_array(
        "names", shape=(len(inventory),), dtype=str, chunks=(_CHUNK,), compressors=[ZstdCodec(), Crc32cCodec()]
    )
    names[:] = np.array(inventory.names, dtype=object)
    for key, values in (("sizes", inventory.sizes), ("changed", inventory.changed), ("counts", inventory.counts)):
        array = group.create_array(
            key, shape=values.shape, dtype="i8", chunks=(_CHUNK,), compressors=[ZstdCodec(), Crc32cCodec()]
        )
        array[:] = values


def read_inventory(parent: zarr.Group, parts: int) -> Inventory:
    """Read the files of the first `parts` parts."""
    empty = np.zeros(0, np.int64)
    found = Inventory([], empty, empty, empty)
    for part in range(parts):
        if str(part) in parent:
            group = parent[str(part)]
            names = [str(name) for name in group["names"][:]]
            found = found + Inventory(names, *(np.asarray(group[key][:]) for key in ("sizes", "changed", "counts")))
    return found
