"""What a folder already holds from an archive: `fetch.csv`, one line a file, and `failed.csv` for what did not come.

A line is on disk before the file gets its name, so that a run that is killed between the two leaves a line without a
file, which counts for nothing. A last line that was cut off is dropped.
"""

import csv
import io
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from distspec.errors import SourceError
from distspec.files import csv_text, replacing

__all__ = ["Entry", "Failure", "Manifest", "replace_whole", "writing"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file that came.

    Arguments:
        name: path in the folder, with forward slashes.
        url: where it came from.
        bytes: its length.
        sha256: its own checksum, hexadecimal.
        checksum: the archive's kind of checksum that it agrees with, or "none" where the archive publishes none.
        time: when it was verified, UTC.
    """

    name: str
    url: str
    bytes: int
    sha256: str
    checksum: str
    time: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """One thing that did not come, and why."""

    name: str
    reason: str


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write into one line that names the folder.

    Raises:
        SourceError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(
            f"cannot write to {folder}: {error.strerror or error}; what came is kept: mend this and repeat the command"
        ) from error


class Manifest:
    """The files of a folder that came from an archive; safe to share between threads.

    Arguments:
        folder: where they lie.

    Raises:
        SourceError: `fetch.csv` is there and is something else, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "fetch.csv"
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._load()

    def __repr__(self) -> str:
        return f"Manifest({str(self._folder)!r}, {len(self._entries)} files)"

    def __iter__(self) -> Iterator[Entry]:
        with self._lock:
            return iter(list(self._entries.values()))

    def get(self, name: str) -> Entry | None:
        """Give what is known of a file, or None."""
        with self._lock:
            return self._entries.get(name)

    def add(self, entry: Entry) -> None:
        """Remember a file, on disk before this returns."""
        stamped = replace(entry, time=datetime.now(UTC).isoformat(timespec="seconds"))
        with self._lock, writing(self._folder):
            self._append(_line(astuple(stamped)))
            self._entries[entry.name] = stamped

    def failed(self, failures: Iterable[Failure]) -> Path | None:
        """Write down what did not come; without any, the list of an earlier run is removed."""
        path = self._folder / "failed.csv"
        lines = [_line(astuple(failure)) for failure in sorted(set(failures), key=astuple)]
        with writing(self._folder):
            if not lines:
                path.unlink(missing_ok=True)
                return None
            replace_whole(path, "".join([_line(("name", "reason")), *lines]).encode())
        return path

    def _load(self) -> None:
        header = _line(tuple(field.name for field in fields(Entry)))
        try:
            text = self._path.read_text("utf-8")
        except FileNotFoundError:
            with writing(self._folder):
                replace_whole(self._path, header.encode())
            return
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{self._path} cannot be read ({error}); expected the list of fetched files") from error
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.reader(io.StringIO(whole, newline="")))
        if not whole.startswith(header):
            raise SourceError(f"{self._path} begins {whole[:40]!r}; expected {header.strip()!r}: move it away")
        try:
            for name, url, size, *rest in rows[1:]:
                self._entries[name] = Entry(name, url, int(size), *rest)
        except (ValueError, TypeError) as error:
            raise SourceError(f"{self._path} is damaged ({error}); move it away to verify all files anew") from error
        if whole != text:
            with writing(self._folder):
                replace_whole(self._path, whole.encode())

    def _append(self, line: str) -> None:
        with self._path.open("ab") as file:
            before = file.tell()
            try:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                # A torn line must not be followed by a whole one.
                os.truncate(self._path, before)
                raise


def _line(values: tuple[object, ...]) -> str:
    return csv_text(tuple(str(value) for value in values), (), quoted=False)


def replace_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it appears whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(content)
