"""Walk the list of stages: all of a run, or one of them on what is there already; or only look how far they are.

Knows what a stage is, and no stage. Here, too: one run at a time in an output, and SIGTERM as an interrupt.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from distspec.addresses import address_of, in_bucket
from distspec.config import Experiment, dump
from distspec.errors import ConfigError
from distspec.files import write_file
from distspec.results.layout import output_of, store_path
from distspec.runtime.cluster import connect, refuse_at_once
from distspec.runtime.lease import held
from distspec.runtime.pool import kept_workers
from distspec.runtime.tracking import tracking_uri
from distspec.runtime.workers import map_items
from distspec.stages.ingest.check import audit
from distspec.stages.order import STAGES
from distspec.stages.stage import Job, Products, Stage, State
from distspec.store import Layer, SpectraStore

__all__ = ["Planned", "Products", "check", "given_up", "plan", "run", "told"]


def run(experiment: Experiment, only: str | None = None, say: Callable[[str], None] = lambda line: None) -> Products:
    """Run all stages, or one of them on the products of the earlier ones.

    Whatever is finished is not done again.

    Arguments:
        experiment: the settings.
        only: the name of one stage, or None for all that are in a run.
        say: is told, in one line, which stages were done already.

    Raises:
        DistspecError: the input, the settings or the output are refused.
    """
    refuse_at_once(experiment.runtime, experiment.train.fewest if only in (None, "train") else 0)
    tracking_uri(experiment)
    with _locked(experiment), _terminated_as_interrupt(), kept_workers():
        job = Job(experiment, stages=STAGES)
        stages = STAGES if only is None else _needed(only)
        done: list[str] = []
        for stage in stages:
            asked = stage.name == only if only is not None else stage.in_run and not stage.off(experiment)
            if asked and only is None:
                state = stage.state(job)
                if state.finished and not state.again:
                    done.append(stage.name)
                elif done:
                    say(f"already done: {', '.join(done)}")
                    done = []
            if asked or stage.in_run:
                job = replace(job, have=stage.make(job) if asked else stage.find(job))
        # Only now: settings that were refused must not stand beside the results of others.
        write_file(output_of(experiment) / "experiment.toml", dump(experiment))
        return job.have


def _needed(only: str) -> tuple[Stage, ...]:
    """Give a stage and all whose products it opens, and they open, in the order of the list."""
    known = {stage.name: stage for stage in STAGES}
    if only not in known:
        raise ConfigError(f"no stage {only!r}; there are {', '.join(known)}")
    wanted, open_ones = {only}, [only]
    while open_ones:
        more = set(known[open_ones.pop()].uses) - wanted
        wanted |= more
        open_ones += more
    return tuple(stage for stage in STAGES if stage.name in wanted)


class Planned(NamedTuple):
    """What is to be said of a stage before a run."""

    stage: str
    state: State | None
    """None where it hangs on a stage that is not done, or is left out."""
    after: str
    """That stage."""
    off: str
    """Why it is left out."""
    in_run: bool


def plan(experiment: Experiment) -> Iterator[Planned]:
    """Say how far every stage is. Takes no lock, starts no Ray, writes nothing.

    Behind a stage that is not done nothing can be said, since the names of what follows depend on what it makes.

    Raises:
        DistspecError: the input or the settings are refused, or what there is is damaged.
    """
    job = Job(experiment, stages=STAGES)
    pending: list[str] = []
    for stage in STAGES:
        off, after = stage.off(experiment), next((name for name in pending if name in stage.uses), "")
        state = None if off or after else stage.state(job)
        yield Planned(stage.name, state, after, off, stage.in_run)
        if after or not (off or state is None or state.finished):
            pending.append(stage.name)
        else:
            job = replace(job, have=stage.find(job))


def told(made: Products) -> Iterator[tuple[str, str]]:
    """Name all that there is, for the terminal: label and text."""
    for stage in STAGES:
        yield from stage.told(made)


def given_up(made: Products) -> dict[str, dict[int, str]]:
    """Give the rows that ended their workers again and again, by what was not done with them, each with why."""
    layers: dict[str, list[Layer | None]] = {
        "spectra that were not read": [None if made.store is None else made.store.base],
        "usable spectra without scores": [made.scores, *made.detected.values()],
        "usable spectra without explanations": [*made.explanations.values(), made.lines, made.ascents],
    }
    lost = {
        what: {row: why for layer in some if layer is not None for row, why in layer.given_up().items()}
        for what, some in layers.items()
    }
    planted = {} if made.evaluation is None else made.evaluation.content.get("given_up", {})
    lost["hosts of planted anomalies left out"] = {int(row): why for row, why in planted.items()}
    return {what: rows for what, rows in lost.items() if rows}


def check(experiment: Experiment, *, mend: bool = False) -> list[str]:
    """Verify the store of an experiment: `distspec ingest --check`.

    Arguments:
        experiment: the settings.
        mend: take damaged shards out of the store, so that the next run of their stages writes them again.

    Returns:
        One line for each problem.

    Raises:
        StoreNotFoundError: there is no store.
    """
    with _locked(experiment), _terminated_as_interrupt():
        store = SpectraStore.open(store_path(experiment), write=mend)
        connect(experiment.runtime)
        return audit(store, partial(map_items, settings=experiment.runtime, label="check"), mend=mend)


@contextmanager
def _locked(experiment: Experiment) -> Iterator[None]:
    """Make the output and keep a second run off it, and off a store that lies elsewhere.

    Raises:
        ConfigError: the output cannot be written or another run uses it.
    """
    output, store = output_of(experiment), experiment.ingest.store
    locks = {f"the output {output}": output / ".lock"}
    # A store that lies elsewhere may be that of several outputs.
    if store and ("://" not in store or in_bucket(store)):
        locks[f"the store {store}"] = address_of(f"{store}.lock")
    with ExitStack() as stack:
        for what, path in locks.items():
            stack.enter_context(_file_lock(path, what) if isinstance(path, Path) else held(path, what))
        yield


@contextmanager
def _file_lock(path: Path, what: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path, timeout=0))
        except Timeout:
            raise ConfigError(f"another run is at work in {what}; wait for it or choose another") from None
        except OSError as error:
            raise ConfigError(f"cannot write to {what}: {error.strerror}; choose another") from error
        yield


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM (a batch system's warning) into KeyboardInterrupt, so that one path ends a run in order."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(signum)

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
