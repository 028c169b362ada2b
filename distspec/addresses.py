"""Where results lie: a folder or a bucket, by one small set of calls, those of `pathlib.Path` that results need.

A bucket has no folders, only names with slashes in them; what lies under a name is its folder. What is put there
appears whole. It is reached by obstore, in Rust, which tries again on 429, 503 and broken connections; credentials
and end points come from the environment, such as AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and AWS_REGION. Whatever goes
wrong there is an OSError, as it is with files, in one line (`BucketError`).
"""

import errno
import fnmatch
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from distspec.errors import BucketError, ConfigError

__all__ = ["BUCKETS", "SETTINGS", "BucketPath", "Place", "Stat", "absolute", "address_of", "brief", "in_bucket"]

BUCKETS: Final = ("s3://", "gs://", "az://", "abfs://")
"""Schemes that obstore serves."""

SETTINGS: Final = ("AWS_", "AZURE_", "GOOGLE_")
"""How the names of variables begin that tell where object stores are and who asks."""


def in_bucket(text: str) -> bool:
    """Tell whether an address is one in a bucket."""
    return text.startswith(BUCKETS)


def brief(error: BaseException) -> str:
    """Give the first sentence of an error: those of object stores go on with the server's own pages."""
    first = (str(error) or repr(error)).partition("Debug source")[0]
    return " ".join(first.split())[:300]


class Stat(NamedTuple):
    """What is asked of a file."""

    st_size: int


@dataclass(frozen=True, order=True)
class BucketPath:
    """A name in a bucket; small and picklable.

    Arguments:
        address: URL without a slash at its end.
        seconds: after which what failed is not tried again; None leaves that to the library (minutes).
    """

    address: str
    seconds: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, other: str) -> "BucketPath":
        return BucketPath(f"{self.address}/{other}")

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self._parts[-1] if len(self._parts) > 1 else ""

    @property
    def parent(self) -> "BucketPath":
        """What the name lies in; that of a bucket is itself."""
        scheme = self.address.partition("://")[0]
        return BucketPath(f"{scheme}://{'/'.join(self._parts[:-1] or self._parts)}")

    def with_name(self, name: str) -> "BucketPath":
        """Give another name beside this one."""
        return self.parent / name

    def resolve(self) -> "BucketPath":
        """Give itself: an address means the same to every process."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no folders to be made."""

    def exists(self) -> bool:
        """Tell whether it is a file, or anything lies under it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Tell whether there is content of exactly this name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Tell whether anything lies under it."""
        return next(self.iterdir(), None) is not None

    def stat(self) -> Stat:
        """Give its size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        import obstore

        with self._asking():
            return Stat(int(obstore.head(self._store, self._key)["size"]))

    def read_bytes(self) -> bytes:
        """Read all of it.

        Raises:
            OSError: it is not there, or the bucket does not answer.
        """
        return self.read_tagged()[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read all of it as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> BinaryIO:
        """Take it whole into memory; it can seek."""
        if mode != "rb":
            raise ValueError(f"what lies in a bucket is opened for reading bytes, not by {mode!r}")
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, content: bytes) -> None:
        """Put content in the place of whatever is there, whole or not at all.

        Raises:
            OSError: the bucket does not take it.
        """
        self._put(content)

    def upload(self, file: Path) -> None:
        """Put what is in a local file, of any size; see `write_bytes`."""
        self._put(file)

    def download(self, file: Path) -> None:
        """Copy it to a local file, of any size.

        Raises:
            OSError: it is not there, the bucket does not answer, or the disk is full.
        """
        import obstore

        with self._asking(), file.open("wb") as out:
            for part in obstore.get(self._store, self._key).stream():
                out.write(part)

    def iterdir(self) -> "Iterator[BucketPath]":
        """Give what lies directly under it, by name."""
        import obstore

        with self._asking():
            found = obstore.list_with_delimiter(self._store, self._key or None)
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        yield from (self / name for name in sorted({key.rstrip("/").rpartition("/")[2] for key in keys}))

    def glob(self, pattern: str) -> "Iterator[BucketPath]":
        """Give what lies directly under it and has a name like this."""
        yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        import obstore

        if not missing_ok:
            self.stat()
        with self._asking():
            obstore.delete(self._store, self._key)

    def remove(self) -> None:
        """Remove the file, and all that lies under it."""
        import obstore

        with self._asking():
            listed = [entry["path"] for part in obstore.list(self._store, self._key) for entry in part]
            # The name itself need not be there: a bucket says nothing of that.
            obstore.delete(self._store, [*listed, self._key])

    # What a lock needs: to write only if nobody else has.

    def read_tagged(self) -> tuple[bytes, str]:
        """Read all of it, and the tag of this very content."""
        import obstore

        with self._asking():
            found = obstore.get(self._store, self._key)
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def put_over(self, content: bytes, tag: str | None) -> str | None:
        """Put content where still the content of a tag lies; without a tag, where nothing does.

        Returns:
            The new tag; None where something else lies there by now.

        Raises:
            OSError: the bucket does not answer, or knows no such conditions.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            return self._put(content, "create" if tag is None else {"e_tag": tag})
        except OSError as error:
            if isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
                return None
            raise

    def _put(self, content: bytes | Path, mode: Any = "overwrite") -> str:
        import obstore

        # Only a plain write can be one of several parts.
        parts = {} if mode == "overwrite" else {"use_multipart": False}
        try:
            with self._asking():
                return str(obstore.put(self._store, self._key, content, mode=mode, **parts)["e_tag"])
        except FileNotFoundError as error:
            raise BucketError(f"{self.address} cannot be written: there is no such bucket") from error

    @property
    def _parts(self) -> list[str]:
        return self.address.partition("://")[2].split("/")

    @property
    def _key(self) -> str:
        return "/".join(self._parts[1:])

    @property
    def _store(self) -> Any:
        known = tuple((name, value) for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS))
        return _bucket(self.address.removesuffix(self._key).rstrip("/"), known, self.seconds)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn the errors of obstore into those of files."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such file in the bucket", self.address) from error
        except Exception as error:  # obstore has several families of its own
            raise BucketError(
                f"{self.address} cannot be reached ({brief(error)}); see to connection, name and credentials"
            ) from error


@lru_cache(maxsize=8)
def _bucket(root: str, settings: tuple[tuple[str, str], ...], seconds: float | None) -> Any:
    """Open a bucket, once for the same settings of the environment: each has connections of its own."""
    from obstore.store import from_url

    if seconds is None:
        return from_url(root)
    return from_url(root, retry_config={"retry_timeout": timedelta(seconds=seconds)})


Place = Path | BucketPath
"""Where a file or a folder of results lies."""


def address_of(text: str | Path | BucketPath) -> Place:
    """Give the place that a setting names.

    Raises:
        ConfigError: it is a URL that is no bucket's, or names no place in one.
    """
    if isinstance(text, Path | BucketPath):
        return text
    if in_bucket(text):
        scheme, _, rest = text.partition("://")
        parts = [part for part in rest.split("/") if part]
        if not parts or any(odd in text for odd in "#?%"):
            # In URLs these have a meaning of their own, by which other names would be meant than are written.
            raise ConfigError(f"{text} is no address in a bucket; expected such as s3://bucket/run, without # ? %")
        return BucketPath(f"{scheme}://{'/'.join(parts)}")
    text = text.removeprefix("file://")
    if re.match(r"\w{2,}:/", text):
        raise ConfigError(f"{text} is no place for results; expected a folder, or a bucket such as s3://bucket/run")
    return Path(text)


def absolute(text: str) -> str:
    """Give a path from the root, as this process means it; a URL stays as it is."""
    return text if "://" in text else str(Path(text).resolve())
