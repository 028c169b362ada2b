"""Attempts at a training: one ends with a worker that is lost, and the next goes on from the last epoch's state.

Ray Train, left to start workers anew, waits without a word for what the cluster does not have any more. So each attempt
is a run of its own, with as many workers as there is room for at the moment.
"""

import sys
import tempfile
import time
from typing import Final

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError

from distspec.addresses import Place
from distspec.config import Needs, Runtime, Train
from distspec.errors import DistspecError, ShardError
from distspec.models.training.loop import newest_epochs
from distspec.runtime.cluster import cluster_has, require_resources
from distspec.stages.train.workers import TrainingJob, phases_of, train_loop, train_loop_of_worker

__all__ = ["train_in_attempts"]

TRIES: Final = 3
"""Attempts in a row that may fail without an epoch more."""

GRACE: Final = 5.0
"""Seconds in which workers of an attempt that has ended may still hold what they took."""

WORD: Final = 10.0
"""Seconds of waiting after which a line says what for."""

WORDS: Final = 600.0
"""Longest time until it is said again; each time takes twice as long as the one before."""


def train_in_attempts(job: TrainingJob, runtime: Runtime, state: Place) -> None:
    """Train to the end, whatever becomes of workers and nodes meanwhile.

    Arguments:
        job: what is trained.
        runtime: what each worker takes.
        state: folder of the states.

    Raises:
        ConfigError: this machine has no room for so many workers.
        DistspecError: what a worker raised itself.
        ShardError: one attempt after the other fails without an epoch more.
    """
    settings, each = job.settings, runtime.needs("train")
    each = Needs(each.cpus, float(settings.gpu), each.memory_gb)
    if settings.workers:
        require_resources("train.workers", each.times(settings.fewest), may_grow=True)
    failures, done = 0, _done(state, settings)
    while True:
        workers = _room(settings, each) if settings.workers else 0
        nodes = _living()
        try:
            _attempt(job, workers, each, state)
            return
        except (ray.train.TrainingFailedError, RayError) as error:
            cause = _cause(error)
        except DistspecError:
            raise
        except Exception as error:
            # Without workers the loop runs here, and what it raises comes as it is.
            raise ShardError(f"training failed: {_line(error)}") from error
        if not isinstance(cause, ShardError):
            raise cause
        before, done = done, _done(state, settings)
        # The loss of a node is no fault of the training's.
        failures = 0 if done > before else failures + (nodes <= _living())
        if failures >= TRIES:
            raise ShardError(f"{cause}; {TRIES} attempts brought no epoch more, given up")


def _attempt(job: TrainingJob, workers: int, each: Needs, state: Place) -> None:
    # What Ray keeps of a run is of no use to us. Its workers write nothing there, so it need not be shared.
    with tempfile.TemporaryDirectory(prefix="distspec-ray-") as scratch:
        _trainer(job, workers, each, state.name, scratch).fit()


def _trainer(job: TrainingJob, workers: int, each: Needs, name: str, scratch: str) -> ray.train.torch.TorchTrainer:
    takes = {"CPU": each.cpus, "GPU": each.gpus, "memory": each.memory_gb * 1e9}
    return ray.train.torch.TorchTrainer(
        train_loop_of_worker if workers else train_loop,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=job.settings.gpu,
            resources_per_worker={name: amount for name, amount in takes.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=scratch,
            # It would try again in silence.
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )


def _room(settings: Train, each: Needs) -> int:
    """Give the number of workers that there is room for, within what is asked for; wait for the fewest."""
    begun, patience = time.monotonic(), WORD
    while True:
        wanted = max(settings.fewest, min(settings.most, _times(cluster_has(), each)))
        free = _times(cluster_has(free=True), each)
        waited = time.monotonic() - begun
        if free >= wanted:
            return wanted
        if free >= settings.fewest and waited > GRACE:
            return free
        if waited > patience:
            patience = waited + min(waited, WORDS)
            print(
                f"distspec: training waits for {settings.fewest} worker{'s' if settings.fewest > 1 else ''}, each of "
                f"which takes {each}; the cluster has {cluster_has()}, free are {cluster_has(free=True)}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.2)


def _times(has: Needs, each: Needs) -> int:
    """Count how often one fits into what there is."""
    pairs = (has.cpus, each.cpus), (has.gpus, each.gpus), (has.memory_gb, each.memory_gb)
    return min(int(there / one) for there, one in pairs if one)


def _living() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _done(state: Place, settings: Train) -> int:
    """Count the epochs of all fits."""
    return sum(len(newest_epochs(state / phase)) for phase in phases_of(settings))


def _cause(error: Exception) -> DistspecError:
    """Find our own error among the failures of the workers."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        inner = getattr(failure, "cause", failure)
        if isinstance(inner, DistspecError):
            return inner
    return ShardError(f"training failed: {str(failures[0] if failures else error).strip().splitlines()[-1]}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
