"""Which file gives which rows: what is new since an earlier ingest, and the pieces that make up a shard."""

import warnings
from collections.abc import Callable, Iterable

import numpy as np

from distspec.errors import DistspecWarning, LayoutError, SourceError
from distspec.sources import Entry, Piece
from distspec.store import Inventory

__all__ = ["Counts", "FileRows", "new_files", "require_rows"]

Counts = Callable[[list[str]], Iterable[tuple[str, int]]]
"""Counts the wanted spectra of files, in any order; -1 for a file that cannot be counted: it takes one row."""


def new_files(
    listed: list[Entry], known: Inventory | None, place: str, count: Counts, lost: Callable[[int], bool]
) -> Inventory:
    """Give the files that are listed and not known yet, with their numbers of spectra.

    A known file of which nothing could be read, and which has been written again since, counts as new: its old rows
    stay as they are, set aside.

    Arguments:
        listed: what there is.
        known: what the store has rows of.
        place: the store, for messages.
        count: called with the names of the files that must be opened to be counted.
        lost: tells of a known file, by its place in `known`, whether nothing of it could be read.

    Raises:
        LayoutError: a known file has another size than when it was ingested.
    """
    if known is not None:
        # Of a name that comes twice the last one counts: the file that was written again.
        at = {name: index for index, name in enumerate(known.names)}
        changed = [entry for entry in listed if entry.name in at and _differs(entry, known, at[entry.name])]
        again = {entry.name for entry in changed if lost(at[entry.name])}
        _refuse_changed([entry for entry in changed if entry.name not in again], known, at, place)
        listed = [entry for entry in listed if entry.name not in at or entry.name in again]
    counted = dict(count([entry.name for entry in listed if entry.count is None]))
    counts = [counted[entry.name] if entry.count is None else entry.count for entry in listed]
    return Inventory(
        [entry.name for entry in listed],
        np.array([entry.size for entry in listed], np.int64),
        np.array([entry.changed for entry in listed], np.int64),
        np.array(counts, np.int64),
    )


def _differs(entry: Entry, known: Inventory, index: int) -> bool:
    return bool(entry.size != known.sizes[index] or entry.changed != known.changed[index])


def _refuse_changed(entries: list[Entry], known: Inventory, at: dict[str, int], place: str) -> None:
    resized = [entry for entry in entries if entry.size != known.sizes[at[entry.name]]]
    if resized:
        first = resized[0]
        raise LayoutError(
            f"{len(resized)} files have changed since {place} was made from them; the first: {first.name} has "
            f"{first.size} bytes, had {known.sizes[at[first.name]]}; choose another output to ingest them anew"
        )
    if entries:
        warnings.warn(
            f"{len(entries)} files were written again, in the same size, since {place} was made from them, such as "
            f"{entries[0].name}; their rows stay as they are: choose another output to ingest them anew",
            DistspecWarning,
            stacklevel=2,
        )


class FileRows:
    """Rows of a store by file.

    Arguments:
        inventory: all files in the order of the rows.
    """

    def __init__(self, inventory: Inventory) -> None:
        self._names = inventory.names
        self._counts = np.abs(inventory.counts)
        self._uncounted = inventory.counts < 0
        self._ends = np.cumsum(self._counts, dtype=np.int64)

    def of_file(self, index: int) -> tuple[int, int]:
        """Give the first and the one-past-last row of a file, by its place in the inventory."""
        return int(self._ends[index] - self._counts[index]), int(self._ends[index])

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Give the pieces of files that rows `start` to `stop` consist of, in their order."""
        file = int(np.searchsorted(self._ends, start, side="right"))
        found = []
        while start < stop:
            begin = int(self._ends[file] - self._counts[file])
            end = min(int(self._ends[file]), stop)
            if end > start:
                found.append(Piece(self._names[file], start - begin, end - begin, not self._uncounted[file]))
                start = end
            file += 1
        return found


def require_rows(inventory: Inventory) -> None:
    """Refuse a source without a single wanted spectrum.

    Raises:
        SourceError: there is none.
    """
    if inventory.rows == 0:
        raise SourceError(
            f"none of the {len(inventory)} files holds a wanted spectrum; widen `wanted` or `targets`, or see to path"
        )
