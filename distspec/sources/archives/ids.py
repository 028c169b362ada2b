"""Lists of what is wanted: CSV, ECSV, FITS or Parquet, read column by column, whole numbers exact and checked.

Catalogues of tens of millions of rows are read in pieces; a number never passes through a float.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Shaped

from distspec.errors import ConfigError, SourceError
from distspec.sources.files.fits import Column, FitsFile, Unit
from distspec.sources.files.places import Files

__all__ = ["Rows", "integers", "read_rows", "rows_of_csv"]

PIECE: Final = 1 << 18
"""Rows of a piece."""

FORMATS: Final = {"L": "S1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8"}

Rows = dict[str, Shaped[np.ndarray, "n"]]
"""Columns of the same rows by name in lower case: integers or text."""


def read_rows(path: str, choices: Sequence[tuple[str, ...]], optional: tuple[str, ...] = ()) -> Iterator[Rows]:
    """Read the columns that say what is wanted, in pieces.

    Arguments:
        path: the table.
        choices: sets of columns (lower case); the first whose columns are all there is read.
        optional: read too where they are there.

    Raises:
        ConfigError: it cannot be read, has none of the sets, or holds no row.
    """
    suffix = "".join(Path(path).suffixes[-2:]).lower() if path.endswith(".gz") else Path(path).suffix.lower()
    read = {
        ".csv": _csv,
        ".ecsv": _ecsv,
        ".fits": _fits,
        ".fit": _fits,
        ".fits.gz": _fits,
        ".parquet": _parquet,
    }.get(suffix)
    if read is None:
        raise ConfigError(f"{path}: a list must be .csv, .ecsv, .fits or .parquet")
    if not Path(path).is_file():
        raise ConfigError(f"no file {path!r}; expected a table with {_named(choices)}")
    empty = True
    try:
        for rows in read(path, choices, optional):
            empty = empty and not len(next(iter(rows.values())))
            yield rows
    except (ConfigError, MemoryError):
        raise
    except SourceError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # three libraries, each with errors of its own
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}); expected a table") from error
    if empty:
        raise ConfigError(f"{path} has no row; expected at least one with {_named(choices)}")


def rows_of_csv(
    lines: Iterable[str], place: str, choices: Sequence[tuple[str, ...]], optional: tuple[str, ...] = ()
) -> Iterator[Rows]:
    """Read comma-separated lines with a header as `read_rows` does; lines that begin with # are skipped."""
    reader = csv.reader(line for line in lines if line.strip() and not line.startswith("#"))
    header = [name.strip().lower() for name in next(reader, [])]
    names = _choose(header, choices, optional, place)
    indices = [header.index(name) for name in names]
    while piece := list(islice(reader, PIECE)):
        short = next((row for row in piece if len(row) != len(header)), None)
        if short is not None:
            raise ConfigError(f"{place}: a row holds {short}; expected {len(header)} values")
        yield {name: np.array([row[i].strip() for row in piece]) for name, i in zip(names, indices, strict=True)}


def integers(rows: Rows, name: str, low: int, high: int, place: str) -> list[int]:
    """Give a column as whole numbers.

    Raises:
        ConfigError: a value is missing, no whole number, or outside of `low` to `high`.
    """
    column = rows[name]
    if column.dtype.kind == "U":
        wrong = next((text for text in column.tolist() if not text.removeprefix("-").isdigit()), None)
        if wrong is not None:
            raise ConfigError(f"{place}: {name} is {wrong!r}; expected a whole number")
        values = [int(text) for text in column.tolist()]
    elif column.dtype.kind in "iu":
        values = column.tolist()
    else:
        raise ConfigError(f"{place}: {name} has type {column.dtype}; expected whole numbers, which a float can lose")
    outside = next((value for value in values if not low <= value <= high), None)
    if outside is not None:
        raise ConfigError(f"{place}: {name} is {outside}; expected {low} to {high}")
    return values


def _choose(there: list[str], choices: Sequence[tuple[str, ...]], optional: tuple[str, ...], place: str) -> list[str]:
    for choice in choices:
        if set(choice) <= set(there):
            return [*choice, *(name for name in optional if name in there)]
    shown = ", ".join(there[:12]) + (" …" if len(there) > 12 else "")
    raise ConfigError(f"{place} has columns {shown}; expected {_named(choices)}")


def _named(choices: Sequence[tuple[str, ...]]) -> str:
    return ", or ".join("+".join(choice) for choice in choices)


def _csv(path: str, choices: Sequence[tuple[str, ...]], optional: tuple[str, ...]) -> Iterator[Rows]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from rows_of_csv(file, path, choices, optional)


def _ecsv(path: str, choices: Sequence[tuple[str, ...]], optional: tuple[str, ...]) -> Iterator[Rows]:
    from astropy.table import Table

    table = Table.read(path, format="ascii.ecsv")
    spelled = {name.lower(): name for name in table.colnames}
    names = _choose(list(spelled), choices, optional, path)
    columns: Rows = {}
    for name in names:
        column = table[spelled[name]]
        if np.ma.is_masked(column):
            raise ConfigError(f"{path}: {name} lacks values; expected one in every row")
        columns[name] = np.asarray(column)
    yield columns


def _parquet(path: str, choices: Sequence[tuple[str, ...]], optional: tuple[str, ...]) -> Iterator[Rows]:
    from distspec.sources.files.parquet import open_parquet

    with open_parquet(Files(path, "a Parquet table"), Path(path).name) as file:
        spelled = {name.lower(): name for name in file.schema_arrow.names}
        names = _choose(list(spelled), choices, optional, path)
        for batch in file.iter_batches(batch_size=PIECE, columns=[spelled[name] for name in names]):
            columns: Rows = {}
            for name in names:
                column = batch.column(spelled[name])
                if column.null_count:
                    raise ConfigError(f"{path}: {name} lacks values; expected one in every row")
                values = column.to_numpy(zero_copy_only=False)
                columns[name] = values.astype(str) if values.dtype.kind == "O" else values
            yield columns


def _fits(path: str, choices: Sequence[tuple[str, ...]], optional: tuple[str, ...]) -> Iterator[Rows]:
    with FitsFile(Files(path, "a FITS table"), Path(path).name) as file:
        unit = next((found for choice in choices if (found := file.find_table(*choice))), None)
        there = list(unit.columns) if unit is not None else []
        names = _choose(there, choices, optional, f"{path} (HDUs {file.contents})")
        assert unit is not None
        if path.endswith(".gz"):
            yield {name: _plain(values) for name, values in file.table(unit, names).items()}
            return
        # Mapped, not read: a piece of a catalogue of 20 GB costs no more than its own columns.
        formats = [_format(unit.columns[name], name, path) for name in names]
        zeros = {name: _zero(unit, name) for name in names}
        offsets = [unit.columns[name].offset for name in names]
        kind = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": unit.shape[1]})
        if not unit.rows:
            return
        mapped = np.memmap(path, kind, mode="r", offset=unit.data, shape=(unit.rows,))
        for start in range(0, unit.rows, PIECE):
            piece = mapped[start : start + PIECE]
            yield {name: _plain(piece[name], zeros[name]) for name in names}


def _zero(unit: Unit, name: str) -> int:
    """Give what is added to a column's stored numbers: FITS stores unsigned ones shifted."""
    number = unit.columns[name].number
    zero, scale = unit.header.get(f"TZERO{number}") or 0, unit.header.get(f"TSCAL{number}") or 1
    if scale != 1 or int(zero) != zero:
        raise ConfigError(f"{unit.place}: column {name} is scaled by {scale} and {zero}; expected whole numbers")
    return int(zero)


def _format(column: Column, name: str, path: str) -> str:
    if column.code == "A":
        return f"S{column.repeat}"
    if column.code not in FORMATS or column.repeat != 1:
        raise ConfigError(f"{path}: column {name} has format {column.repeat}{column.code}; expected whole numbers")
    return FORMATS[column.code]


def _plain(values: Shaped[np.ndarray, "n"], zero: int = 0) -> Shaped[np.ndarray, "n"]:
    """Give integers in the machine's byte order, and text without padding."""
    if values.dtype.kind == "S":
        return np.char.strip(np.char.decode(values, "ascii", "replace"))
    own = values.astype(values.dtype.newbyteorder("="))
    return own.astype(np.int64) + zero if zero else own
