"""What surrounds work in a worker: one thread, the driver's variables, failures as values.

Imports neither Ray nor torch: a worker's start is mostly imports, and not every kind of work needs them.
"""

import gc
import os
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from distspec.errors import DistspecError, ShardError
from distspec.runtime.threads import one_thread
from distspec.store import limit_threads

__all__ = ["ActorWorker", "Prepared", "Work", "apply_work", "unpack"]

Work = Callable[[Any], Any]
"""One worker's function; made in the worker by calling an importable factory with small arguments."""


def apply_work(work: "Prepared", *arguments: Any, method: str = "") -> Any:
    """Call the work or a method of it; what it does not raise as an error of ours becomes a ShardError."""
    try:
        return work(*arguments, method=method)
    except DistspecError:
        raise
    except Exception as error:
        raise ShardError(f"a worker failed: {type(error).__name__}: {error}") from error


class Prepared:
    """Work that is made with its first item, and done in one thread: here or in a worker must not show."""

    def __init__(self, factory: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        self._factory, self._arguments = factory, arguments
        self._work: Work | None = None

    def __call__(self, *arguments: Any, method: str = "") -> Any:
        if self._work is None:
            with one_thread():
                self._work = self._factory(*self._arguments)
        # Again, since making it may have loaded libraries with pools of their own.
        with one_thread():
            return getattr(self._work, method)(*arguments) if method else self._work(*arguments)


class ActorWorker:
    """Applies one job's work after another's to items; failures travel back as values, so that none is retried."""

    def __init__(self) -> None:
        # One core each: otherwise every worker of a machine takes all of it.
        limit_threads(1)
        self._job = b""
        self._work: Prepared | None = None
        self._before: dict[str, str | None] = {}

    def rest(self) -> None:
        self._job, self._work = b"", None
        _set_variables(self._before)
        self._before = {}
        gc.collect()

    def apply(self, job: bytes, call: bytes) -> bytes:
        """Call a job's work, or a method of it, all packed; give the result packed.

        The work is kept as long as the same job comes again.
        """
        try:
            if self._work is None or job != self._job:
                self.rest()
                variables, inner = cloudpickle.loads(job)
                self._before = {name: os.environ.get(name) for name in variables}
                _set_variables(variables)
                # Only now: what is in it may open a store, by these variables.
                self._job, self._work = job, Prepared(*cloudpickle.loads(inner))
            method, rest = cloudpickle.loads(call)
            result = apply_work(self._work, *rest, method=method)
        except DistspecError as error:
            result = error
        packed: bytes = cloudpickle.dumps(result)
        return packed


def _set_variables(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def unpack(packed: bytes) -> Any:
    """Give what a worker sent back; raise it where it is an error."""
    result = cloudpickle.loads(packed)
    if isinstance(result, Exception):
        raise result
    return result
