"""Files and folders that appear whole or not at all, and the forms that they have: JSON, CSV, safetensors.

What is written gets a hidden name beside its place first and is renamed over it when all went well, so that whoever
looks finds the old content or the new one. What goes to a bucket is made in a local folder first. The store's own
files are not written here.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from distspec.addresses import BucketPath, Place
from distspec.errors import BucketError, CheckpointError, DistspecError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "csv_text",
    "in_place",
    "is_unfinished",
    "local_copy",
    "read_json",
    "read_tensors",
    "remove",
    "replacing",
    "unfinished",
    "write_csv",
    "write_file",
    "write_folder",
]

_ADVICE: Final = "make room or choose another output"

_LARGEST_JSON: Final = 1 << 24

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet takes for the beginning of a formula."""

_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


# --- whole or not at all ---------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden name beside `path` to write a file or folder to, and rename it when all went well.

    For callers with an error of their own: an OSError passes as it is.
    """
    name = f".{path.name}.{uuid.uuid4().hex}"
    partial, old = path.with_name(f"{name}.partial"), path.with_name(f"{name}.old.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if partial.is_file():
            _sync(partial)
        elif path.is_dir():
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            partial.unlink()


@contextmanager
def _uploading(path: BucketPath) -> Iterator[Path]:
    """Give a name in a local folder to write a file or folder to, and put it in a bucket when all went well.

    The files of a folder appear one after another, by name; those that are not among them go. Until all are there, a
    mark beside it says so (`is_unfinished`).
    """
    with tempfile.TemporaryDirectory(prefix="distspec-") as scratch:
        partial = Path(scratch) / path.name
        yield partial
        if partial.is_file():
            path.upload(partial)
            return
        with unfinished(path):
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    (path / file.relative_to(partial).as_posix()).upload(file)


def _mark_of(folder: BucketPath) -> BucketPath:
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def unfinished(folder: BucketPath) -> Iterator[None]:
    """Remove a folder in a bucket, and mark it as unfinished while its files are written."""
    _mark_of(folder).write_bytes(b"")
    folder.remove()
    yield
    _mark_of(folder).unlink()


def is_unfinished(folder: Place) -> bool:
    """Tell whether the writing of a folder in a bucket was broken off."""
    return isinstance(folder, BucketPath) and _mark_of(folder).is_file()


@contextmanager
def in_place(path: Place, advice: str = _ADVICE) -> Iterator[Path]:
    """Give a hidden name beside `path` to write a file or folder to, and rename it when all went well.

    Arguments:
        path: the place; what lies there is replaced.
        advice: what to do where it cannot be written.

    Raises:
        StoreError: the place cannot be written.
    """
    try:
        with replacing(path) if isinstance(path, Path) else _uploading(path) as partial:
            yield partial
    except DistspecError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_file(path: Place, content: str | bytes | memoryview, advice: str = _ADVICE) -> None:
    """Write a file that appears whole; text becomes UTF-8 with its line ends as they are.

    Raises:
        StoreError: the place cannot be written.
    """
    with in_place(path, advice) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_folder(folder: Place, files: Mapping[str, bytes], advice: str = _ADVICE) -> None:
    """Write a folder of files that appears whole, in place of an earlier one.

    In a bucket it is whole where the last of these files is: that goes first, and comes last.

    Raises:
        StoreError: the place cannot be written.
    """
    if isinstance(folder, BucketPath):
        try:
            (folder / list(files)[-1]).unlink(missing_ok=True)
            folder.remove()
            for name, content in files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise StoreError(f"cannot write {folder}: {error.strerror or error}; {advice}") from error
        return
    with in_place(folder, advice) as partial:
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
            _sync(partial / name)


@contextmanager
def local_copy(folder: Place) -> Iterator[Path]:
    """Give a folder itself or, of one in a bucket, a copy of the files in it, for libraries that know files alone.

    Raises:
        OSError: the bucket does not answer.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="distspec-") as scratch:
        for file in folder.iterdir():
            file.download(Path(scratch) / file.name)
        yield Path(scratch)


def remove(place: Place) -> None:
    """Remove a file or a folder with all that is in it; what is not there, or cannot be removed, is left."""
    if isinstance(place, BucketPath):
        with suppress(OSError):
            place.remove()
    elif place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


# --- JSON and safetensors --------------------------------------------------------------------------------------------


def read_json(path: Place, make: str = "train first") -> dict[str, Any]:
    """Read the description of a checkpoint, of a fitted detector, or of what a stage found.

    Arguments:
        path: the file.
        make: what to do where it is missing.

    Raises:
        CheckpointError: it is absent, far too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} is far too large for a description")
        text = json.loads(path.read_bytes())
    except BucketError:
        raise
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {path.parent}: {error.strerror or error}; {make}") from None
    except (ValueError, RecursionError) as error:
        advice = f"restore it, or remove {path.parent}, to have it made again"
        raise CheckpointError(f"{path} is not valid JSON: {error}; {advice}") from None
    if not isinstance(text, dict):
        raise CheckpointError(f"{path} is not a checkpoint's description")
    return text


def read_tensors(path: Place, sha256: str) -> "dict[str, Tensor]":
    """Read a safetensors file whose SHA-256 is known.

    Raises:
        CheckpointError: the file is absent, altered or not safetensors.
    """
    # Imported here: whoever writes a table needs no torch.
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except BucketError:
        raise
    except OSError as error:
        raise CheckpointError(f"no weights at {path}: {error.strerror or error}; train again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{path} is damaged or was changed: its SHA-256 is not the one in its description")
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    return tensors


# --- tables ----------------------------------------------------------------------------------------------------------


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]], *, quoted: bool = True, end: str = "\n") -> str:
    r"""Write a table as CSV.

    A float32 has its own digits; None and what is not finite are empty cells. Text that a spreadsheet would take for
    a formula begins with an apostrophe; text that is a number stays, since ids are text.

    Arguments:
        header: names of the columns.
        rows: cells of each line.
        quoted: quote all text, so that a reader can tell an id from a number; else only where it must be.
        end: of each line.

    Example:
        >>> csv_text(("id", "z"), [("-5.3", np.float32(0.1)), ("=1+1", None)])
        '"id","z"\n"-5.3",0.1\n"\'=1+1",""\n'
    """
    stream = io.StringIO()
    _write_table(stream, header, rows, quoted, end)
    return stream.getvalue()


def write_csv(
    path: Place, header: Sequence[str], rows: Iterable[Sequence[Any]], *, quoted: bool = True, end: str = "\n"
) -> None:
    """Write a table as `csv_text` does to a file that appears whole, one line after another.

    Raises:
        StoreError: the place cannot be written.
    """
    with in_place(path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        _write_table(stream, header, rows, quoted, end)


def _write_table(stream: Any, header: Sequence[str], rows: Iterable[Sequence[Any]], quoted: bool, end: str) -> None:
    # csv quotes a carriage return only where lines end in one; bare, it would end the line for other readers.
    lines = SimpleNamespace(write=lambda line: stream.write(line.removesuffix("\r\n") + end))
    writer = csv.writer(lines, quoting=csv.QUOTE_NONNUMERIC if quoted else csv.QUOTE_MINIMAL, lineterminator="\r\n")
    writer.writerow([_cell(name) for name in header])
    writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> int | float | str:
    if isinstance(value, np.float32):
        value = float(str(value))
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, float):
        return value if math.isfinite(value) else ""
    if isinstance(value, int):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text
