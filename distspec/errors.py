"""Every error that `distspec` raises for a user's input or data.

Each one is also the builtin that it specialises. The message says what was found, what was expected and what to do.
All take one positional message, so that they travel between Ray processes; extra facts are attributes set afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BucketError",
    "CheckpointError",
    "ConfigError",
    "DistspecError",
    "DistspecWarning",
    "LayoutError",
    "PartialShardError",
    "ShardError",
    "SourceError",
    "StoreError",
    "StoreNotFoundError",
    "UnreachableError",
    "extra",
]


class DistspecError(Exception):
    """Base of all errors below: the command line prints its message in one line and exits with status 2."""


class DistspecWarning(UserWarning):
    """Something a user should know of that changes no result: the command line prints it in one line."""


class ConfigError(DistspecError, ValueError):
    """A settings file, key or value is wrong."""


class SourceError(DistspecError, OSError):
    """Survey data are missing or cannot be read."""


class UnreachableError(SourceError):
    """The place of survey data does not answer: nothing is known of what lies there."""


class StoreError(DistspecError):
    """A store cannot be used as asked: it is damaged, locked or not writable."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at the given place."""


class BucketError(StoreError, OSError):
    """A bucket does not answer, or refuses."""


class LayoutError(StoreError, ValueError):
    """A store's grid, shape, dtype or schema number differs from what the caller needs."""


class PartialShardError(StoreError, ValueError):
    """A write would cover only a part of a shard, or a shard is missing a part."""


class CheckpointError(DistspecError, ValueError):
    """Weights are damaged or do not belong to these data."""


class ShardError(DistspecError, RuntimeError):
    """A worker failed on a shard.

    Attributes:
        rows: first and one-past-last row of the shard, or None where unknown.
    """

    rows: tuple[int, int] | None = None


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the import of a package that only some need: tell which extra of distspec brings it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"this needs {error.name}, which is not installed; pip install 'distspec[{name}]'") from error
