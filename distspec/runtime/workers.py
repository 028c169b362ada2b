"""Ray: join or start it, and spread work over shards. The only user of Ray besides the training stage.

Work is an importable class with small arguments, applied to small items; workers read and write the store themselves
and return summaries. An item may be done twice (a worker died and Ray tried again), so work must be idempotent; writing
whole shards is.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cloudpickle
import ray
from ray.util import ActorPool

from distspec.config import Runtime
from distspec.errors import ConfigError
from distspec.runtime.actors import ActorWorker, PoolWorker, Prepared, Work, apply_work, unpack
from distspec.runtime.progress import progress

__all__ = ["connect", "dask_scheduler", "map_actors", "map_shards", "require_resources", "workers_of"]


def connect(settings: Runtime, training_workers: int = 0) -> None:
    """Join a Ray cluster, or start Ray on this machine, unless this process already has one.

    Ray ends with the process: starting it costs seconds, so that all stages of a run share one.

    Raises:
        ConfigError: no cluster answers at the address, or Ray does not start here.
    """
    if ray.is_initialized():
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its C++ part writes warnings for developers onto the user's terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address in (None, "local"):
        # Raised niceness would starve the workers beside any other program of the user.
        os.environ.setdefault("RAY_worker_niceness", "0")
        cores = os.cpu_count() or 1
        slots = max(cores, settings.workers, training_workers)
        options |= {"address": "local", "num_cpus": slots, "include_dashboard": False}
    else:
        options |= {"address": address}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _silent_stderr():
            ray.init(**options)
    except Exception as error:  # on a busy machine Ray raises a bare one
        said = next(iter(str(error).splitlines()), type(error).__name__)
        if address in (None, "local"):
            raise ConfigError(f"Ray does not start on this machine ({said}); run the same command again") from error
        raise ConfigError(f"no Ray cluster at {address}: {said}") from error
    # Ray puts its own handler in the place of ours and ends the process in disorder.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)


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

    return ray_dask_get


def workers_of(settings: Runtime, items: int) -> int:
    """Give the number of workers for so many items: as set, else one for each core of the cluster.

    Raises:
        ConfigError: the cluster is too small for them.
    """
    cores = int(ray.cluster_resources().get("CPU", 1))
    workers = max(1, min(settings.workers or cores, items))
    require_resources("runtime.workers", workers, settings.gpus_per_worker * workers)
    return workers


def require_resources(setting: str, cpus: float, gpus: float) -> None:
    """Refuse what the cluster can never give: Ray itself would wait for it without a word.

    Raises:
        ConfigError: there are fewer processors or GPUs in the whole cluster.
    """
    there = ray.cluster_resources()
    if cpus > there.get("CPU", 0) or gpus > there.get("GPU", 0):
        raise ConfigError(
            f"{setting} asks for {cpus:g} CPUs and {gpus:g} GPUs; the Ray cluster has {there.get('CPU', 0):g} and "
            f"{there.get('GPU', 0):g}; ask for fewer workers or GPUs"
        )


def map_shards(
    factory: Callable[..., Work],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    settings: Runtime,
    label: str = "",
    *,
    here: bool = False,
) -> Iterator[Any]:
    """Apply work to items (usually one a shard) in a pool of actors fed by Ray Data.

    Arguments:
        factory: importable class whose instances are called with an item, in a worker.
        arguments: of the factory; small, since every worker gets a copy.
        items: small and picklable.
        settings: number of workers, GPUs of each.
        label: what the progress bar says.
        here: do it in this process, as a single item is anyway: for work that takes less than the start of a worker.

    Yields:
        The results, in the order in which they come.

    Raises:
        DistspecError: what the work raised itself.
        ShardError: the work failed in another way; the cause is chained.
    """
    if not items:
        return
    if here or (len(items) == 1 and not settings.gpus_per_worker):
        yield from _apply_here(factory, arguments, items, label)
        return
    # Imported here: it takes a second, and whoever only plans or works alone does without.
    import ray.data

    _quiet_ray_data()
    packed = cloudpickle.dumps((os.getcwd(), factory, arguments))
    dataset = ray.data.from_items([{"item": cloudpickle.dumps(item)} for item in items], override_num_blocks=len(items))
    results = dataset.map_batches(
        PoolWorker,
        batch_size=1,
        fn_constructor_args=(packed,),
        compute=ray.data.ActorPoolStrategy(size=workers_of(settings, len(items))),
        num_cpus=1,
        num_gpus=settings.gpus_per_worker or None,
    )
    for row in progress(results.iter_rows(), len(items), label):
        yield unpack(row["result"])


def map_actors(
    factory: Callable[..., Work],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    settings: Runtime,
    label: str = "",
) -> Iterator[Any]:
    """Apply work to items in plain Ray actors: as `map_shards`, for few items that each take long."""
    if not items:
        return
    if len(items) == 1 and not settings.gpus_per_worker:
        yield from _apply_here(factory, arguments, items, label)
        return
    packed = cloudpickle.dumps((os.getcwd(), factory, arguments))
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=1, num_gpus=settings.gpus_per_worker)(ActorWorker)
    pool = ActorPool([actor.remote(packed) for _ in range(workers_of(settings, len(items)))])
    results = pool.map_unordered(lambda worker, item: worker.apply.remote(item), [cloudpickle.dumps(i) for i in items])
    for result in progress(results, len(items), label):
        yield unpack(result)


def _apply_here(
    factory: Callable[..., Work], arguments: tuple[Any, ...], items: Sequence[Any], label: str
) -> Iterator[Any]:
    """Do items in this process: the start of a worker would take longer than most."""
    work = Prepared(factory, arguments)
    yield from progress((apply_work(work, item) for item in items), len(items), label)


def _quiet_ray_data() -> None:
    """Leave the screen to our own progress bars."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
