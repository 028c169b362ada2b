"""Rows of a catalogue file, read by chunks: FITS binary tables, or text separated by bars, commas or tabs.

Only the columns that are asked for are decoded. Text is read as text and becomes numbers where all of a column can, so
that neither the size of a chunk nor the first rows decide on a column's kind, and no identifier passes through a float.
"""

import difflib
import gzip
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from distspec.config import Wanted
from distspec.errors import ConfigError, DistspecError, SourceError
from distspec.sources.files.fits import FitsFile, Unit
from distspec.sources.files.headers import Header
from distspec.sources.files.places import Files

__all__ = ["Chunk", "Rows", "open_rows"]

CHUNK_BYTES = 1 << 25
"""Rows that are decoded at once, at most."""

_TEXT = (".csv", ".txt", ".dat", ".psv", ".tsv")

_EMPTY = ("", "nan", "null", "none", "--", "n/a")

_EXACT = 1 << 53


@dataclass(frozen=True)
class Chunk:
    """Some rows of a catalogue.

    Arguments:
        columns: values by name, lower case: numbers, or text without padding.
        missing: True where a row has no value.
        text: the same columns as text, where the file is text.
    """

    columns: dict[str, Shaped[np.ndarray, "n ..."]]
    missing: dict[str, Bool[np.ndarray, "n"]]
    text: dict[str, Shaped[np.ndarray, "n"]] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def numbers(self, name: str) -> Float64[np.ndarray, "n"]:
        """Give a column to rank by.

        Raises:
            ConfigError: it does not hold one number a row.
        """
        values = self.columns[name]
        if values.dtype.kind not in "iufb" or values.ndim != 1:
            raise ConfigError(f"highest: column {name.upper()} holds {kind_of(values)}; expected one number a row")
        return values.astype(np.float64)

    def kept(self, name: str) -> Shaped[np.ndarray, "n ..."]:
        """Give a column as it is to be kept."""
        return self.columns[name] if self.text is None else self.text[name]


def kind_of(values: Shaped[np.ndarray, "n ..."]) -> str:
    """Say what a column holds, for messages."""
    kind = {"U": "text", "S": "text", "b": "true or false", "f": "numbers"}.get(values.dtype.kind, "integers")
    return kind if values.ndim == 1 else f"{values.shape[1:]} {kind} a row"


class Rows(Protocol):
    """An open catalogue."""

    @property
    def names(self) -> list[str]:
        """Columns that there are, lower case."""
        ...

    @property
    def table(self) -> str:
        """Name of the table, upper case; empty where it has none."""
        ...

    @property
    def place(self) -> str:
        """The file, for messages."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """Read all rows, once."""
        ...

    def settle(self, name: str) -> np.dtype[Any] | None:
        """Say, after all rows were read, what numbers a kept column of text holds; None leaves it as it is."""
        ...


@contextmanager
def open_rows(path: str, keys: tuple[str, ...], columns: tuple[str, ...], wanted: Wanted) -> Iterator[Rows]:
    """Open a catalogue to read its keys, those of these columns that there are, and what the conditions name.

    Raises:
        ConfigError: a condition names a column that is not there.
        SourceError: the file cannot be read, or lacks a key.
    """
    files = Files(path, "a catalog", ranges=True)
    (name,) = (entry.name for entry in files.list(("",)))
    conditions = dict.fromkeys(condition.column.lower() for condition in wanted.where)
    if wanted.highest is not None:
        conditions[wanted.highest.lower()] = None
    rows: FitsRows | TextRows
    opened = TextRows(files, name) if _is_text(files, name) else FitsRows(files, name, keys)
    with opened as rows:
        lacking = [key.upper() for key in keys if key not in rows.names]
        if lacking:
            raise SourceError(f"{rows.place}: no column {', '.join(lacking)}; expected it in the catalog")
        for column in conditions:
            if column not in rows.names:
                near = difflib.get_close_matches(column, rows.names, 5, 0.5) or rows.names[:20]
                shown = ", ".join(found.upper() for found in near)
                raise ConfigError(f"{rows.place}: no column {column.upper()!r} for a condition; there are {shown}")
        rows.choose(keys, tuple(column for column in columns if column in rows.names), tuple(conditions))
        yield rows


def _is_text(files: Files, name: str) -> bool:
    with _open_text(files, name) as file:
        try:
            beginning = file.read(6)
        except (EOFError, OSError):
            return False  # reading it as FITS says what is wrong
    return beginning != b"SIMPLE" and name.lower().removesuffix(".gz").endswith(_TEXT)


def _open_text(files: Files, name: str) -> BinaryIO:
    try:
        file = files.open(name)
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
    except OSError as error:
        raise SourceError(f"{files.place(name)}: {error.strerror or error}; expected a readable catalog") from error
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file


class _Trusted(Header):
    """A header whose checksums have been verified: read by chunks, a table would be summed whole for each."""

    def __init__(self, header: Header) -> None:
        self.place = header.place
        self._cards = {key: card for key, card in header._cards.items() if key not in ("CHECKSUM", "DATASUM")}


class FitsRows(AbstractContextManager["FitsRows"]):
    """The first table of a FITS file that has the keys."""

    def __init__(self, files: Files, name: str, keys: tuple[str, ...]) -> None:
        self._file = FitsFile(files, name)
        self.place = self._file.path
        try:
            unit = self._file.find_table(*keys)
            if unit is None:
                wanted = ", ".join(keys).upper()
                raise SourceError(f"{self.place}: holds {self._file.contents}; expected a table with {wanted}")
        except Exception as error:
            self.__exit__(type(error), error, None)
            raise
        self._unit: Unit = unit
        self.names = list(unit.columns)
        self.table = unit.name
        self._needed: list[str] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error of ours is said already; the file explains only what its contents led to.
        ours = isinstance(error, DistspecError)
        self._file.__exit__(None if ours else kind, None if ours else error, None if ours else trace)

    def choose(self, keys: tuple[str, ...], columns: tuple[str, ...], conditions: tuple[str, ...]) -> None:
        """Say which columns will be read."""
        self._needed = list(dict.fromkeys((*keys, *columns, *conditions)))

    def chunks(self) -> Iterator[Chunk]:
        """Read all rows, once."""
        # Reads and sums the whole table, keeping nothing.
        self._file.table(self._unit, self._needed[:1], 0, 0)
        unit = replace(self._unit, header=_Trusted(self._unit.header))
        step = max(CHUNK_BYTES // max(unit.shape[1], 1), 1)
        for start in range(0, unit.rows, step):
            table = self._file.table(unit, self._needed, start, min(start + step, unit.rows))
            yield Chunk(table, {name: self._missing(name, values) for name, values in table.items()})

    def settle(self, name: str) -> np.dtype[Any] | None:
        """See `Rows`: columns of a FITS table have their kinds."""
        return None

    def _missing(self, name: str, values: Shaped[np.ndarray, "n ..."]) -> Bool[np.ndarray, "n"]:
        absent: np.ndarray = np.zeros(values.shape, bool)
        if values.dtype.kind == "f":
            absent = np.isnan(values)
        elif values.dtype.kind in "iu":
            number = self._unit.columns[name].number
            null = self._unit.header.get(f"TNULL{number}")
            zero = self._unit.header.get(f"TZERO{number}") or 0
            if isinstance(null, int) and not isinstance(zero, str):
                absent = values == null + int(zero)
        return np.asarray(absent.reshape(len(values), -1).any(axis=1))


class TextRows(AbstractContextManager["TextRows"]):
    """A table of text whose first line names the columns."""

    def __init__(self, files: Files, name: str) -> None:
        self.place = files.place(name)
        self.table = ""
        self._file = _open_text(files, name)
        with self._reading():
            line = self._file.readline(1 << 20)
            heading = line.decode("utf-8-sig").strip().lstrip("#")
            self._separator = max("|,\t;", key=heading.count)
            self.names = [word.strip().strip('"').lower() for word in heading.split(self._separator)]
            self._file.seek(0)
        self._numbers: list[str] = []
        self._words: list[str] = []
        self._kinds: dict[str, _Kind] = {}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, EOFError, OSError) as error:  # pyarrow's own errors are these too
            if isinstance(error, SourceError | ConfigError):
                raise
            self._file.close()
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceError(f"{self.place}: cannot be read ({text}); expected a table of text") from error

    def __exit__(self, *about: Any) -> None:
        self._file.close()

    def choose(self, keys: tuple[str, ...], columns: tuple[str, ...], conditions: tuple[str, ...]) -> None:
        """Say which columns will be read, and which of them as numbers."""
        self._numbers = list(dict.fromkeys((*keys, *conditions)))
        self._words = list(dict.fromkeys((*keys, *columns, *conditions)))
        self._kinds = {name: _Kind() for name in columns}

    def chunks(self) -> Iterator[Chunk]:
        """Read all rows, once."""
        import pyarrow as pa
        from pyarrow import csv

        unique = [name if self.names.index(name) == i else f"{name}#{i}" for i, name in enumerate(self.names)]
        with self._reading():
            reader = csv.open_csv(
                self._file,
                csv.ReadOptions(column_names=unique, skip_rows=1, block_size=CHUNK_BYTES >> 1, use_threads=False),
                csv.ParseOptions(delimiter=self._separator),
                csv.ConvertOptions(include_columns=self._words, column_types=dict.fromkeys(self._words, pa.string())),
            )
            for batch in reader:
                yield self._chunk({name: batch.column(name) for name in self._words})

    def _chunk(self, batch: dict[str, Any]) -> Chunk:
        import pyarrow.compute as pc

        text, columns, missing = {}, {}, {}
        for name, raw in batch.items():
            trimmed = pc.utf8_trim_whitespace(raw)
            text[name] = trimmed.to_numpy(zero_copy_only=False).astype(np.str_)
            values, absent = _as_numbers(trimmed)
            if name in self._kinds:
                self._kinds[name].learn(values, absent)
            if name in self._numbers:
                columns[name] = text[name] if values is None else values
                missing[name] = np.zeros(len(absent), bool) if values is None else absent
        return Chunk(columns, missing, text)

    def settle(self, name: str) -> np.dtype[Any] | None:
        """See `Rows`."""
        return self._kinds[name].settled


def _as_numbers(trimmed: Any) -> tuple[np.ndarray | None, Bool[np.ndarray, "n"]]:
    """Turn text into int64, else into float64 with NaN, else into None; and say where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    empty = pc.is_in(pc.utf8_lower(trimmed), pa.array(_EMPTY))
    filled = pc.if_else(empty, pa.scalar(None, pa.string()), trimmed)
    absent = empty.to_numpy(zero_copy_only=False)
    for kind, value in ((pa.int64(), 0), (pa.float64(), np.nan)):
        try:
            numbers = pc.cast(filled, kind)
        except pa.ArrowInvalid:
            continue
        found = numbers.fill_null(value).to_numpy(zero_copy_only=False)
        return found, absent | (np.isnan(found) if found.dtype.kind == "f" else False)
    return None, absent


class _Kind:
    """What all values of a column of text can be."""

    def __init__(self) -> None:
        self._whole = self._number = True
        self._gaps = False
        self._largest = 0

    def learn(self, values: np.ndarray | None, absent: Bool[np.ndarray, "n"]) -> None:
        """Take some more values into account."""
        self._number &= values is not None
        self._whole &= values is not None and values.dtype.kind == "i"
        self._gaps |= bool(absent.any())
        if values is not None and values.dtype.kind == "i" and len(values):
            self._largest = max(self._largest, abs(int(values.min())), abs(int(values.max())))

    @property
    def settled(self) -> np.dtype[Any] | None:
        """Integers without gaps; else numbers if that loses nothing; else text (None)."""
        if self._whole and not self._gaps:
            return np.dtype(np.int64)
        return np.dtype(np.float64) if self._number and self._largest <= _EXACT else None
