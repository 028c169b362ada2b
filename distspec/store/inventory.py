"""Which files the rows of a store came from, kept so that a later ingest knows what is there already."""

import zlib
from dataclasses import dataclass

import numpy as np
import zarr
from jaxtyping import Int64
from zarr.codecs import Crc32cCodec, ZstdCodec

from distspec.errors import LayoutError
from distspec.store.places import place_of

__all__ = ["Inventory", "read_inventory", "write_inventory"]

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Inventory:
    """Files in the order of the rows.

    Arguments:
        names: path of each file relative to the source's root.
        sizes: bytes.
        changed: time of the last change, ns since 1970; 0 where unknown.
        counts: rows that the file takes; -1 for a file that could not be counted, which takes one row and is not read.
    """

    names: list[str]
    sizes: Int64[np.ndarray, "files"]
    changed: Int64[np.ndarray, "files"]
    counts: Int64[np.ndarray, "files"]

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return int(np.abs(self.counts).sum())

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: "Inventory") -> "Inventory":
        return Inventory(
            self.names + other.names,
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.changed, other.changed]),
            np.concatenate([self.counts, other.counts]),
        )

    @classmethod
    def empty(cls) -> "Inventory":
        """Give the inventory of no files."""
        return cls([], *(np.zeros(0, np.int64) for _ in range(3)))


def write_inventory(parent: zarr.Group, part: int, inventory: Inventory) -> None:
    """Write the files of one part, in place of what an interrupted call left; its checksum comes last."""
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
    group.attrs["distspec"] = {"files": len(inventory), "checksum": _checksum(inventory)}


def read_inventory(root: zarr.Group, parts: int) -> Inventory:
    """Read the files of the first `parts` parts.

    Raises:
        LayoutError: a part is missing or damaged. Without it a later ingest would take its files for new.
    """
    found = Inventory.empty()
    for part in range(parts):
        try:
            group = root["inventory"][str(part)]
            names = [str(name) for name in group["names"][:]]
            read = Inventory(names, *(np.asarray(group[key][:]) for key in ("sizes", "changed", "counts")))
            sound = group.attrs["distspec"] == {"files": len(read), "checksum": _checksum(read)}
        except Exception as error:  # whatever zarr and its codecs make of damage
            raise _lost(root, part, repr(error)) from error
        if not sound:
            raise _lost(root, part, "its checksum is wrong")
        found = found + read
    return found


def _lost(root: zarr.Group, part: int, why: str) -> LayoutError:
    return LayoutError(
        f"{place_of(root)}/inventory/{part} is missing or damaged ({' '.join(why.split())}): which files the rows came "
        "from is not known; put it back from a copy, or make the store again"
    )


def _checksum(inventory: Inventory) -> int:
    checksum = zlib.crc32("\0".join(inventory.names).encode())
    for values in (inventory.sizes, inventory.changed, inventory.counts):
        checksum = zlib.crc32(np.ascontiguousarray(values).data, checksum)
    return checksum
