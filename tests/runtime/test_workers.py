"""Work spread over items: who does it must not show."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distspec.config import Runtime
from distspec.errors import ConfigError, ShardError
from distspec.runtime.workers import map_actors, map_shards, require_resources, workers_of

TWO = Runtime(workers=2)

both = pytest.mark.parametrize("spread", [map_shards, map_actors])


class Squares:
    """Work that tells which process did it."""

    def __call__(self, item: int) -> tuple[int, int, int]:
        return item, item**2, os.getpid()


class Fails:
    """Work that fails in a worker, once by an error of ours; leaves a mark for each time that it is asked."""

    def __init__(self, marks: str) -> None:
        self._marks = Path(marks)

    def __call__(self, item: int) -> int:
        with open(self._marks / str(item), "a", encoding="utf-8") as mark:
            mark.write("x")
        if item == 2:
            raise ZeroDivisionError("by nothing")
        if item == 20:
            error = ShardError("rows 20 to 30 are damaged")
            error.rows = (20, 30)
            raise error
        return item


class Dies:
    """Work whose process is killed once."""

    def __init__(self, mark: str) -> None:
        self._mark = Path(mark)

    def __call__(self, item: int) -> int:
        if item == 2 and not self._mark.exists():
            self._mark.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return item


class Folder:
    """Work that tells where relative paths begin."""

    def __call__(self, item: int) -> str:
        return os.getcwd()


@both
def test_every_item_is_done_once_in_workers_as_it_is_here(ray_session: None, spread: Callable[..., Any]) -> None:
    apart = list(spread(Squares, (), range(5), TWO))
    assert os.getpid() not in {process for *_, process in apart}
    here = list(map_shards(Squares, (), range(5), TWO, here=True))
    assert {process for *_, process in here} == {os.getpid()}
    assert sorted(result[:2] for result in apart) == [result[:2] for result in here]
    assert [result[:2] for result in here] == [(item, item**2) for item in range(5)]


@both
def test_a_single_item_is_done_here_and_needs_no_ray(spread: Callable[..., Any]) -> None:
    assert list(spread(Squares, (), [3], TWO)) == [(3, 9, os.getpid())]
    assert list(spread(Squares, (), [], TWO)) == []


@both
@pytest.mark.parametrize("items", [[2], pytest.param([1, 2, 3], marks=pytest.mark.slow)])
def test_a_failure_arrives_as_one_line_and_is_not_tried_again(
    ray_session: None, tmp_path: Path, spread: Callable[..., Any], items: list[int]
) -> None:
    with pytest.raises(ShardError, match=r"^a worker failed: ZeroDivisionError: by nothing$"):
        list(spread(Fails, (str(tmp_path),), items, TWO))
    assert (tmp_path / "2").read_text() == "x"


@both
@pytest.mark.parametrize("items", [[20], pytest.param([10, 20, 30], marks=pytest.mark.slow)])
def test_an_error_of_ours_keeps_the_rows_that_it_names(
    ray_session: None, tmp_path: Path, spread: Callable[..., Any], items: list[int]
) -> None:
    with pytest.raises(ShardError, match=r"^rows 20 to 30 are damaged$") as caught:
        list(spread(Fails, (str(tmp_path),), items, TWO))
    assert caught.value.rows == (20, 30)


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(ray_session: None, tmp_path: Path) -> None:
    results = sorted(map_shards(Dies, (str(tmp_path / "mark"),), [1, 2, 3, 4], TWO))
    assert (tmp_path / "mark").exists()
    assert results == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_worker_works_in_the_folder_of_the_driver(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(map_actors(Folder, (), [1, 2], TWO)) == {str(tmp_path)}


def test_there_is_a_worker_for_each_item_at_most(ray_session: None) -> None:
    assert workers_of(Runtime(workers=3), 2) == 2
    assert workers_of(Runtime(workers=3), 5) == 3
    assert workers_of(Runtime(), 0) == 1


def test_what_the_cluster_never_has_is_refused(ray_session: None) -> None:
    require_resources("train.workers", 4, 0)
    with pytest.raises(ConfigError, match=r"train\.workers asks for 99 CPUs and 0 GPUs; .* ask for fewer"):
        require_resources("train.workers", 99, 0)
    with pytest.raises(ConfigError, match=r"runtime\.workers asks for 2 CPUs and 2000 GPUs"):
        workers_of(Runtime(workers=2, gpus_per_worker=1000), 2)
