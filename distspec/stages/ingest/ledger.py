"""The ledger: every spectrum that is set aside and everything that was wanted and is not there, with the reasons."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distspec.files import write_csv
from distspec.spectra import Status
from distspec.store import SpectraStore

__all__ = ["write_ledger"]


def write_ledger(store: SpectraStore, missing: list[str], path: Path) -> int:
    """Write one line for each rejected input, shard by shard, and put the file in place when it is whole.

    Arguments:
        store: with all shards written.
        missing: names of what a catalogue wants and no file holds; these have no row.
        path: CSV file with the columns row, id, file, status, reasons, note.

    Returns:
        Number of lines: spectra set aside and missing inputs together.

    Raises:
        StoreError: the file cannot be written.
    """
    lines = 0

    def rows() -> Iterator[tuple[Any, ...]]:
        nonlocal lines
        for shard in range(store.shards):
            start, stop = store.base.bounds(shard)
            status = store.status(start, stop)
            aside = np.flatnonzero(status)
            if not aside.size:
                continue
            ids, files, notes = (store.base.read(f"columns/{key}", start, stop) for key in ("id", "file", "note"))
            for at in aside:
                reasons = "; ".join(Status(int(status[at])).reasons)
                yield start + at, ids[at], files[at], int(status[at]), reasons, notes[at]
            lines += len(aside)
        for name in missing:
            yield "", "", name, "", "wanted by the catalogue, in no file", ""

    header = ("row", "id", "file", "status", "reasons", "note")
    write_csv(path, header, rows(), quoted=False, end="\r\n")
    return lines + len(missing)
