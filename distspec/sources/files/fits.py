"""Careful, quick reading of the FITS files that surveys publish: binary tables and images, plain or gzipped.

A survey is millions of small files, or thousands of large ones of which a tenth is wanted; a general reader spends
most of its time on headers and columns that nobody asked for, and only warns when a file is cut short. Here every
header unit of a file is located first, so that a missing end is an error; only the columns and rows asked for are
decoded; and a checksum that a file carries is verified for whatever is read. Tile-compressed images are left to
astropy. This module knows no survey, and writes nothing.

References:
    FITS Standard 4.0, https://fits.gsfc.nasa.gov/fits_standard.html
"""

import gzip
import io
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from distspec.errors import SourceError
from distspec.sources.files.headers import Header
from distspec.sources.files.places import Files

__all__ = ["FitsFile", "Unit", "count_rows"]

BLOCK = 2880

CHUNK = 1 << 24

UNPACKED_LIMIT = 1 << 31
"""Largest size that a gzipped file may unpack to: it is held in memory."""

KEPT_LIMIT = 1 << 29
"""Most bytes of verified units that are held of a file; the rows of a shard take more. What is beyond is read again."""

DEFLATE_RATIO = 1032
"""No gzip stream unpacks to more than this many times its size (zlib's technical notes)."""

_FORMATS = {"L": "S1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8", "A": "S"}

_WIDTHS = {"L": 1, "B": 1, "I": 2, "J": 4, "K": 8, "E": 4, "D": 8, "A": 1, "C": 8, "M": 16, "P": 8, "Q": 16}

_IMAGES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}


@dataclass(frozen=True)
class Column:
    """Where one column of a table lies in a row, and how it is coded."""

    number: int
    code: str
    repeat: int
    offset: int


@dataclass(frozen=True)
class Unit:
    """One header and its data unit (HDU), located but not read.

    Arguments:
        place: the file and the unit's number, for messages.
        header: the unit's header.
        start: byte in the file where the header begins.
        data: byte where the data begin.
        size: bytes of data, without padding.
    """

    place: str
    header: Header = field(repr=False)
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """First byte after the padded data."""
        return self.data + -(-self.size // BLOCK) * BLOCK

    @cached_property
    def name(self) -> str:
        """The extension's name, upper case; empty where it has none."""
        return str(self.header.get("EXTNAME") or "").strip().upper()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes, slowest first; for a table rows and bytes a row."""
        return tuple(self.header.value(f"NAXIS{i}", int) for i in range(self.header.value("NAXIS", int), 0, -1))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Lengths of an image's axes, slowest first, also where it is stored compressed in a table."""
        if self.header.get("ZIMAGE") is not True:
            return self.shape
        return tuple(self.header.value(f"ZNAXIS{i}", int) for i in range(self.header.value("ZNAXIS", int), 0, -1))

    @property
    def is_table(self) -> bool:
        """True for a binary table that is not a compressed image."""
        return self.header.get("XTENSION") == "BINTABLE" and self.header.get("ZIMAGE") is not True

    @property
    def rows(self) -> int:
        """Length of the slowest axis: of a table its rows, of an image of spectra their number."""
        return self.shape[0] if self.shape else 0

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The columns of a table by name in lower case; of repeated names the first counts."""
        columns: dict[str, Column] = {}
        if not self.is_table:
            return columns
        offset = 0
        for number in range(1, self.header.value("TFIELDS", int) + 1):
            form = self.header.value(f"TFORM{number}", str)
            match = re.match(r"(\d*)([LXBIJKAEDCMPQ])", form.strip())
            if match is None:
                raise SourceError(f"{self.place}: column {number} has format {form!r}; expected a FITS binary format")
            repeat, code = int(match[1] or 1), match[2]
            name = str(self.header.get(f"TTYPE{number}") or "").strip().lower()
            columns.setdefault(name, Column(number, code, repeat, offset))
            offset += -(-repeat // 8) if code == "X" else repeat * _WIDTHS[code]
        if len(self.shape) != 2 or offset != self.shape[1]:
            raise SourceError(f"{self.place}: columns fill {offset} bytes a row; expected NAXIS1 = {self.shape[1:]}")
        return columns


def _scan(file: BinaryIO | gzip.GzipFile, path: str, size: int) -> Iterator[Unit]:
    """Locate the units of a file, one after the other, without reading data.

    Arguments:
        file: an open file at its beginning.
        path: its name, for messages.
        size: its length in bytes, or the most that it can be.

    Raises:
        SourceError: this is not FITS, or the file ends too early.
    """
    start, number = 0, 0
    while True:
        file.seek(start)
        block = file.read(BLOCK)
        if number > 0 and not block.strip(b"\0 \n"):
            return
        place = f"{path} [HDU {number}]"
        if not block.startswith(b"XTENSION=" if number else b"SIMPLE  ="):
            raise SourceError(_not_fits(path, block) if number == 0 else _not_a_unit(place, start, block))
        blocks = []
        while True:
            if len(block) < BLOCK:
                raise SourceError(f"{place}: the file ends inside the header, truncated at byte {start + len(block)}")
            # Survey headers hold the odd non-ASCII byte in comments; it matters only in a card that is used.
            blocks.append(block.decode("latin-1"))
            end = re.search(r"^(?:.{80})*?END {77}", blocks[-1], re.DOTALL)
            if end:
                blocks[-1] = blocks[-1][: end.end()]
                break
            block = file.read(BLOCK)
        data = start + len(blocks) * BLOCK
        header = Header("".join(blocks), place)
        unit = Unit(place, header, start, data, _data_size(header, place))
        if unit.end > size:
            raise SourceError(f"{place}: the file is {size} bytes long; expected {unit.end} or more: it is truncated")
        yield unit
        start, number = unit.end, number + 1


def _data_size(header: Header, place: str) -> int:
    axes = header.value("NAXIS", int)
    bits = header.value("BITPIX", int)
    lengths = [header.value(f"NAXIS{i}", int) for i in range(1, axes + 1)] if 0 <= axes <= 999 else [-1]
    extra = header.value("PCOUNT", int, 0)
    if bits not in _IMAGES or any(length < 0 for length in lengths) or extra < 0:
        raise SourceError(f"{place}: BITPIX = {bits}, axes {lengths}, PCOUNT = {extra}; expected a possible data unit")
    if not lengths:
        return 0
    count = 1
    for length in lengths:
        count *= length
    return abs(bits) // 8 * header.value("GCOUNT", int, 1) * (extra + count)


def _not_fits(path: str, block: bytes) -> str:
    if not block:
        return f"{path}: the file is empty; expected a FITS file"
    known = {b"\x1f\x8b": "gzip data", b"PK": "a zip archive", b"\x89HDF": "an HDF5 file", b"BZh": "bzip2 data"}
    found = next((what for magic, what in known.items() if block.startswith(magic)), None)
    if found is None and block[257:262] == b"ustar":
        found = "a tar archive"
    if found is None and re.match(rb"\s*<(!doctype|html|\?xml|head)", block, re.IGNORECASE):
        found = "a web page, perhaps saved in place of the download"
    beginning = block[:24].decode("latin-1")
    return f"{path}: not FITS but {found or f'bytes that begin {beginning!r}'}; expected a FITS file"


def _not_a_unit(place: str, start: int, block: bytes) -> str:
    return f"{place}: byte {start} begins {block[:9].decode('latin-1')!r}; expected the next header or the file's end"


class FitsFile(AbstractContextManager["FitsFile"]):
    """An open FITS file whose units have all been located.

    Leaving its context after a type, value, index or arithmetic error raises a SourceError that names the file.

    Arguments:
        files: where it lies.
        name: its name there; the file is plain or gzipped (told by its content, not by its name).

    Raises:
        SourceError: the file cannot be opened, is not FITS or is truncated.
    """

    def __init__(self, files: Files, name: str) -> None:
        self.path = files.place(name)
        self._sound: set[int] = set()
        self._kept: dict[int, bytes] = {}
        self._unpacked: dict[int, Shaped[np.ndarray, "n ..."]] = {}
        self._limit = 0
        with _reading(self.path):
            self._file, size = _unpack(files.open(name), self.path)
        try:
            with _reading(self.path):
                self.units = list(_scan(self._file, self.path, size))
        except SourceError:
            self._file.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if isinstance(error, (ArithmeticError, LookupError, TypeError, ValueError)):
            # What a column of the wrong kind or shape leads to further on.
            raise SourceError(f"{self.path}: contents cannot be used ({error}); expected the survey's own") from error

    def __repr__(self) -> str:
        return f"FitsFile({self.path!r}, {self.contents})"

    def keep(self) -> None:
        """Hold what is verified from now on, up to a limit, for the reads that follow."""
        self._limit = KEPT_LIMIT

    @property
    def contents(self) -> str:
        """The units' names, for messages."""
        names = [unit.name or f"HDU {i}" for i, unit in enumerate(self.units) if i > 0 or unit.size]
        shown = ", ".join(names[:8]) or "no data"
        return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def find(self, name: str) -> Unit | None:
        """Give the first unit of that name, or None."""
        return next((unit for unit in self.units if unit.name == name), None)

    def find_table(self, *columns: str) -> Unit | None:
        """Give the first table that has all these columns (lower case), or None."""
        wanted = set(columns)
        return next((unit for unit in self.units if wanted <= unit.columns.keys()), None)

    def table(self, unit: Unit, columns: list[str], start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Read columns of a table in the machine's byte order: numbers, or strings without their padding.

        Arguments:
            unit: the table.
            columns: names in lower case.
            start: first row.
            stop: one past the last row; None for all.

        Returns:
            An array of shape [rows] or [rows, repeat] for each column.

        Raises:
            SourceError: a column is missing or of a kind that is not supported, or the checksum is wrong.
        """
        missing = [name.upper() for name in columns if name not in unit.columns]
        if missing:
            raise SourceError(
                f"{unit.place}: no column {', '.join(missing)} in {unit.name or 'the table'}; expected it"
            )
        chosen = [unit.columns[name] for name in columns]
        for name, column in zip(columns, chosen, strict=True):
            if column.code not in _FORMATS:
                raise SourceError(f"{unit.place}: column {name.upper()} has format {column.code!r}; expected numbers")
        formats = [
            f"S{c.repeat}" if c.code == "A" else (_FORMATS[c.code], (c.repeat,) if c.repeat != 1 else ())
            for c in chosen
        ]
        width = unit.shape[1]
        kind = np.dtype(
            {"names": columns, "formats": formats, "offsets": [c.offset for c in chosen], "itemsize": width}
        )
        stop = unit.rows if stop is None else stop
        raw = np.frombuffer(self._bytes(unit, start * width, stop * width), kind)
        values = {
            name: _decode(raw[name], unit.header, f"TSCAL{c.number}", f"TZERO{c.number}", f"TNULL{c.number}")
            for name, c in zip(columns, chosen, strict=True)
        }
        return {name: values[name] == "T" if unit.columns[name].code == "L" else values[name] for name in columns}

    def image(self, unit: Unit, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "n ..."]:
        """Read rows `start` to `stop` (along the slowest axis; all by default) of an image.

        Raises:
            SourceError: the unit is no image, or its checksum is wrong.
        """
        stop = unit.rows if stop is None else stop
        if unit.header.get("ZIMAGE") is True:
            return self._compressed(unit)[start:stop].copy()
        if unit.is_table or not unit.shape:
            raise SourceError(f"{unit.place}: {unit.name or 'the unit'} is not an image; expected one")
        kind = np.dtype(_IMAGES[unit.header.value("BITPIX", int)])
        width = int(np.prod(unit.shape[1:], dtype=np.int64)) * kind.itemsize
        raw = np.frombuffer(self._bytes(unit, start * width, stop * width), kind)
        return _decode(raw.reshape(stop - start, *unit.shape[1:]), unit.header, "BSCALE", "BZERO", "BLANK")

    def _compressed(self, unit: Unit) -> Shaped[np.ndarray, "n ..."]:
        # Imported here: the surveys' own files seldom need it, and it is slow to import.
        from astropy.io import fits

        if unit.start in self._unpacked:
            return self._unpacked[unit.start]
        data = self._bytes(unit, 0, unit.size)
        self._file.seek(unit.start)
        heading = self._file.read(unit.data - unit.start)
        primary = fits.PrimaryHDU().header.tostring().encode()
        whole = io.BytesIO(b"".join([primary, heading, data, bytes(unit.end - unit.data - unit.size)]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with fits.open(whole, memmap=False) as units:
                    data = units[1].data
                    image = np.asarray(data, data.dtype.newbyteorder("="))
        except Exception as error:
            raise SourceError(f"{unit.place}: the compressed image cannot be unpacked: {error}") from error
        if self._limit:
            self._unpacked[unit.start] = image
        return image

    def _bytes(self, unit: Unit, start: int, stop: int) -> bytes | memoryview:
        """Read bytes `start` to `stop` of the data and verify the checksums that the unit carries, once."""
        if unit.start in self._kept:
            return memoryview(self._kept[unit.start])[start:stop]
        found: bytes | memoryview
        with _reading(self.path):
            if unit.start in self._sound or not ("DATASUM" in unit.header or "CHECKSUM" in unit.header):
                self._file.seek(unit.data + start)
                found = self._file.read(stop - start)
            elif unit.size + sum(map(len, self._kept.values())) <= self._limit:
                self._kept[unit.start] = self._verified(unit, 0, unit.size)
                found = memoryview(self._kept[unit.start])[start:stop]
            else:
                found = self._verified(unit, start, stop)
                self._sound.add(unit.start)
        if len(found) != stop - start:
            raise SourceError(f"{unit.place}: {len(found)} bytes could be read; expected {stop - start}")
        return found

    def _verified(self, unit: Unit, start: int, stop: int) -> bytes:
        """Read the whole unit in chunks, keep the bytes that are wanted, and compare the sums."""
        self._file.seek(unit.start)
        heading = _add(0, self._file.read(unit.data - unit.start))
        kept: list[bytes] = []
        total, position = 0, 0
        while position < unit.end - unit.data:
            chunk = self._file.read(min(CHUNK, unit.end - unit.data - position))
            if not chunk:
                break
            total = _add(total, chunk)
            low, high = max(start - position, 0), min(stop - position, len(chunk))
            if low < high:
                kept.append(chunk if high - low == len(chunk) else chunk[low:high])
            position += len(chunk)
        stated = str(unit.header.get("DATASUM") or "").strip()
        if stated and stated != str(total) and not (stated == "0" and total == 0xFFFFFFFF):
            raise SourceError(f"{unit.place}: the data sum to {total}; expected DATASUM = {stated}: they are damaged")
        # Of a whole unit the sum is all ones by construction; a blank or zero card states nothing.
        if str(unit.header.get("CHECKSUM") or "").strip("0 ") and _fold(heading + total) not in (0, 0xFFFFFFFF):
            raise SourceError(f"{unit.place}: the checksum of {unit.name or 'the unit'} is wrong: it is damaged")
        return b"".join(kept)


def _fold(total: int) -> int:
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def _add(total: int, block: bytes) -> int:
    """Add a block of whole 4-byte words to a ones' complement sum (FITS Standard, appendix J)."""
    words = np.frombuffer(block, ">u4", count=len(block) // 4)
    return _fold(total + int(words.sum(dtype=np.uint64)))


def _decode(
    raw: Shaped[np.ndarray, "n ..."], header: Header, scale_key: str, zero_key: str, null_key: str
) -> Shaped[np.ndarray, "n ..."]:
    """Turn stored values into the machine's own numbers and strings."""
    if raw.dtype.kind == "S":
        return np.char.strip(np.char.decode(raw, "ascii", "replace"))
    own = raw.astype(raw.dtype.newbyteorder("="))
    scale = header.value(scale_key, float, 1.0)
    # Not as a float: 2⁶³ must stay exact where it is written as an integer.
    zero = header.get(zero_key)
    zero = 0 if zero is None else zero
    if isinstance(zero, str):
        raise SourceError(f"{header.place}: keyword {zero_key} is {zero!r}; expected a number")
    if scale == 1 and zero == 0:
        return own
    top = 1 << (8 * own.dtype.itemsize - 1)
    if own.dtype.kind == "i" and scale == 1 and zero == top:
        # FITS has no unsigned integers: they are stored shifted. Flipping the top bit undoes it exactly.
        unsigned = own.view(own.dtype.str.replace("i", "u"))
        return np.asarray(unsigned ^ unsigned.dtype.type(top))
    null = header.get(null_key) if own.dtype.kind in "iu" else None
    scaled = own * scale + zero
    return scaled if null is None else np.where(own == null, np.nan, scaled)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what reading a file may raise into an error that names the file."""
    try:
        yield
    except SourceError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: gzip data damaged or truncated ({error}); expected a whole file") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}; expected a readable file") from error


def _unpack(file: BinaryIO, place: str) -> tuple[BinaryIO, int]:
    """Give the file itself, or its contents where it is gzipped, and the length of that."""
    if file.read(2) != b"\x1f\x8b":
        return file, file.seek(0, os.SEEK_END)
    with file:
        file.seek(0)
        unpacked = gzip.GzipFile(fileobj=file).read(UNPACKED_LIMIT + 1)
    if len(unpacked) > UNPACKED_LIMIT:
        raise SourceError(f"{place}: unpacks to more than {UNPACKED_LIMIT >> 30} GiB; unpack it with gunzip first")
    return io.BytesIO(unpacked), len(unpacked)


def count_rows(files: Files, name: str, table: str) -> int | None:
    """Give the length of a table, reading no more of the file than its headers up to there.

    Returns:
        The rows, or None where there is no such table.

    Raises:
        SourceError: the file cannot be opened, is not FITS or ends too early.
    """
    place = files.place(name)
    with _reading(place), files.open(name) as file:
        packed = file.read(2) == b"\x1f\x8b"
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not packed:
            return _rows_of(_scan(file, place, size), table)
        with gzip.GzipFile(fileobj=file) as unpacked:
            return _rows_of(_scan(unpacked, place, size * DEFLATE_RATIO), table)


def _rows_of(units: Iterator[Unit], name: str) -> int | None:
    return next((unit.rows for unit in units if unit.name == name and unit.is_table), None)
