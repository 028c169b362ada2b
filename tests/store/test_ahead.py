"""Work ahead: results in order, no more than are asked for, failures where they belong, and no thread that stays."""

import threading
from collections.abc import Callable

import pytest

from distspec.store import read_ahead


def left() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("distspec-ahead", "distspec-reader"))
    ]


def release_in_turn(count: int) -> Callable[[int], int]:
    """Give work on 0, 1, ... of which each item waits for the next one, so that they end in the opposite order."""
    ended = [threading.Event() for _ in range(count)]

    def work(item: int) -> int:
        if item + 1 < count:
            assert ended[item + 1].wait(10)
        ended[item].set()
        return item

    return work


def test_results_come_in_the_order_of_the_items_whichever_is_ready_first() -> None:
    assert list(read_ahead(release_in_turn(4), range(4), threads=4, most=4)) == [0, 1, 2, 3]
    assert not left()


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_items_are_taken_than_are_asked_for(most: int) -> None:
    taken: list[int] = []
    results = read_ahead(lambda item: item, (taken.append(item) or item for item in range(10)), 2, most)
    for number, result in enumerate(results):
        assert result == number
        assert len(taken) == min(10, number + 1 + most)


def test_what_the_work_raises_comes_in_its_turn_and_ends_the_threads() -> None:
    results = read_ahead(lambda item: 1 // (2 - item), range(5), threads=2, most=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not left()


def test_leaving_early_ends_the_threads() -> None:
    done: list[int] = []
    results = read_ahead(done.append, range(1000), most=2)
    next(results)
    assert left()
    results.close()
    assert not left()
    assert len(done) <= 3
