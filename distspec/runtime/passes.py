"""Passes over the shards of a survey: summaries added up where the data are, or results in the order of the shards.

For a sum, a worker adds up a run of shards and sends one summary for it, and at most `RUNS` runs come to the driver,
however large the survey is. Runs follow from the number of shards alone, and are added in the order of the shards: a
sum of floats depends on the order of its terms, and must not depend on how many workers there were or which of them was
quick.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Final

from distspec.config import Runtime, anchored
from distspec.runtime.actors import Prepared, Work, apply_work
from distspec.runtime.workers import map_items

__all__ = ["HERE", "RUNS", "each", "fold", "folding", "here", "in_order", "runs_of"]

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
    found = each(settings, stage, _Fold, (factory, arguments), runs_of(items, RUNS), label, here=len(items) <= HERE)
    return reduce(add, found) if items else None


def each(
    settings: Runtime,
    stage: str,
    factory: Callable[..., Work],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    label: str = "",
    *,
    here: bool | None = None,
) -> Iterator[Any]:
    """Give the result of each item in the items' order; what comes early waits for those before it.

    Arguments:
        settings, stage, factory, arguments, items, label: as of `fold`.
        here: do it in this process; None does so with few items.

    Raises:
        DistspecError, ShardError: as `fold`.
    """
    if len(items) <= HERE if here is None else here:
        # Without a bar: it is over at once.
        work = Prepared(factory, anchored(arguments))
        yield from (apply_work(work, item) for item in items)
        return
    numbered = list(enumerate(items))
    done = map_items(
        _Numbered, (factory, arguments), numbered, settings, label, needs=settings.needs(stage), here=False
    )
    yield from in_order(done, len(items))


def here(
    factory: Callable[..., Work], arguments: tuple[Any, ...], items: Sequence[Any], label: str = ""
) -> Iterator[Any]:
    """Do work in this process, without a bar; in the place of `each` for who has no cluster."""
    return map(factory(*arguments), items)


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

    def __call__(self, run: Sequence[Any]) -> Any:
        return reduce(add, (self._work(item) for item in run))


class _Numbered:
    """Gives the result of an item with its number; lives in a worker."""

    def __init__(self, factory: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        self._work = factory(*arguments)

    def __call__(self, item: tuple[int, Any]) -> tuple[int, Any]:
        number, inner = item
        return number, self._work(inner)
