"""Tables for other programs, written run by run in bounded memory and put in place when they are whole."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distspec.errors import StoreError

__all__ = ["in_place", "write_file"]


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """Give a hidden name beside `path` to write a file or folder to, and rename it when all went well.

    Raises:
        StoreError: the place cannot be written.
    """
    name = f".{path.name}.{uuid.uuid4().hex}"
    partial = path.with_name(f"{name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        old = path.with_name(f"{name}.old.partial")
        if path.is_dir():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"cannot write {path}: {reason}; make room or choose another place by export.to") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            partial.unlink()


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole: under another name first, then renamed over the old one."""
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}; choose another output") from error
    finally:
        partial.unlink(missing_ok=True)
