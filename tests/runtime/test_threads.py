"""What is computed under `one_thread` is computed in one thread, wherever that is."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits

from distspec.config import Runtime
from distspec.runtime.threads import one_thread
from distspec.runtime.workers import map_items

pytestmark = pytest.mark.numeric


def pools() -> dict[str, int]:
    """Give the threads of every pool of this process."""
    return {"torch": torch.get_num_threads()} | {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}


class Pools:
    """Tells of its process; making it undoes every limit, as a library does that is loaded only now."""

    def __init__(self) -> None:
        threadpool_limits(limits=4)
        torch.set_num_threads(4)

    def __call__(self, item: int) -> tuple[int, dict[str, int]]:
        return item, pools()


def test_every_pool_is_held_to_one_thread_and_let_go(four_threads: None) -> None:
    KMeans(2, n_init=1).fit(np.arange(8.0)[:, None])
    scipy.linalg.eigh(np.eye(3))
    before = pools()
    assert len(before) >= 4, before
    assert set(before.values()) == {4}
    with one_thread(), one_thread():
        assert set(pools().values()) == {1}
    assert pools() == before
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert pools() == before


def test_a_decorated_function_is_held_each_time_it_is_called(four_threads: None) -> None:
    held = one_thread()(pools)
    assert [set(held().values()) for _ in range(2)] == [{1}, {1}]
    assert set(pools().values()) == {4}


@pytest.mark.slow
def test_work_has_one_thread_here_and_in_a_worker(ray_session: None, four_threads: None) -> None:
    for items in ([1], [1, 2, 3]):
        told = dict(map_items(Pools, (), items, Runtime(workers=2)))
        assert sorted(told) == items
        assert [set(threads.values()) for threads in told.values()] == [{1}] * len(items), told
