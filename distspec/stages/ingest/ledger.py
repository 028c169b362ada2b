"""The ledger: every spectrum that is set aside and everything that was wanted and is not there, with the reasons."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from distspec.addresses import Place
from distspec.files import csv_text, in_place
from distspec.runtime.passes import here
from distspec.spectra import Status
from distspec.store import SpectraStore

__all__ = ["Liner", "write_ledger"]

_HEADER: Final = ("row", "id", "file", "status", "reasons", "note")


def write_ledger(
    store: SpectraStore,
    missing: Sequence[str],
    path: Place,
    each: Callable[..., Iterable[tuple[int, str]]] = here,
) -> int:
    """Write one line for each rejected input, shard by shard, and put the file in place when it is whole.

    Arguments:
        store: with all shards written.
        missing: names of what a catalogue wants and no file holds; these have no row.
        path: CSV file with the columns row, id, file, status, reasons, note.
        each: applies a class of work, its arguments and items, in the items' order.

    Returns:
        Number of lines: spectra set aside and missing inputs together.

    Raises:
        StoreError: the file cannot be written.
    """
    total = len(missing)
    with in_place(path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        stream.write(_text([], header=True))
        for lines, text in each(Liner, (store,), range(store.shards)):
            total += lines
            stream.write(text)
        stream.write(_text(("", "", name, "", "wanted by the catalogue, in no file", "") for name in missing))
    return total


class Liner:
    """Writes the lines of one shard after the other; lives in a worker."""

    def __init__(self, store: SpectraStore) -> None:
        self._store = store

    def __call__(self, shard: int) -> tuple[int, str]:
        """Give the number of lines, and these."""
        start, stop = self._store.base.bounds(shard)
        status = self._store.status(start, stop)
        aside = np.flatnonzero(status)
        return len(aside), _text(self._rows(start, stop, status, aside)) if aside.size else ""

    def _rows(
        self, start: int, stop: int, status: np.ndarray[Any, Any], aside: np.ndarray[Any, Any]
    ) -> Iterator[tuple[Any, ...]]:
        ids, files, notes = (self._store.base.read(f"columns/{key}", start, stop) for key in ("id", "file", "note"))
        for at in aside:
            reasons = "; ".join(Status(int(status[at])).reasons)
            yield start + at, ids[at], files[at], int(status[at]), reasons, notes[at]


def _text(rows: Iterable[tuple[Any, ...]], *, header: bool = False) -> str:
    whole = csv_text(_HEADER, rows, quoted=False, end="\r\n")
    return whole if header else whole.partition("\r\n")[2]
