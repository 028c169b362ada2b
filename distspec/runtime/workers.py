"""Work spread over items in workers, whatever becomes of a worker or of its node.

Work is an importable class with small arguments, applied to small items; workers read and write the store themselves
and return summaries. An item may be done twice (its worker died when all but the answer was done), so work must be
idempotent; writing whole shards is.

An item goes to one live worker at a time. A worker that is lost, with its node or alone, is replaced as soon as the
cluster has room, and its item goes to another. What ends `TRIES` workers in a row, or takes longer than
`runtime.item_seconds` as often, is given up: where it consists of rows (`cut`), it is cut in halves until those are
found that do it, and is done without them.
"""

import platform
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import cloudpickle
import ray
from ray.exceptions import RayError, RayTaskError

from distspec.config import Needs, Runtime, anchored
from distspec.errors import DistspecError, DistspecWarning, ShardError
from distspec.runtime.actors import Prepared, Work, apply_work, unpack
from distspec.runtime.cluster import cluster_has, connect, environment, workers_of
from distspec.runtime.pool import Worker, give_back, take
from distspec.runtime.progress import progress

__all__ = ["TRIES", "Cut", "map_items"]

TRIES: Final = 3
"""Workers that an item may end before it is given up."""

LOST_MOST: Final = 16
"""Rows of one item that may end their workers before it is taken for a fault of the program."""

TICK: Final = 1.0
"""Seconds between two looks at time limits and at the size of the cluster."""

WORD: Final = 10.0
"""Seconds with fewer workers than are wanted after which a line says what is waited for."""

WORDS: Final = 600.0
"""Longest time until it is said again; each time takes twice as long as the one before."""

PART_SECONDS: Final = 30.0
"""Least time for a part of an item, in which its worker may have to make the work first."""

_LATE: Final = "took longer than"

Rows = tuple[int, int]
"""First and one-past-last."""


def _itself(item: Any, index: int) -> int:
    return index


class Cut(NamedTuple):
    """How an item is cut into rows, of work that can be.

    Such work has the methods `attempt(item, start, stop)`, which does these rows and leaves nothing behind, and
    `without(item, indices, why)`, which does the item without some rows and gives what a call gives.
    """

    bounds: Callable[[Any], Rows]
    """Tells which rows an item consists of, by indices one after the other."""
    row: Callable[[Any, int], int] = _itself
    """Tells the row of the store, by item and index."""


def map_items(
    factory: Callable[..., Work],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    settings: Runtime,
    label: str = "",
    *,
    needs: Needs = Needs(),
    cut: Cut | None = None,
    here: bool | None = None,
) -> Iterator[Any]:
    """Apply work to items, usually one a shard, in workers.

    Arguments:
        factory: importable class whose instances are called with an item, in a worker.
        arguments: of the factory; small, since every worker gets a copy. Relative paths in them, and in settings
            among them, mean this process's folder (`anchored`).
        items: small and picklable.
        settings: number of workers, time limit of an item, variables of the environment.
        label: what the progress bar says.
        needs: what each worker takes of the cluster.
        cut: how an item is cut into rows, of work that can be.
        here: do it in this process: for work that takes less than the start of a worker. None does so with a single
            item that cannot be cut and takes no GPU; False never does, for what would take too much of the driver.

    Yields:
        The results, in the order in which they come.

    Raises:
        DistspecError: what the work raised itself.
        ShardError: the work failed in another way, or an item ended its workers; the message names it.
    """
    if not items:
        return
    # Here, too: where work is done must not show in what it says of a file.
    arguments = anchored(arguments)
    if here or (here is None and len(items) == 1 and not needs.gpus and cut is None):
        work = Prepared(factory, arguments)
        yield from progress((apply_work(work, item) for item in items), len(items), label)
        return
    connect(settings)
    job = environment(settings), cloudpickle.dumps((factory, arguments))
    spread = _Spread(cloudpickle.dumps(job), items, settings, label, needs, cut)
    try:
        yield from progress(spread.results(), len(items), label)
    finally:
        spread.close()


@dataclass
class _Task:
    """What one worker is asked to do: an item, or a part of it.

    Arguments:
        item: as it was given.
        method: of the work; empty for a call.
        rest: further arguments of the method.
        tries: how many workers it has ended.
        seconds: that it may take.
        search: the search that it belongs to, for a part.
    """

    item: Any
    seconds: float
    method: str = ""
    rest: tuple[Any, ...] = ()
    tries: int = 0
    search: "_Search | None" = None

    def packed(self) -> bytes:
        packed: bytes = cloudpickle.dumps((self.method, (self.item, *self.rest)))
        return packed


@dataclass
class _Search:
    """The search for the rows of an item that end their workers."""

    item: Any
    rows: Rows
    why: str
    open: int = 0
    lost: list[int] = field(default_factory=list)


class _Spread:
    """One job: what waits, what is being done by whom, and who is on the way."""

    def __init__(
        self,
        job: bytes,
        items: Sequence[Any],
        settings: Runtime,
        label: str,
        needs: Needs,
        cut: Cut | None,
    ) -> None:
        self._settings, self._label, self._needs, self._cut = settings, label, needs, cut
        self._job, self._count = ray.put(job), len(items)
        self._limit, self._counted = workers_of(settings, len(items), needs), time.monotonic()
        self._queue = deque(_Task(item, settings.item_seconds) for item in items)
        self._starting: dict[Any, Worker] = {}
        self._busy: dict[Any, tuple[Worker, _Task, float]] = {}
        self._idle: list[Worker] = []
        self._failed_starts = 0

    def results(self) -> Iterator[Any]:
        fewest, silent, patience = min(self._settings.fewest, self._count), time.monotonic(), WORD
        while self._queue or self._busy:
            self._start_workers()
            while self._idle and self._queue:
                self._ask(self._idle.pop(), self._queue.popleft())
            ready, _ = ray.wait([*self._busy, *self._starting], num_returns=1, timeout=TICK)
            for reference in ready:
                if reference in self._starting:
                    self._greet(reference)
                else:
                    yield from self._receive(reference)
            self._end_late_ones()
            if len(self._idle) + len(self._busy) >= min(fewest, len(self._queue) + len(self._busy)):
                silent, patience = time.monotonic(), WORD
            elif time.monotonic() - silent > patience:
                self._say_what_is_missing(fewest)
                silent, patience = time.monotonic(), min(2 * patience, WORDS)

    def close(self) -> None:
        """Keep those that are free for the next job; end those that are in the middle of something or on their way."""
        for worker in (*self._starting.values(), *(worker for worker, _, _ in self._busy.values())):
            worker.end()
        for worker in self._idle:
            give_back(worker)
        self._starting, self._busy, self._idle = {}, {}, []

    def _start_workers(self) -> None:
        if time.monotonic() - self._counted > TICK:
            # The cluster may have grown or shrunk.
            self._limit, self._counted = workers_of(self._settings, self._count, self._needs), time.monotonic()
        working = len(self._busy) + len(self._idle) + len(self._starting)
        for _ in range(min(self._limit, len(self._queue) + len(self._busy)) - working):
            worker = take(self._needs)
            self._starting[worker.ready()] = worker

    def _greet(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            known = ray.get(reference)
        except RayError as error:
            # It was lost while it waited or started. That may happen, but not to one after the other.
            self._failed_starts += 1
            if self._failed_starts > TRIES * self._limit:
                raise ShardError(f"workers do not start: {_line(error)}") from error
            return
        known.require_same()
        worker.node, worker.host = known.node, known.host
        self._failed_starts = 0
        self._idle.append(worker)

    def _ask(self, worker: Worker, task: _Task) -> None:
        self._busy[worker.ask(self._job, task.packed())] = worker, task, time.monotonic()

    def _receive(self, reference: Any) -> Iterator[Any]:
        worker, task, _ = self._busy.pop(reference)
        try:
            packed = ray.get(reference)
        except RayTaskError as error:
            # It did not die: what surrounds the work went wrong, and would again.
            worker.end()
            raise ShardError(f"a worker failed: {_line(error.cause or error)}") from error
        except RayError as error:
            worker.end()
            if worker.node in _dead_nodes():
                self._queue.appendleft(task)  # no fault of the item's
            else:
                self._lose(task, f"ended its worker ({_line(error)})")
            return
        self._idle.append(worker)
        try:
            result = unpack(packed)
        except DistspecError as error:
            if worker.host != platform.node():
                error.args = (f"{error} (on node {worker.host})",)
            raise
        if task.search is None or task.method == "without":
            yield result
        else:
            self._close_part(task.search)

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        for reference, (worker, task, since) in list(self._busy.items()):
            # One that is done only waits for its turn.
            if now - since > task.seconds and not ray.wait([reference], timeout=0)[0]:
                worker.end()
                del self._busy[reference]
                self._lose(task, f"{_LATE} {task.seconds:g} s (runtime.item_seconds)")

    def _lose(self, task: _Task, why: str) -> None:
        """Decide what becomes of a task that has cost a worker."""
        task.tries += 1
        if task.search is not None and task.method == "attempt":
            start, stop = task.rest
            if stop - start == 1 and task.tries < TRIES:
                # Something else may have ended the worker.
                self._queue.appendleft(task)
            else:
                self._halve(task, task.search)
        elif task.tries < TRIES:
            self._queue.appendleft(task)
        elif self._cut is None or task.search is not None:
            raise ShardError(f"{self._name(task)} {why}, {TRIES} times; given up")
        else:
            search = _Search(task.item, self._cut.bounds(task.item), why)
            self._try_rows(search, *search.rows)

    def _halve(self, task: _Task, search: _Search) -> None:
        start, stop = task.rest
        if stop - start > 1:
            middle = (start + stop) // 2
            self._try_rows(search, start, middle)
            self._try_rows(search, middle, stop)
        else:
            search.lost.append(start)
            if len(search.lost) > LOST_MOST:
                raise ShardError(f"{self._name(task)} {search.why}; more than {LOST_MOST} rows do, each alone")
        self._close_part(search)

    def _try_rows(self, search: _Search, start: int, stop: int) -> None:
        first, last = search.rows
        seconds = self._settings.item_seconds
        share = (stop - start) / (last - first)
        seconds = max(min(seconds, PART_SECONDS), seconds * share)
        search.open += 1
        self._queue.appendleft(_Task(search.item, seconds, "attempt", (start, stop), search=search))

    def _close_part(self, search: _Search) -> None:
        """Once all parts are tried, do the item without the rows that were found."""
        search.open -= 1
        if not search.open:
            lost = tuple(sorted(search.lost))
            if not lost and search.why.startswith(_LATE):
                first, last = self._ends(search.item)
                raise ShardError(
                    f"{self._label}: rows {first} to {last} take longer than runtime.item_seconds = "
                    f"{self._settings.item_seconds:g} together, though none does alone; raise it"
                )
            if lost:
                rows = ", ".join(str(self._row(search.item, index)) for index in lost)
                warnings.warn(f"{self._label} goes on without row {rows}, which {search.why}", DistspecWarning, 2)
            seconds = self._settings.item_seconds
            self._queue.appendleft(_Task(search.item, seconds, "without", (lost, search.why), search=search))

    def _name(self, task: _Task) -> str:
        if self._cut is None:
            return f"{self._label or 'item'} {task.item!r}"[:200]
        first, last = self._ends(task.item)
        return f"{self._label}: one of rows {first} to {last}"

    def _row(self, item: Any, index: int) -> int:
        return self._cut.row(item, index) if self._cut is not None else index

    def _ends(self, item: Any) -> Rows:
        """Give the first and the last row of an item that can be cut."""
        start, stop = self._cut.bounds(item) if self._cut is not None else (0, 1)
        return self._row(item, start), self._row(item, stop - 1)

    def _say_what_is_missing(self, fewest: int) -> None:
        there = len(self._idle) + len(self._busy)
        does = f"goes on with {there} of {fewest} workers; one" if there else "waits for a worker, which"
        print(
            f"distspec: {self._label or 'work'} {does} takes {self._needs}; the cluster has {cluster_has()}, free are "
            f"{cluster_has(free=True)}",
            file=sys.stderr,
            flush=True,
        )


def _dead_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def _line(error: BaseException) -> str:
    """Give the name of an error and the first line of what it says."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0] if said else ''}"[:300]
