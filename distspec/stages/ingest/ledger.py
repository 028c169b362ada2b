"""The ledger: every spectrum that is set aside and everything that was wanted and is not there, with the reasons."""

import csv
import os
import uuid
from pathlib import Path

import numpy as np

from distspec.errors import StoreError
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
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    lines = 0
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "id", "file", "status", "reasons", "note"])
            for shard in range(store.shards):
                start, stop = store.base.bounds(shard)
                status = store.status(start, stop)
                aside = np.flatnonzero(status)
                if not aside.size:
                    continue
                ids, files, notes = (store.base.read(f"columns/{key}", start, stop) for key in ("id", "file", "note"))
                for at in aside:
                    reasons = "; ".join(Status(int(status[at])).reasons)
                    writer.writerow([start + at, ids[at], files[at], int(status[at]), reasons, notes[at]])
                lines += len(aside)
            for name in missing:
                writer.writerow(["", "", name, "", "wanted by the catalogue, in no file", ""])
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another output"
        ) from error
    return lines + len(missing)
