"""Which shards of a layer are written: the marks in its array `commits`, a file of 8 bytes for each shard.

A mark is never 0, and zarr keeps no file for the fill value 0: a shard is written if the file of its mark is there, and
whole. One listing tells that of all shards, whatever their number, in a folder and in a bucket. A mark of another
length is none: its shard is written again.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool
from zarr.storage import LocalStore, ObjectStore

from distspec.errors import LayoutError
from distspec.store.places import place_of

__all__ = ["create_marks", "mark_of", "set_mark", "written_shards"]

_BYTES = 8


def create_marks(group: zarr.Group, shards: int) -> None:
    """Make room for the marks of so many shards, none of which is written."""
    group.create_array(
        "commits", shape=(shards,), chunks=(1,), dtype="u8", fill_value=0, compressors=None, filters=None
    )


def set_mark(group: zarr.Group, shard: int, mark: int) -> None:
    """Mark a shard as written, or as not written by 0."""
    group["commits"][shard] = mark


def mark_of(group: zarr.Group, shard: int) -> int:
    """Give the mark of a shard, 0 where it is not written.

    Raises:
        LayoutError: it is damaged.
    """
    with _reading(group):
        return int(group["commits"][shard])


def written_shards(group: zarr.Group, shards: int) -> Bool[np.ndarray, "shards"]:
    """Say which shards are written.

    Raises:
        LayoutError: what is there cannot be listed.
    """
    with _reading(group):
        sizes = _sizes(group)
        if sizes is None:
            return np.asarray(group["commits"][:shards], np.uint64) > 0
        found = np.zeros(shards, bool)
        for name, size in sizes:
            if name.isdecimal() and int(name) < shards:
                found[int(name)] = size == _BYTES
        return found


def _sizes(group: zarr.Group) -> Any:
    """Give name and size of each mark, or None where the place cannot list them with their sizes."""
    folder = f"{group.path}/commits/c" if group.path else "commits/c"
    if isinstance(group.store, LocalStore):
        place = Path(group.store.root) / folder
        return list(_local_sizes(place)) if place.is_dir() else []
    if isinstance(group.store, ObjectStore):
        listed = group.store.store.list(prefix=f"{folder}/")
        return [(fact["path"].rpartition("/")[2], fact["size"]) for facts in listed for fact in facts]
    return None


def _local_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for entry in os.scandir(folder):
        # Another process may be writing marks, which have other names until they are whole, or taking them away.
        if entry.name.isdecimal():
            with suppress(FileNotFoundError):
                yield entry.name, entry.stat().st_size


@contextmanager
def _reading(group: zarr.Group) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever zarr makes of damage
        raise LayoutError(
            f"{place_of(group)}/commits is damaged ({' '.join(repr(error).split())}): which shards are "
            "written is not known; make the layer again"
        ) from error
