"""Parquet files: which of a tree are data, opening them safely, and reading runs of rows in bounded memory.

Metadata of Arrow extension types may hold pickled code that other packages run as soon as such a file is opened; here
a file that names any extension type is refused from the bytes of its footer, before Arrow sees it. This module knows
nothing of spectra.

References:
    Parquet format, https://parquet.apache.org/docs/file-format/
    HATS, https://www.ivoa.net/documents/Notes/HATS/
    CVE-2026-41486 (extension types of Ray)
"""

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from distspec.errors import SourceError
from distspec.sources import Entry
from distspec.sources.files.places import Files

__all__ = ["Run", "open_parquet", "parquet_files", "reading"]

SUFFIXES = (".parquet", ".parq", ".pq")

BATCH_ROWS = 64
"""Rows decoded at a time: of long spectra, some 10 MB."""

_MAGIC = b"PAR1"

_FOOTER_LIMIT = 1 << 28

_PARTITION = re.compile(r"(.*?)(?:dataset/)?Norder=\d+/")


def _base64_forms(word: bytes) -> tuple[bytes, ...]:
    """Give what any base64 text that encodes `word` must contain, for the three ways it can be aligned."""
    forms = []
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + word + b"\0\0")
        forms.append(text[-(-shift * 8 // 6) : (shift + len(word)) * 8 // 6])
    return tuple(forms)


_EXTENSION = b"ARROW:extension:name"

# Arrow keeps its own schema base64-encoded among the key-value metadata.
_EXTENSION_MARKS = (_EXTENSION, *_base64_forms(_EXTENSION))


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turn what reading a Parquet file may raise into an error that names the file."""
    try:
        yield
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Arrow reports damaged contents as OSError too, but with no number: only a numbered one is the disk's.
        unreachable = error if isinstance(error, OSError) and error.errno else None
        raise SourceError(f"{place}: cannot be read ({text}); expected a whole Parquet file") from unreachable


def parquet_files(files: Files) -> list[Entry]:
    """List the data files of a folder by name; of a HATS tree those of its partitions only, each object once.

    Left out are hidden files and those that begin with `_` (footers gathered from all), what lies beside the
    partitions of a HATS catalog (such as its thumbnail), and its margin, index and association catalogs, which
    repeat rows.

    Raises:
        SourceError: there is no Parquet file.
    """
    listed = files.list((*SUFFIXES, "properties"))
    data = [entry for entry in listed if entry.name.lower().endswith(SUFFIXES)]
    data = [entry for entry in data if not any(part.startswith(("_", ".")) for part in PurePosixPath(entry.name).parts)]
    roots = {entry.name: match[1] for entry in data if (match := _PARTITION.match(entry.name))}
    if roots:
        stated = [entry.name for entry in listed if PurePosixPath(entry.name).name in ("hats.properties", "properties")]
        secondary = {_folder(name) for name in stated if not _is_primary(files, name)}
        data = [entry for entry in data if roots.get(entry.name) not in {None, *secondary}]
    if not data:
        raise SourceError(f"no Parquet data file in {files.root!r}; expected {files.expected}")
    return data


def _folder(name: str) -> str:
    folder = PurePosixPath(name).parent.as_posix()
    return "" if folder == "." else folder + "/"


def _is_primary(files: Files, name: str) -> bool:
    """Tell whether a HATS properties file describes a catalog of objects, and not one made from another."""
    with reading(files.place(name)), files.open(name) as file:
        text = file.read(1 << 16).decode("utf-8", "replace")
    found = re.search(r"^\s*dataproduct_type\s*[=:]\s*(\w+)", text, re.MULTILINE)
    return found is None or found[1].lower() in ("object", "source", "map", "nested")


def open_parquet(files: Files, name: str) -> Any:
    """Open a file for reading (`pyarrow.parquet.ParquetFile`, a context manager).

    Raises:
        SourceError: it is not Parquet, is truncated, or names an Arrow extension type. Later, where pages carry
            checksums, reading a damaged one is an error too.
        OSError: it cannot be opened.
    """
    place = files.place(name)
    file = files.open(name)
    try:
        _check_footer(file, place)
        return pq.ParquetFile(file, pre_buffer=False, arrow_extensions_enabled=False, page_checksum_verification=True)
    except BaseException:
        file.close()
        raise


def _check_footer(file: BinaryIO, place: str) -> None:
    """Look at the footer's bytes without interpreting them."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(4)
    file.seek(max(size - 8, 0))
    end = file.read(8)
    if size < 12 or start != _MAGIC or end[4:] != _MAGIC:
        what = "is empty" if size == 0 else f"begins {start!r} and ends {end[4:]!r}"
        raise SourceError(f"{place}: {what}; expected an unencrypted Parquet file: it may be truncated")
    length = int.from_bytes(end[:4], "little")
    if length > min(size - 12, _FOOTER_LIMIT):
        raise SourceError(f"{place}: a footer of {length} bytes in {size}; expected a whole Parquet file")
    file.seek(size - 8 - length)
    footer = file.read(length)
    file.seek(0)
    if any(mark in footer for mark in _EXTENSION_MARKS):
        raise SourceError(
            f"{place}: has columns of Arrow extension types, whose metadata may hold code; "
            "expected plain lists and numbers: write the table again with these columns as lists"
        )


class Run:
    """Reads runs of rows of one file; a run that begins where the last one ended costs no second decoding.

    Arguments:
        files: where the file lies.
        name: its name there.
        columns: the columns to read; of a struct, `name.field`.

    Raises:
        SourceError: as `open_parquet`.
        OSError: the file cannot be opened.
    """

    def __init__(self, files: Files, name: str, columns: list[str]) -> None:
        self.name = name
        self._place = files.place(name)
        self._columns = columns
        self._parquet = open_parquet(files, name)
        self._next = -1
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None

    def close(self) -> None:
        """Close the file."""
        self._parquet.close(force=True)

    def take(self, start: int, stop: int) -> Iterator[Any]:
        """Give rows `start` to `stop`, or to the end, as record batches of at most `BATCH_ROWS`."""
        stop = min(stop, self._parquet.metadata.num_rows)
        if start != self._next:
            self._seek(start)
        while self._next < stop:
            batch = self._rest if self._rest is not None else self._decode()
            count = min(stop - self._next, batch.num_rows)
            self._rest = batch.slice(count) if count < batch.num_rows else None
            self._next += count
            yield batch.slice(0, count)

    def _seek(self, start: int) -> None:
        """Go to a row: groups before its own are not read, rows before it in its group are decoded and dropped."""
        footer = self._parquet.metadata
        group, first = 0, 0
        while group < footer.num_row_groups - 1 and first + footer.row_group(group).num_rows <= start:
            first += footer.row_group(group).num_rows
            group += 1
        self._batches = self._parquet.iter_batches(
            batch_size=BATCH_ROWS,
            row_groups=list(range(group, footer.num_row_groups)),
            columns=self._columns,
            use_threads=False,
        )
        self._next, self._rest = first, None
        while self._next < start:
            batch = self._decode()
            skipped = min(start - self._next, batch.num_rows)
            self._rest = batch.slice(skipped) if skipped < batch.num_rows else None
            self._next += skipped

    def _decode(self) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            raise SourceError(f"{self._place}: ends at row {self._next}; expected more by its footer")
        return batch
