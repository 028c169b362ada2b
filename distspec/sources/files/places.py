"""Where a survey's files lie: a folder, one file, a list, an archive or a bucket, all listed and opened alike.

Everything but local files is reached through fsspec. A remote file is taken whole into memory when it is opened: survey
files are read nearly whole anyway, and one request costs less than many. Large ones of which little is wanted can be
read by ranges instead.
"""

import errno
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from distspec.addresses import BUCKETS, brief
from distspec.errors import SourceError, UnreachableError

__all__ = ["Entry", "Files", "Torn"]

FITS = (".fits", ".fits.gz")

_ARCHIVES = (".tar", ".zip")

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_TORN_LIMIT = 1 << 28
"""Most that is read of a torn file: what identifies its spectra stands at its beginning."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as it is listed.

    Arguments:
        name: path relative to the root of `Files`, with forward slashes; the file's identity in a store.
        size: bytes.
        changed: time of the last change, ns since 1970; 0 where the place does not say.
        count: spectra in the file, or None where it must be opened to know.
    """

    name: str
    size: int
    changed: int
    count: int | None = None


@dataclass(frozen=True)
class Files:
    """The files under one path; small and picklable.

    Arguments:
        root: a file, a folder, a text file (`*.txt`, `*.list`) with one path a line, a `.tar` or `.zip`, or a URL.
        expected: what should be there, for messages.
        ranges: read remote files by ranges, not whole.
    """

    root: str
    expected: str
    ranges: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # An open archive or connection belongs to its process.
        return {key: value for key, value in self.__dict__.items() if key != "_filesystem"}

    def list(self, suffixes: tuple[str, ...] = FITS) -> list[Entry]:
        """List the files with one of these endings (any case), sorted by name.

        Hidden files (such as the `._name` twins that some systems leave on shared disks) are left out.

        Raises:
            SourceError: there is no such path, or nothing with such an ending in it.
        """
        try:
            found = sorted(self._walk(suffixes), key=lambda entry: entry.name)
        except SourceError:
            raise
        except Exception as error:  # each file system fails in its own way
            raise SourceError(f"{self.root}: cannot be listed ({brief(error)}); expected {self.expected}") from error
        if not found:
            raise SourceError(f"no *{' or *'.join(suffixes)} file in {self.root!r}; expected {self.expected}")
        return found

    def open(self, name: str) -> BinaryIO:
        """Open one file for reading; it can seek.

        Raises:
            OSError: it cannot be opened.
        """
        if self._filesystem is None:
            local = self.local(name)
            if local.exists() and not local.is_file():
                raise OSError(errno.EINVAL, "not a regular file")
            return local.open("rb")
        inner = self._filesystem[0]
        try:
            path = self._path(name)
            if self.ranges:
                return cast(BinaryIO, inner.open(path, "rb"))
            data: bytes = inner.cat_file(path)
        except Exception as error:
            raise self._failed(name, error) from error
        return io.BytesIO(data)

    def _failed(self, name: str, error: Exception) -> OSError:
        """Tell a file that is damaged or not there from a place that does not answer, of which nothing is known."""
        if isinstance(error, FileNotFoundError | PermissionError):
            return error
        if self._is_archive:  # each kind has errors of its own
            return error if isinstance(error, OSError) else OSError(brief(error))
        return UnreachableError(
            f"{self.place(name)} cannot be reached ({brief(error)}); see to connection and credentials, and run the "
            "same command again"
        )

    def state(self, name: str) -> tuple[int, ...]:
        """Give what changes when a local file is written again; nothing of a remote file, or of one that is gone."""
        if self._filesystem is not None:
            return ()
        try:
            stat = self.local(name).stat()
        except OSError:
            # To open it will say what is wrong.
            return ()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def place(self, name: str) -> str:
        """Name a file for messages."""
        if self._filesystem is not None:
            root = self.root.rstrip("/")
            return root if self._filesystem[2] else f"{root}/{name}"
        return str(self.local(name))

    def has(self, name: str) -> bool:
        """Tell whether there is a file of this name under the root."""
        if self._filesystem is None:
            return self.local(name).is_file()
        if self._is_archive:
            return bool(self._filesystem[0].exists(self._path(name)))
        try:
            # fsspec's `exists` takes every failure for an absence.
            self._filesystem[0].info(self._path(name))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise self._failed(name, error) from error
        return True

    def beside(self, name: str, other: str) -> str:
        """Name the file `other` in the folder of `name`."""
        return (PurePosixPath(name).parent / other).as_posix()

    def near(self, name: str, other: str) -> tuple[str, ...]:
        """Name the files called `other` in the folder of `name`, then those in the folders right below it, sorted."""
        folder = PurePosixPath(name).parent
        if self._filesystem is None:
            place = self.local(name).parent
            below = [folder / path.parent.name / other for path in sorted(place.glob(f"*/{other}"))]
        else:
            inner, prefix, _ = self._filesystem
            pattern = "/".join(part for part in (prefix, folder.as_posix(), "*", other) if part not in ("", "."))
            found = inner.glob(pattern)
            if self._is_archive and not found:
                found = inner.glob(f"./{pattern}")
            below = [folder / PurePosixPath(path).parent.name / other for path in sorted(found)]
        same = self.beside(name, other)
        return ((same,) if self.has(same) else ()) + tuple(path.as_posix() for path in below)

    def local(self, name: str) -> Path:
        """Give the path of a file that lies on a local or shared file system."""
        root = Path(self.root)
        if self._is_list:
            return root.parent / name
        path = root.parent / name if root.is_file() else root / name
        if "\\x" in name and not path.exists():
            odd = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), os.fsencode(name))
            return root / os.fsdecode(odd)
        return path

    @property
    def _is_list(self) -> bool:
        return self.root.lower().endswith((".txt", ".list"))

    @property
    def _is_archive(self) -> bool:
        return self.root.lower().endswith(_ARCHIVES)

    def _path(self, name: str) -> str:
        """Give a file's path in its file system."""
        assert self._filesystem is not None
        inner, prefix, _ = self._filesystem
        if self._is_archive:
            # `tar cf x.tar .` calls its members "./name".
            return name if inner.exists(name) else f"./{name}"
        return f"{prefix}/{name}" if prefix else name

    @cached_property
    def _filesystem(self) -> tuple[Any, str, str] | None:
        """An fsspec file system, the folder in it and the one file that is meant, if any; None for local files."""
        if self._is_archive:
            import fsspec

            kind = Path(self.root).suffix[1:].lower()
            return fsspec.filesystem(kind, fo=self.root), "", ""
        if "://" not in self.root:
            return None
        import fsspec

        scheme = self.root.partition("://")[0]
        if f"{scheme}://" in BUCKETS:
            import obstore.fsspec

            obstore.fsspec.register(scheme)
        inner, prefix = fsspec.core.url_to_fs(self.root)
        prefix = prefix.rstrip("/")
        folder, _, last = prefix.rpartition("/")
        return (inner, folder, last) if "." in last and inner.isfile(prefix) else (inner, prefix, "")

    def _walk(self, suffixes: tuple[str, ...]) -> Iterator[Entry]:
        if self.root.lower().endswith(_PACKED):
            raise SourceError(f"{self.root}: a compressed archive allows no random access; unpack it first")
        if self._filesystem is not None:
            yield from self._walk_remote(suffixes)
            return
        root = Path(self.root)
        if self._is_list and root.is_file():
            yield from self._walk_list(root)
        elif root.is_file():
            yield _entry(root, root.name)
        elif not root.is_dir():
            raise SourceError(f"no file or folder {self.root!r}; expected {self.expected}")
        else:
            for path in _walk_folder(root):
                if path.name.lower().endswith(suffixes) and not path.name.startswith("."):
                    # A name that is no UTF-8 is written with \\xNN for the odd bytes; `local` finds it again.
                    name = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
                    yield _entry(path, name)

    def _walk_list(self, root: Path) -> Iterator[Entry]:
        for line in dict.fromkeys(root.read_text("utf-8").splitlines()):
            name = line.strip()
            if not name or name.startswith("#"):
                continue
            yield _entry(root.parent / name, name)

    def _walk_remote(self, suffixes: tuple[str, ...]) -> Iterator[Entry]:
        assert self._filesystem is not None
        inner, prefix, single = self._filesystem
        if single:
            facts = inner.info(self._path(single))
            yield Entry(single, int(facts.get("size") or 0), _time(facts))
            return
        for path, facts in inner.find(prefix, detail=True).items():
            name = path.removeprefix(prefix).removeprefix("./").lstrip("/")
            if name.lower().endswith(suffixes) and not PurePosixPath(name).name.startswith("."):
                yield Entry(name, int(facts.get("size") or 0), _time(facts))


def _walk_folder(root: Path) -> Iterator[Path]:
    """Give all files below a folder, through links to folders too, each folder once.

    Raises:
        OSError: a folder cannot be listed; to go on without it would lose what it holds.
    """
    seen = {(stat.st_dev, stat.st_ino) for stat in [root.stat()]}

    def refuse(error: OSError) -> None:
        raise error

    for folder, inner, names in os.walk(root, followlinks=True, onerror=refuse):
        kept = []
        for name in inner:
            stat = os.stat(os.path.join(folder, name))
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                kept.append(name)
        inner[:] = kept
        yield from (Path(folder) / name for name in names)


def _entry(path: Path, name: str) -> Entry:
    try:
        stat = path.stat()
    except OSError:
        # Named but not there, or a link to nothing: that is data too, for reading it fails and its row says so.
        return Entry(name, 0, 0)
    return Entry(name, stat.st_size, stat.st_mtime_ns)


def _time(facts: dict[str, Any]) -> int:
    found = next((facts[key] for key in ("mtime", "LastModified", "last_modified", "created") if facts.get(key)), 0)
    seconds = found.timestamp() if hasattr(found, "timestamp") else found
    return int(float(seconds) * 1e9) if isinstance(seconds, int | float) else 0


@dataclass(frozen=True)
class Torn(Files):
    """Files of which one that ends too early can be opened, for what its beginning still says of its contents.

    A torn file claims to be longer than it is; what is missing cannot be read. Of a torn gzip stream the part that can
    be unpacked is given.
    """

    def open(self, name: str) -> BinaryIO:
        """Open one file for reading; see the class."""
        with Files.open(self, name) as file:
            data = file.read(_TORN_LIMIT)
        if data.startswith(b"\x1f\x8b"):
            data = _unpack_beginning(data)
        return cast(BinaryIO, _Endless(data))


def _unpack_beginning(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    found = io.BytesIO()
    with suppress(zlib.error):
        for start in range(0, len(data), 1 << 16):
            found.write(unpacker.decompress(data[start : start + (1 << 16)]))
            if found.tell() > _TORN_LIMIT:
                break
    return found.getvalue()


class _Endless(io.BytesIO):
    """Bytes whose end, if one asks for it, lies beyond any length that a header can state."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return 1 << 62
        return super().seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        # The part of a block at the end belongs to what is torn.
        return found if size is None or size < 0 or len(found) == size else b""
