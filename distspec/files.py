"""Files and folders that appear whole or not at all, and the forms that they have: JSON, CSV, safetensors.

What is written gets a hidden name beside its place first and is renamed over it when all went well, so that whoever
looks finds the old content or the new one. The store's own files are not written here.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from distspec.errors import CheckpointError, DistspecError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "csv_text",
    "in_place",
    "read_json",
    "read_tensors",
    "replacing",
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
def in_place(path: Path, advice: str = _ADVICE) -> Iterator[Path]:
    """Give a hidden name beside `path` to write a file or folder to, and rename it when all went well.

    Arguments:
        path: the place; what lies there is replaced.
        advice: what to do where it cannot be written.

    Raises:
        StoreError: the place cannot be written.
    """
    try:
        with replacing(path) as partial:
            yield partial
    except DistspecError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_file(path: Path, content: str | bytes | memoryview, advice: str = _ADVICE) -> None:
    """Write a file that appears whole; text becomes UTF-8 with its line ends as they are.

    Raises:
        StoreError: the place cannot be written.
    """
    with in_place(path, advice) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_folder(folder: Path, files: Mapping[str, bytes], advice: str = _ADVICE) -> None:
    """Write a folder of files that appears whole, in place of an earlier one.

    Raises:
        StoreError: the place cannot be written.
    """
    with in_place(folder, advice) as partial:
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
            _sync(partial / name)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


# --- JSON and safetensors --------------------------------------------------------------------------------------------


def read_json(path: Path, make: str = "train first") -> dict[str, Any]:
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
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {path.parent}: {error.strerror or error}; {make}") from None
    except (ValueError, RecursionError) as error:
        advice = f"restore it, or remove {path.parent}, to have it made again"
        raise CheckpointError(f"{path} is not valid JSON: {error}; {advice}") from None
    if not isinstance(text, dict):
        raise CheckpointError(f"{path} is not a checkpoint's description")
    return text


def read_tensors(path: Path, sha256: str) -> "dict[str, Tensor]":
    """Read a safetensors file whose SHA-256 is known.

    Raises:
        CheckpointError: the file is absent, altered or not safetensors.
    """
    # Imported here: whoever writes a table needs no torch.
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
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
    path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], *, quoted: bool = True, end: str = "\n"
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
