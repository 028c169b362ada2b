"""Ray: joined or started, and what it has.

Ray that we start ourselves serves this machine alone. It listens on all interfaces, as Ray does, and whoever calls must
know the token that it writes into the user's home.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray

from distspec.config import Runtime
from distspec.errors import ConfigError
from distspec.runtime.pool import forget, release

__all__ = ["connect", "dask_scheduler", "refuse_at_once", "require_resources", "room_for", "workers_of"]

SLOTS_A_CORE: Final = 4
"""Workers that a core of this machine may be shared by, for whoever asks for more workers than cores."""

_ours = False
"""Whether this process started the Ray that it uses, so that no node will join it."""


def connect(settings: Runtime) -> None:
    """Join a Ray cluster, or start Ray on this machine, unless this process already has one.

    Ray ends with the process: starting it costs seconds, so that all stages of a run share one.

    Raises:
        ConfigError: no cluster answers at the address, or Ray does not start here.
    """
    global _ours
    if ray.is_initialized():
        return
    address = _address(settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its C++ part writes warnings for developers onto the user's terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # Raised niceness would starve the workers beside any other program of the user.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"address": "local", "num_cpus": _slots(settings), "include_dashboard": False}
    else:
        options |= {"address": address}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _silent_stderr():
            ray.init(**options)
    except Exception as error:  # on a busy machine Ray raises a bare one
        said = next(iter(str(error).splitlines()), type(error).__name__)
        if address is None:
            raise ConfigError(f"Ray does not start on this machine ({said}); run the same command again") from error
        raise ConfigError(f"no Ray cluster at {address}: {said}") from error
    _ours = "num_cpus" in options
    forget()
    # Ray puts its own handler in the place of ours and ends the process in disorder.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)


def refuse_at_once(settings: Runtime, training_workers: int = 0) -> None:
    """Refuse workers for which this machine has no room, before anything is begun.

    A cluster is asked once it is joined.

    Raises:
        ConfigError: there are too many.
    """
    if ray.is_initialized() or _address(settings) is not None:
        return
    for setting, workers in (("runtime.workers", settings.workers), ("train.workers", training_workers)):
        if workers > _slots(settings):
            raise ConfigError(
                f"{setting} = {workers}; this machine has {os.cpu_count()} cores, enough for {_slots(settings)}: ask "
                "for fewer, or join a cluster by runtime.address"
            )


def _address(settings: Runtime) -> str | None:
    """Give the cluster to join; None to start Ray here."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def _slots(settings: Runtime) -> int:
    """Give the number of workers that Ray on this machine is told to have room for."""
    cores = os.cpu_count() or 1
    return max(cores, min(settings.workers, SLOTS_A_CORE * cores))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the notes of Ray's C++ part off the terminal while it starts; failures come as exceptions all the same."""
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def dask_scheduler() -> Any:
    """Give the scheduler for dask graphs: Ray's on a cluster, and on one machine None for threads of this process."""
    if len(ray.nodes()) < 2:
        return None
    from ray.util.dask import ray_dask_get

    release()
    return ray_dask_get


def room_for(gpus: float = 0.0) -> int:
    """Give the number of workers that the cluster has room for: one on each core or, with GPUs, as these allow."""
    has = ray.cluster_resources()
    room = int(has.get("CPU", 0))
    return min(room, int(has.get("GPU", 0) / gpus)) if gpus else room


def workers_of(settings: Runtime, items: int, gpus: float = 0.0) -> int:
    """Give the number of workers for so many items: as set, else as many as the cluster has room for.

    Arguments:
        settings: the number that is asked for.
        items: what there is to do; more workers than that are of no use.
        gpus: that each worker takes.

    Raises:
        ConfigError: this machine has not that many slots, or no GPU; a cluster may grow.
    """
    workers = max(1, min(settings.workers or room_for(gpus), items))
    if _ours:
        _require("runtime.workers", workers, gpus * workers)
    return workers


def require_resources(setting: str, cpus: float, gpus: float) -> None:
    """Refuse what the cluster can never give, since Ray itself would wait for it without a word; make room for it.

    Raises:
        ConfigError: there are fewer processors or GPUs in the whole cluster.
    """
    _require(setting, cpus, gpus)
    release()


def _require(setting: str, cpus: float, gpus: float) -> None:
    has = ray.cluster_resources()
    if cpus > has.get("CPU", 0) or gpus > has.get("GPU", 0):
        raise ConfigError(
            f"{setting} asks for {cpus:g} CPUs and {gpus:g} GPUs; the Ray cluster has {has.get('CPU', 0):g} and "
            f"{has.get('GPU', 0):g}; ask for fewer workers or GPUs"
        )
