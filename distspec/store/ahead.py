"""Work that threads do ahead of the one that wants its results: reading, mostly, which leaves Python free meanwhile."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["read_ahead"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_ahead(
    work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int = 1, most: int = 1
) -> Generator[_Result, None, None]:
    """Give the result of each item in the items' order, made by threads that are some results ahead.

    Arguments:
        work: called with one item after the other, by several threads at once if there are several.
        items: taken by the thread that asks for results.
        threads: that work; they end with the generator, also one that is closed before its end.
        most: results that are made, or being made, beside the one that is given.

    Raises:
        Exception: whatever the work raised, when the turn of its item comes.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="distspec-ahead")
    coming: deque[Future[_Result]] = deque()
    try:
        for item in items:
            coming.append(pool.submit(work, item))
            if len(coming) > most:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
