"""Work of `distspec export`: rows read by runs; and, in workers, a few runs written to a Parquet file of their own."""

from collections.abc import Iterator, Sequence
from typing import Final

import pyarrow as pa

from distspec.addresses import Place
from distspec.config import Export
from distspec.errors import LayoutError
from distspec.files import in_place
from distspec.runtime.progress import progress
from distspec.stages.export.parquet import write_parquet
from distspec.store import SpectraStore
from distspec.store.table import Catalogue

__all__ = ["ADVICE", "PartWriter", "Reader", "part_file"]

ADVICE: Final = "make room or choose another place by export.to"


class Reader:
    """Reads the wanted columns of the wanted rows."""

    def __init__(self, store: SpectraStore, settings: Export, layers: Sequence[str]) -> None:
        self._store = store
        self._settings = settings
        self._layers = layers
        if settings.format == "hats" and not {"ra", "dec"} <= set(store.column_names):
            raise LayoutError(
                f"{store.path} has no columns ra and dec, which HATS needs; use export.format = 'parquet'"
            )

    def catalogue(self, columns: tuple[str, ...] | None = None) -> Catalogue:
        """Give the table of the settings, or of some columns."""
        if columns is not None:
            return Catalogue(self._store, columns, ())
        wanted: tuple[str, ...] | None = self._settings.columns or None
        if wanted is not None and self._settings.format == "hats":
            wanted += tuple(name for name in ("ra", "dec") if name not in wanted)
        return Catalogue(self._store, wanted, self._layers, spectra=self._settings.spectra)

    def tables(self, catalogue: Catalogue | None = None, label: str = "") -> Iterator[pa.Table]:
        """Read all runs, without the rows that are not wanted."""
        catalogue = self.catalogue() if catalogue is None else catalogue
        runs = list(catalogue.runs())
        for start, stop in progress(runs, len(runs), label, "run"):
            yield self.table(catalogue, start, stop)

    def table(self, catalogue: Catalogue, start: int, stop: int) -> pa.Table:
        """Read a run, without the rows that are not wanted."""
        table = catalogue.read(start, stop)
        return table.filter(pa.array(self._store.status(start, stop) == 0)) if self._settings.scored_only else table


class PartWriter:
    """Writes files of runs of rows."""

    def __init__(self, store: str, settings: Export, layers: Sequence[str], folder: Place, said: str) -> None:
        self._reader = Reader(SpectraStore.open(store), settings, layers)
        self._folder, self._said = folder, said

    def __call__(self, item: tuple[int, tuple[tuple[int, int], ...]]) -> int:
        """Write a file, by its number and the runs in it; give its rows."""
        number, runs = item
        catalogue = self._reader.catalogue()
        tables = (self._reader.table(catalogue, *run) for run in runs)
        with in_place(self._folder / part_file(number), ADVICE) as path:
            return write_parquet(tables, catalogue.schema, path, self._said)


def part_file(number: int) -> str:
    """Name one of many files; in the order of the rows."""
    return f"part-{number:05}.parquet"
