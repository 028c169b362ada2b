"""Workers as processes: started, asked, ended, and kept for the next stage.

A worker's start takes seconds, nearly all of it imports, and the stages of a run need much the same libraries. So
within `kept_workers` those that a stage has used wait for the next one. Whoever else needs the processors calls
`release`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from distspec.runtime.actors import ActorWorker

__all__ = ["Worker", "forget", "give_back", "kept_workers", "release", "take"]


class _Actor(ActorWorker):
    """Knows Ray, beside its work."""

    def node(self) -> str:
        """Give the id of the node that it is on."""
        return str(ray.get_runtime_context().get_node_id())


class Worker:
    """One process of Ray's, on whatever node has room for it.

    It is never started again, and nothing that it was asked is asked again, but by us: Ray would wait for a node that
    is lost, and would try for ever what kills its worker.

    Arguments:
        gpus: GPUs that it takes, beside one CPU.
    """

    def __init__(self, gpus: float = 0.0) -> None:
        self.gpus, self.node = gpus, ""
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Actor)
        self._actor = actor.remote()

    def ready(self) -> Any:
        """Ask it to say that it is there: a reference to the id of its node."""
        return self._actor.node.remote()

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


def take(gpus: float) -> Worker:
    """Give a worker, one that waits if there is one; it may have died meanwhile, as any worker may."""
    for worker in _waiting:
        if worker.gpus == gpus:
            _waiting.remove(worker)
            return worker
    # Those of another kind would stand in the way of the one that is asked for.
    release()
    return Worker(gpus)


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
