"""Passes over the shards of a survey whose answer is one summary, added up where the data are.

A worker adds up a run of shards and sends one summary for it, and at most `RUNS` runs come to the driver, however large
the survey is. Runs follow from the number of shards alone, and are added in the order of the shards: a sum of floats
depends on the order of its terms, and must not depend on how many workers there were or which of them was quick.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Final

from distspec.config import Runtime
from distspec.runtime.actors import Prepared, Work, apply_work
from distspec.runtime.workers import map_items

__all__ = ["HERE", "RUNS", "fold", "folding", "in_order", "runs_of"]

RUNS: Final = 256
"""Most runs that a pass is cut into."""

HERE: Final = 16
"""Most items that are summarized in this process."""


def folding(settings: Runtime, stage: str) -> Callable[..., Any]:
    """Give `fold` as a stage does it, for what adds up over a survey and must not know of workers."""
    return partial(fold, settings, stage)


def fold(
    settings: Runtime,
    stage: str,
    factory: Callable[..., Work],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    label: str = "",
) -> Any:
    """Summarize items, usually one a shard, and add the summaries up.

    Few items (`HERE`) are done in this process: that takes less than the start of a worker. The result is the same.

    Arguments:
        settings: number of workers, time limit of a run of items.
        stage: whose workers do it, as to what they take of the cluster.
        factory: importable class whose instances give the summary of an item; summaries are added by `+`.
        arguments: of the factory; small, since every worker gets a copy.
        items: in the order in which their summaries are added; small and picklable.
        label: what the progress bar says.

    Returns:
        The sum; None of no items.

    Raises:
        DistspecError: what the work raised itself.
        ShardError: the work failed in another way, or a run of items ended its workers.
    """
    runs = list(enumerate(runs_of(items, RUNS)))
    if len(items) <= HERE:
        # Without a bar: it is over at once.
        work = Prepared(_Fold, (factory, arguments))
        done: Iterable[Any] = (apply_work(work, run) for run in runs)
    else:
        done = map_items(_Fold, (factory, arguments), runs, settings, label, needs=settings.needs(stage), here=False)
    found = in_order(done, len(runs))
    return reduce(add, found) if runs else None


def runs_of(items: Sequence[Any], most: int) -> list[tuple[Any, ...]]:
    """Cut items into at most so many runs of one length, but for the last.

    Example:
        >>> runs_of(range(5), 2)
        [(0, 1, 2), (3, 4)]
    """
    length = max(-(-len(items) // most), 1)
    return [tuple(items[start : start + length]) for start in range(0, len(items), length)]


def in_order(results: Iterable[tuple[int, Any]], count: int) -> Iterator[Any]:
    """Give numbered results in the order of their numbers, each as soon as those before it are there."""
    early: dict[int, Any] = {}
    wanted = 0
    for number, found in results:
        early[number] = found
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
    if wanted < count:
        raise RuntimeError(f"{count - wanted} of {count} results are missing")


class _Fold:
    """Adds up the summaries of a run of items; lives in a worker."""

    def __init__(self, factory: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        self._work = factory(*arguments)

    def __call__(self, run: tuple[int, Sequence[Any]]) -> tuple[int, Any]:
        number, items = run
        return number, reduce(add, (self._work(item) for item in items))
