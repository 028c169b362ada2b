"""Workers as processes: started, asked, ended, and kept for the next stage.

A worker's start takes seconds, nearly all of it imports, and the stages of a run need much the same libraries. So
within `kept_workers` those that a stage has used wait for the next one. Whoever else needs the processors calls
`release`.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import ray

from distspec import __version__
from distspec.config import Needs
from distspec.errors import ConfigError
from distspec.runtime.actors import ActorWorker

__all__ = ["Introduction", "Worker", "forget", "give_back", "kept_workers", "release", "take", "versions"]


class _Actor(ActorWorker):
    """Knows Ray, beside its work."""

    def introduce(self) -> "Introduction":
        """Tell where it is, and what it would work with."""
        return Introduction(ray.get_runtime_context().get_node_id(), platform.node(), versions())


class Introduction(NamedTuple):
    """What a worker tells of itself before it works."""

    node: str
    """Id of its node."""
    host: str
    """Name of the machine."""
    versions: dict[str, str]
    """As of `versions`."""

    def require_same(self) -> None:
        """Refuse a worker that would compute with something else than this process.

        Raises:
            ConfigError: a version differs.
        """
        own = versions()
        odd = [f"{name} {self.versions[name]} (here {own[name]})" for name in own if self.versions[name] != own[name]]
        if odd:
            raise ConfigError(f"node {self.host} has {', '.join(odd)}; install the same there as here")


@cache
def versions() -> dict[str, str]:
    """Give the versions of what results depend on: Python and the libraries, as public (2.13.0+cpu is 2.13.0)."""
    found = {name: metadata.version(name).split("+")[0] for name in ("numpy", "torch", "zarr")}
    return {"Python": platform.python_version(), "distspec": __version__} | found


class Worker:
    """One process of Ray's, on whatever node has room for it.

    It is never started again, and nothing that it was asked is asked again, but by us: Ray would wait for a node that
    is lost, and would try for ever what kills its worker.

    Arguments:
        needs: what it takes of its node.
    """

    def __init__(self, needs: Needs = Needs()) -> None:
        self.needs, self.node, self.host = needs, "", ""
        memory = int(needs.memory_gb * 1e9) or None
        actor = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, memory=memory, max_restarts=0, max_task_retries=0)(
            _Actor
        )
        self._actor = actor.remote()

    def ready(self) -> Any:
        """Ask it to say that it is there: a reference to its introduction."""
        return self._actor.introduce.remote()

    def ask(self, job: Any, call: bytes) -> Any:
        """Ask it to call a job's work: a reference to the packed result.

        Arguments:
            job: reference to the packed job.
            call: method and arguments, packed.
        """
        return self._actor.apply.remote(job, call)

    def rest(self) -> None:
        """Let it forget its work, and the memory that this takes."""
        self._actor.rest.remote()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        ray.kill(self._actor)


_waiting: list[Worker] = []
"""Workers without work."""

_kept = 0
"""How many times `kept_workers` is entered."""


@contextmanager
def kept_workers() -> Iterator[None]:
    """Keep workers from one stage for the next."""
    global _kept
    _kept += 1
    try:
        yield
    finally:
        _kept -= 1
        if not _kept:
            release()


def take(needs: Needs) -> Worker:
    """Give a worker, one that waits if there is one; it may have died meanwhile, as any worker may."""
    for worker in _waiting:
        if worker.needs == needs:
            _waiting.remove(worker)
            return worker
    # Those of another kind would stand in the way of the one that is asked for.
    release()
    return Worker(needs)


def give_back(worker: Worker) -> None:
    """Let a worker wait for the next stage, or end it."""
    if _kept:
        worker.rest()
        _waiting.append(worker)
    else:
        worker.end()


def forget() -> None:
    """Know of no workers: those of an earlier Ray are gone with it."""
    _waiting.clear()


def release() -> None:
    """End all workers without work."""
    while _waiting:
        worker = _waiting.pop()
        # Those of a Ray that has ended are gone with it.
        if ray.is_initialized():
            worker.end()
