"""Ray: joined or started, and what it has.

Ray that we start ourselves serves this machine alone. It listens on all interfaces, as Ray does, and whoever calls must
know the token that it writes into the user's home.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray

import distspec
from distspec.addresses import SETTINGS
from distspec.config import Needs, Runtime, Span
from distspec.errors import ConfigError
from distspec.runtime.pool import forget, release

__all__ = [
    "cluster_has",
    "connect",
    "dask_scheduler",
    "environment",
    "refuse_at_once",
    "require_resources",
    "room_for",
    "workers_of",
]

SLOTS_A_CORE: Final = 4
"""Workers that a core of this machine may be shared by, for whoever asks for more workers than cores."""

ANSWER: Final = 10.0
"""Seconds in which a cluster has to answer."""

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
        _require_answer(address)
        if settings.ship:
            options |= {"runtime_env": {"py_modules": [str(Path(distspec.__file__).parent)]}}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        _start(options)
    except Exception as error:  # on a busy machine Ray raises a bare one
        said = next(iter(str(error).splitlines()), type(error).__name__)
        if address is None:
            raise ConfigError(f"Ray does not start on this machine ({said}); run the same command again") from error
        raise ConfigError(f"no Ray cluster at {address}: {said}") from error
    _ours = address is None
    forget()
    # Ray puts its own handler in the place of ours and ends the process in disorder.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)


def _start(options: dict[str, Any]) -> None:
    with _silent_stderr():
        try:
            ray.init(**options)
        except Exception:
            # On a busy machine the first start may take longer than Ray waits for its parts.
            if options["address"] != "local":
                raise
            ray.shutdown()
            ray.init(**options)


def _require_answer(address: str) -> None:
    """Refuse an address at which nothing listens: Ray itself would try for minutes, without a word."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return  # such as "auto", which Ray looks up on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"no Ray cluster at {address}: {said}; see to runtime.address, or RAY_ADDRESS") from error


def environment(settings: Runtime) -> dict[str, str]:
    """Give the variables that workers get from this process.

    Those that are named; and to workers of the Ray that was started here, perhaps before these were set, all that tell
    how to reach object stores.

    Raises:
        ConfigError: one that is named is not set.
    """
    missing = [name for name in settings.env_vars if name not in os.environ]
    if missing:
        raise ConfigError(f"runtime.env_vars names {', '.join(missing)}, which is not set here")
    names = set(settings.env_vars)
    if _ours:
        names |= {name for name in os.environ if name.startswith(SETTINGS)}
    return {name: os.environ[name] for name in sorted(names)}


def refuse_at_once(settings: Runtime, training_workers: int = 0) -> None:
    """Refuse workers for which this machine has no room, before anything is begun.

    A cluster is asked once it is joined.

    Raises:
        ConfigError: there are too many, or a variable for workers is not set.
    """
    environment(settings)
    if ray.is_initialized() or _address(settings) is not None:
        return
    for setting, workers in (("runtime.workers", settings.fewest), ("train.workers", training_workers)):
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
    return max(cores, min(settings.most, SLOTS_A_CORE * cores))


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


def room_for(needs: Needs) -> int:
    """Give the number of workers that the cluster has room for, by whatever it has least of."""
    has = ray.cluster_resources()
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory_gb * 1e9}
    return min(int(has.get(name, 0) / each) for name, each in wanted.items() if each)


def workers_of(settings: Runtime, items: int, needs: Needs = Needs()) -> int:
    """Give the number of workers for so many items: as set, else as many as the cluster has room for.

    Arguments:
        settings: the number or range that is asked for.
        items: what there is to do; more workers than that are of no use.
        needs: what each worker takes.

    Raises:
        ConfigError: this machine has not that many slots, or no GPU; a cluster may grow.
    """
    room = room_for(needs)
    workers = room if not settings.most else settings.most
    if isinstance(settings.workers, Span):
        workers = min(max(room, settings.fewest), workers)
    workers = max(1, min(workers, items))
    if _ours:
        _require("runtime.workers", needs.times(workers))
    return workers


def require_resources(setting: str, needs: Needs, *, may_grow: bool = False) -> None:
    """Refuse what the cluster can never give, since Ray itself would wait for it without a word; make room for it.

    Arguments:
        setting: that asks for it.
        needs: what is asked for.
        may_grow: refuse it on this machine alone, where no node will join; who asks waits for it, and says so.

    Raises:
        ConfigError: there are fewer processors or GPUs, or less memory, in the whole cluster.
    """
    if _ours or not may_grow:
        _require(setting, needs)
    release()


def _require(setting: str, needs: Needs) -> None:
    has = cluster_has()
    if needs.cpus > has.cpus or needs.gpus > has.gpus or needs.memory_gb > has.memory_gb:
        raise ConfigError(f"{setting} asks for {needs}; the Ray cluster has {has}; ask for fewer workers, or less")


def cluster_has(*, free: bool = False) -> Needs:
    """Give what the whole cluster has, or what of it is free at the moment."""
    has = ray.available_resources() if free else ray.cluster_resources()
    return Needs(has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0) / 1e9)
