"""Where a store lies: a folder on a local or shared file system, or an object store behind a URL."""

from pathlib import Path
from typing import Any

import zarr
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, ObjectStore

from distspec.addresses import address_of, brief, in_bucket
from distspec.errors import DistspecError, StoreError

__all__ = ["clear", "has", "names_in", "open_place", "place_of"]


def open_place(path: str | Path, *, write: bool) -> Any:
    """Open a folder or URL as a zarr store; nothing need be there yet.

    Credentials and end points of object stores come from the environment, such as AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL and AWS_REGION.

    Raises:
        StoreError: the URL cannot be served.
    """
    text = str(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalStore(text, read_only=not write)
    try:
        if in_bucket(text):
            from obstore.store import from_url

            return ObjectStore(from_url(str(address_of(text))), read_only=not write)
        return FsspecStore.from_url(text, read_only=not write)
    except DistspecError:
        raise
    except Exception as error:  # each library refuses in its own way
        raise StoreError(
            f"{text} cannot be reached ({brief(error)}); expected a folder or a URL such as s3://..."
        ) from error


def has(store: Any, key: str) -> bool:
    """Tell whether a store holds this key.

    Raises:
        StoreError: the place does not answer.
    """
    try:
        return bool(sync(store.exists(key)))
    except Exception as error:  # each library fails in its own way
        raise StoreError(
            f"{place_of(store)} does not answer ({brief(error)}); see to the connection and the name"
        ) from error


def names_in(store: Any, folder: str = "") -> list[str]:
    """Name what lies directly in a store, or in a folder of it."""

    async def collect() -> list[str]:
        # Called in here, since obstore wants a running event loop.
        return [name.rstrip("/") async for name in store.list_dir(folder)]

    return [name for name in sync(collect()) if name]


def clear(store: Any) -> None:
    """Remove all that a store holds."""
    sync(store.clear())


def place_of(where: Any) -> str:
    """Give the path or URL of a store or of a group in it, for people and for opening it again."""
    if isinstance(where, zarr.Group):
        inner = where.store_path.path
        return place_of(where.store) + (f"/{inner}" if inner else "")
    if isinstance(where, LocalStore):
        return str(where.root)
    if isinstance(where, FsspecStore):
        protocol = where.fs.protocol if isinstance(where.fs.protocol, str) else where.fs.protocol[0]
        return f"{protocol}://{where.path.lstrip('/')}"
    inner = where.store
    prefix = str(inner.prefix or "").strip("/")
    return f"{_scheme(inner)}://{inner.config['bucket']}/{prefix}" if hasattr(inner, "config") else str(where)


def _scheme(inner: Any) -> str:
    return {"S3Store": "s3", "GCSStore": "gs", "AzureStore": "az"}.get(type(inner).__name__, "s3")
