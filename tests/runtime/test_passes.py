"""A pass over the survey: the sum does not depend on who added what, and the driver gets few summaries."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from distspec.config import Runtime
from distspec.errors import ShardError
from distspec.runtime.passes import RUNS, fold, in_order, runs_of

ITEMS = range(2 * RUNS + 88)


class Waves:
    """Work whose summaries are no whole numbers, so that the order of adding shows."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, item: int) -> np.ndarray:
        if item < 0:
            raise ShardError(f"item {item} has no wave")
        return np.sin(np.arange(1, self._size + 1) * 10.0 ** (item % 9))


def test_workers_and_this_process_add_to_the_same_bits(ray_session: None) -> None:
    here = fold(Waves, (5,), ITEMS, Runtime(), here=True)
    for workers in (1, 2):
        assert_array_equal(fold(Waves, (5,), ITEMS, Runtime(workers=workers)), here)
    plain = np.zeros(5)
    for item in ITEMS:
        plain = plain + Waves(5)(item)
    np.testing.assert_allclose(here, plain, rtol=1e-12, atol=1e-12)


def test_nothing_to_add_is_none() -> None:
    assert fold(Waves, (5,), [], Runtime(), here=True) is None


def test_an_error_of_an_item_passes_as_it_is() -> None:
    with pytest.raises(ShardError, match="item -1 has no wave"):
        fold(Waves, (5,), [3, -1], Runtime(), here=True)


@given(st.integers(0, 2000), st.integers(1, 300))
def test_runs_are_few_and_hold_every_item_once_in_order(count: int, most: int) -> None:
    runs = runs_of(range(count), most)
    assert [item for run in runs for item in run] == list(range(count))
    assert len(runs) <= most
    assert len({len(run) for run in runs[:-1]}) <= 1


@given(st.permutations(range(9)))
def test_results_come_in_order_whatever_the_order_of_arrival(order: list[int]) -> None:
    assert list(in_order([(number, str(number)) for number in order], 9)) == [str(number) for number in range(9)]


def test_a_result_that_never_came_is_no_shorter_list() -> None:
    with pytest.raises(RuntimeError, match="1 of 3 results"):
        list(in_order([(0, "a"), (1, "b")], 3))
