"""HATS: Parquet files cut by the sky into HEALPix pixels, small where objects are dense; for LSDB and the like.

Two looks at the store, by workers: the first counts positions on a fine map, from which the partitions follow; the
second hands the rows out to the partitions, through files on disk. Within a partition rows are in the order of
`_healpix_29`. Rows without a position have no place on the sky: they go to `unplaced.parquet`
beside the data, which readers of HATS do not see, so that nothing is lost.

References:
    HATS 1.0, https://www.ivoa.net/documents/Notes/HATS/
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32, Int64

from distspec.errors import LayoutError
from distspec.files import replacing
from distspec.runtime.passes import RUNS, here, runs_of
from distspec.stages.export.parquet import COMPRESSION, described, flat, write_parquet
from distspec.stages.export.workers import Reader
from distspec.store.arrow import to_numpy
from distspec.store.columns import COLUMN_INFO

__all__ = ["Partition", "partitions", "pixels_of", "write_hats"]

INDEX = "_healpix_29"

FINEST = 29

COUNTED = 10
"""Order of the map on which objects are counted; no partition is smaller than its pixels of 3.4 arcmin."""

_AT_ONCE = 1 << 28
"""Bytes of rows held before they are handed out to the partitions."""

_LARGEST = 1 << 29
"""Bytes of a partition, which is sorted in memory."""

_ROW_GROUP = 1 << 26

_HOMELESS = "unplaced"


@dataclass(frozen=True, order=True)
class Partition:
    """A HEALPix pixel, nested, that one file holds. In the order of the sky: by its first pixel of the finest order."""

    first: int = field(init=False, repr=False)
    order: int
    pixel: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", self.pixel << 2 * (FINEST - self.order))

    @property
    def path(self) -> str:
        """Where its file lies in the dataset."""
        return f"Norder={self.order}/Dir={self.pixel // 10_000 * 10_000}/Npix={self.pixel}.parquet"


def pixels_of(table: pa.Table) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Give the pixel of order 29 of each row by its `ra` and `dec` (deg), and which rows have a position."""
    from astropy import units
    from astropy_healpix import lonlat_to_healpix

    ra, dec = (to_numpy(table[name])[0].astype(np.float64) for name in ("ra", "dec"))
    placed = np.isfinite(ra) & (np.abs(dec) <= 90)
    pixels = np.full(len(ra), -1, np.int64)
    if placed.any():
        found = lonlat_to_healpix(ra[placed] * units.deg, dec[placed] * units.deg, 1 << FINEST, order="nested")
        pixels[placed] = found
    return pixels, placed


def partitions(counts: Int64[np.ndarray, "pixels"], limit: int) -> list[Partition]:
    """Cut the sky: the largest pixels that hold at most `limit` objects, and those of the map where even these do not.

    Arguments:
        counts: objects in each pixel of a map, nested.
        limit: largest number of objects in a partition.

    Example:
        >>> partitions(np.array([0, 0, 0, 0, 2, 2, 0, 1] + [0] * 40), 4)
        [Partition(order=1, pixel=4), Partition(order=1, pixel=5), Partition(order=1, pixel=7)]
    """
    maps = [counts]
    while len(maps[0]) > 12:
        maps.insert(0, maps[0].reshape(-1, 4).sum(axis=1))
    found = []
    free = np.ones(12, bool)
    for order, held in enumerate(maps):
        taken = free & (held > 0) & ((held <= limit) | (order == len(maps) - 1))
        found += [Partition(order, int(pixel)) for pixel in np.flatnonzero(taken)]
        free = np.repeat(free & ~taken & (held > 0), 4)
    return sorted(found)


Mapper = Callable[..., Iterable[Any]]
"""Applies a class of work, its arguments and items, in any order; `label` says what is done."""

Runs = tuple[int, tuple[tuple[int, int], ...]]
"""Number of an item, and the runs of rows in it."""


def write_hats(
    reader: Reader, folder: Path, facts: Mapping[str, str], limit: int, mapper: Mapper = here
) -> tuple[int, int]:
    """Write a catalogue into a new folder.

    Arguments:
        reader: of all rows, with `ra` and `dec`.
        folder: does not exist yet; workers see it, too.
        facts: properties of the catalogue, among them `obs_collection`, its name.
        limit: rows in a partition; fewer where rows are so long that these would not fit into memory.
        mapper: applies the work.

    Returns:
        Number of rows placed on the sky, and of those without a position.

    Raises:
        LayoutError: no row has a position.
    """
    schema = reader.catalogue().schema
    items = list(enumerate(runs_of(list(reader.catalogue().runs()), RUNS)))
    counts, placed = np.zeros(12 << 2 * COUNTED, np.int64), 0
    for found, times in mapper(PositionCounter, (reader,), items, label="count"):
        counts[found] += times
        placed += int(times.sum())
    if not placed:
        raise LayoutError("no row of this store has a position; HATS needs ra and dec: export.format = 'parquet'")
    cells = partitions(counts, _limited(reader, limit))
    dataset = (folder / "dataset").resolve()
    spool = (folder / ".spool").resolve()
    spool.mkdir(parents=True)
    full = described(pa.schema([pa.field(INDEX, pa.int64(), metadata=COLUMN_INFO[INDEX].to_dict()), *schema]), "")
    unplaced = sum(mapper(HandingOut, (reader, cells, spool), items, label="export"))
    _write_unplaced(spool, len(items), folder / "unplaced.parquet")
    written = dict(mapper(PartitionWriter, (spool, len(items), dataset, full), list(enumerate(cells)), label="write"))
    footers = [written[number] for number in range(len(cells))]
    shutil.rmtree(spool)
    pq.write_metadata(full, dataset / "_common_metadata")
    pq.write_metadata(full, dataset / "_metadata", metadata_collector=footers)
    listed = "".join(f"{cell.order},{cell.pixel}\n" for cell in cells)
    (folder / "partition_info.csv").write_text(f"Norder,Npix\n{listed}", "utf-8")
    size = sum((dataset / cell.path).stat().st_size for cell in cells)
    most = max(footer.num_rows for footer in footers)
    text = _properties(facts, cells, {"hats_nrows": placed, "hats_max_rows": most, "hats_estsize": -(-size // 1024)})
    for name in ("properties", "hats.properties"):
        (folder / name).write_text(text, "utf-8")
    return placed, unplaced


def _properties(facts: Mapping[str, str], cells: list[Partition], sizes: Mapping[str, int]) -> str:
    own = {
        "dataproduct_type": "object",
        "hats_col_ra": "ra",
        "hats_col_dec": "dec",
        "hats_col_healpix": INDEX,
        "hats_col_healpix_order": FINEST,
        "hats_npix_suffix": ".parquet",
        "hats_order": max(cell.order for cell in cells),
        "hats_creation_date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MUTC"),
        "hats_release_date": "2025-08-22",
        "hats_version": "v1.0",
        "moc_sky_fraction": f"{sum(0.25**cell.order for cell in cells) / 12:.6g}",
    }
    return "#HATS catalog\n" + "".join(f"{key}={value}\n" for key, value in ({**facts} | own | {**sizes}).items())


class PositionCounter:
    """Counts the rows of some runs on a fine map of the sky; lives in a worker."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._positions = reader, reader.catalogue(("ra", "dec"))

    def __call__(self, item: Runs) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
        """Give the pixels that hold rows, and how many."""
        parts = [np.zeros(0, np.int64)]
        for run in item[1]:
            pixels, placed = pixels_of(self._reader.table(self._positions, *run))
            parts.append(pixels[placed] >> 2 * (FINEST - COUNTED))
        found, times = np.unique(np.concatenate(parts), return_counts=True)
        return found, times


def _limited(reader: Reader, limit: int) -> int:
    """Lower the limit where rows are long, as those with spectra are."""
    catalogue = reader.catalogue()
    tables = (reader.table(catalogue, *run) for run in catalogue.runs())
    first = next((table for table in tables if table.num_rows), None)
    if first is None:
        return limit
    return max(1, min(limit, _LARGEST * int(first.num_rows) // max(int(first.nbytes), 1)))


class HandingOut:
    """Hands the rows of some runs out to their partitions, by files in a folder of their own; lives in a worker."""

    def __init__(self, reader: Reader, cells: Sequence[Partition], spool: Path) -> None:
        self._reader, self._spool = reader, spool
        self._starts = np.array([cell.first for cell in cells], np.int64)

    def __call__(self, item: Runs) -> int:
        """Give the number of rows that have no position."""
        number, runs = item
        catalogue = self._reader.catalogue()
        held: list[pa.Table] = []
        homeless = 0
        # Renamed when it is whole: what a lost worker has left is not read.
        with replacing(self._spool / str(number)) as folder:
            folder.mkdir()
            for run in runs:
                table = self._reader.table(catalogue, *run)
                pixels, placed = pixels_of(table)
                if not placed.all():
                    homeless += int((~placed).sum())
                    _append(folder / _HOMELESS, table.filter(pa.array(~placed)).combine_chunks())
                held.append(flat(table.filter(pa.array(placed))).add_column(0, INDEX, pa.array(pixels[placed])))
                if sum(table.nbytes for table in held) > _AT_ONCE:
                    self._part(held, folder)
                    held = []
            self._part(held, folder)
        return homeless

    def _part(self, held: list[pa.Table], folder: Path) -> None:
        """Append rows to the files of their partitions, in the order in which they come."""
        if not held:
            return
        table = pa.concat_tables(held).replace_schema_metadata(None)
        pixels, _ = to_numpy(table[INDEX])
        cell: Int32[np.ndarray, "n"] = (np.searchsorted(self._starts, pixels, side="right") - 1).astype(np.int32)
        order = np.argsort(cell, kind="stable")
        table = table.take(pa.array(order))
        edges = np.searchsorted(cell[order], np.arange(len(self._starts) + 1))
        for number in np.flatnonzero(np.diff(edges)):
            _append(folder / str(number), table.slice(edges[number], edges[number + 1] - edges[number]))


def _append(path: Path, table: pa.Table) -> None:
    with path.open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def _appended(spool: Path, items: int, name: str) -> Iterator[pa.Table]:
    """Read what was handed out under a name, in the order of the rows."""
    for number in range(items):
        path = spool / str(number) / name
        if not path.exists():
            continue
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while file.tell() < size:
                with pa.ipc.open_stream(file) as stream:
                    yield stream.read_all()


def _write_unplaced(spool: Path, items: int, path: Path) -> None:
    tables = _appended(spool, items, _HOMELESS)
    first = next(tables, None)
    if first is not None:
        # The schema names what the columns mean here too.
        write_parquet(chain([first], tables), first.schema, path, "Rows without a position")


class PartitionWriter:
    """Writes partitions from what was handed out to them; lives in a worker."""

    def __init__(self, spool: Path, items: int, dataset: Path, schema: pa.Schema) -> None:
        self._spool, self._items, self._dataset, self._schema = spool, items, dataset, schema

    def __call__(self, item: tuple[int, Partition]) -> tuple[int, pq.FileMetaData]:
        """Write a partition, by its number; give this and the footer of the file."""
        number, cell = item
        table = pa.concat_tables(_appended(self._spool, self._items, str(number)))
        footer = _write_partition(table, self._dataset / cell.path, self._schema)
        footer.set_file_path(cell.path)
        return number, footer


def _write_partition(table: pa.Table, path: Path, schema: pa.Schema) -> pq.FileMetaData:
    """Sort the rows of a partition by their place on the sky and write them; gives the footer of the file."""
    pixels, _ = to_numpy(table[INDEX])
    table = table.take(pa.array(np.argsort(pixels, kind="stable"))).cast(schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    footers: list[pq.FileMetaData] = []
    rows = max(1, _ROW_GROUP * table.num_rows // max(table.nbytes, 1))
    with pq.ParquetWriter(path, schema, compression=COMPRESSION, metadata_collector=footers) as writer:
        writer.write_table(table, row_group_size=rows)
    # What was handed out is not removed here: a worker that is lost may have to do it again.
    return footers[0]
