"""What surrounds work in a worker: one thread, the driver's folder, failures as values.

Imports neither Ray nor torch: a worker's start is mostly imports, and not every kind of work needs them.
"""

import os
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np

from distspec.errors import DistspecError, ShardError
from distspec.runtime.threads import one_thread
from distspec.store import limit_threads

__all__ = ["ActorWorker", "PoolWorker", "Prepared", "Work", "apply_work", "unpack"]

Work = Callable[[Any], Any]
"""One worker's function; made in the worker by calling an importable factory with small arguments."""


def apply_work(work: Work, item: Any) -> Any:
    """Call the work; what it does not raise as an error of ours becomes a ShardError."""
    try:
        return work(item)
    except DistspecError:
        raise
    except Exception as error:
        raise ShardError(f"a worker failed: {type(error).__name__}: {error}") from error


class Prepared:
    """Work that is made with its first item, and done in one thread: here or in a worker must not show."""

    def __init__(self, factory: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        self._factory, self._arguments = factory, arguments
        self._work: Work | None = None

    def __call__(self, item: Any) -> Any:
        if self._work is None:
            with one_thread():
                self._work = self._factory(*self._arguments)
        # Again, since making it may have loaded libraries with pools of their own.
        with one_thread():
            return self._work(item)


class ActorWorker:
    """Applies work to items; failures travel back as values, so that none is retried."""

    def __init__(self, packed: bytes) -> None:
        # Relative paths in the settings mean the same for every worker as for the driver.
        folder, factory, arguments = cloudpickle.loads(packed)
        os.chdir(folder)
        # One core each: otherwise every worker of a machine takes all of it.
        limit_threads(1)
        self._work = Prepared(factory, arguments)

    def apply(self, item: bytes) -> bytes:
        try:
            result = apply_work(self._work, cloudpickle.loads(item))
        except DistspecError as error:
            result = error
        packed: bytes = cloudpickle.dumps(result)
        return packed


class PoolWorker(ActorWorker):
    """The same behind the interface of Ray Data: a batch of one row in, one row out."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": np.array([self.apply(batch["item"][0])], dtype=object)}


def unpack(packed: bytes) -> Any:
    """Give what a worker sent back; raise it where it is an error."""
    result = cloudpickle.loads(packed)
    if isinstance(result, Exception):
        raise result
    return result
