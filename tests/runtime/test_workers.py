"""Work spread over items: who does it must not show."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from distspec.config import Experiment, Needs, Runtime, Span
from distspec.errors import ConfigError, DistspecWarning, ShardError
from distspec.runtime import workers
from distspec.runtime.cluster import cluster_has, require_resources, workers_of
from distspec.runtime.pool import Introduction, versions
from distspec.runtime.workers import Cut, map_items
from tests.support.processes import PATIENCE

TWO = Runtime(workers=2)


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


class Given:
    """Tells which file it was given."""

    def __init__(self, path: Path, settings: Experiment) -> None:
        self._told = str(path), settings.output

    def __call__(self, item: int) -> tuple[str, str]:
        return self._told


def test_every_item_is_done_once_in_workers_as_it_is_here(ray_session: None) -> None:
    apart = list(map_items(Squares, (), range(5), TWO))
    assert os.getpid() not in {process for *_, process in apart}
    here = list(map_items(Squares, (), range(5), TWO, here=True))
    assert {process for *_, process in here} == {os.getpid()}
    assert sorted(result[:2] for result in apart) == [result[:2] for result in here]
    assert [result[:2] for result in here] == [(item, item**2) for item in range(5)]


def test_a_single_item_is_done_here_and_needs_no_ray() -> None:
    assert list(map_items(Squares, (), [3], TWO)) == [(3, 9, os.getpid())]
    assert list(map_items(Squares, (), [], TWO)) == []


@pytest.mark.parametrize("items", [[2], pytest.param([1, 2, 3], marks=pytest.mark.slow)])
def test_a_failure_arrives_as_one_line_and_is_not_tried_again(
    ray_session: None, tmp_path: Path, items: list[int]
) -> None:
    with pytest.raises(ShardError, match=r"^a worker failed: ZeroDivisionError: by nothing$"):
        list(map_items(Fails, (str(tmp_path),), items, TWO))
    assert (tmp_path / "2").read_text() == "x"


@pytest.mark.parametrize("items", [[20], pytest.param([10, 20, 30], marks=pytest.mark.slow)])
def test_an_error_of_ours_keeps_the_rows_that_it_names(ray_session: None, tmp_path: Path, items: list[int]) -> None:
    with pytest.raises(ShardError, match=r"^rows 20 to 30 are damaged$") as caught:
        list(map_items(Fails, (str(tmp_path),), items, TWO))
    assert caught.value.rows == (20, 30)


class Variables:
    """Work that tells what is in its environment."""

    def __call__(self, item: str) -> str | None:
        return os.environ.get(item)


class Deadly:
    """Sums of the rows of shards; some rows end the process or never come to an end."""

    def __init__(self, deadly: tuple[int, ...], sleepy: tuple[int, ...] = ()) -> None:
        self._deadly, self._sleepy = deadly, sleepy

    def __call__(self, shard: int) -> tuple[int, int, tuple[int, ...]]:
        return self.without(shard, (), "")

    def attempt(self, shard: int, start: int, stop: int) -> None:
        self._sum(range(start, stop))

    def without(self, shard: int, lost: tuple[int, ...], why: str) -> tuple[int, int, tuple[int, ...]]:
        return shard, self._sum(sorted(set(range(*bounds(shard))) - set(lost))), lost

    def _sum(self, rows: Sequence[int]) -> int:
        for row in rows:
            if row in self._deadly:
                os._exit(1)
            if row in self._sleepy:
                time.sleep(3600)
        return sum(rows)


class DeadlyTogether(Deadly):
    """Ends its process for many rows at a time, as what takes too much memory does."""

    def __init__(self) -> None:
        super().__init__(())

    def _sum(self, rows: Sequence[int]) -> int:
        if len(rows) > 4:
            os._exit(1)
        return sum(rows)


def bounds(shard: int) -> tuple[int, int]:
    return 8 * shard, 8 * shard + 8


@pytest.mark.slow
def test_rows_that_end_their_workers_are_found_and_all_others_done(ray_session: None) -> None:
    with pytest.warns(DistspecWarning, match="sums goes on without row (3|17, 18), which ended its worker"):
        results = sorted(map_items(Deadly, ((3, 17, 18),), range(4), TWO, "sums", cut=Cut(bounds)))
    lost = {0: (3,), 1: (), 2: (17, 18), 3: ()}
    assert results == [(n, sum(set(range(*bounds(n))) - set(lost[n])), lost[n]) for n in range(4)]


@pytest.mark.slow
def test_a_single_item_with_such_a_row_does_not_end_this_process(ray_session: None) -> None:
    with pytest.warns(DistspecWarning, match="sums goes on without row 3, which ended its worker"):
        assert list(map_items(Deadly, ((3,),), [0], TWO, "sums", cut=Cut(bounds))) == [(0, 25, (3,))]


@pytest.mark.slow
def test_a_row_that_never_ends_is_found_by_its_time(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PART_SECONDS", 5.0)
    settings = Runtime(workers=2, item_seconds=5.0)
    with pytest.warns(DistspecWarning, match="sums goes on without row 9, which took longer than 5 s"):
        results = sorted(map_items(Deadly, ((), (9,)), range(2), settings, "sums", cut=Cut(bounds)))
    assert results == [(0, 28, ()), (1, 92 - 9, (9,))]


@pytest.mark.slow
def test_work_that_cannot_be_cut_is_given_up_after_some_workers(ray_session: None) -> None:
    with pytest.raises(ShardError, match=r"^sums 1 ended its worker \(.*\), 3 times; given up$"):
        list(map_items(Deadly, ((9,),), [0, 1], TWO, "sums"))


@pytest.mark.slow
def test_what_only_ends_workers_as_a_whole_is_no_fault_of_a_row(ray_session: None) -> None:
    with pytest.raises(ShardError, match=r"^sums: one of rows .* ended its worker .*, 3 times; given up$"):
        list(map_items(DeadlyTogether, (), [0, 1], TWO, "sums", cut=Cut(bounds)))


def test_workers_are_kept_for_the_next_job_and_give_way_to_others(ray_session: None) -> None:
    first, second = ({process for *_, process in map_items(Squares, (), range(4), TWO)} for _ in range(2))
    assert first & second
    require_resources("train.workers", Needs(1))
    assert not first & {process for *_, process in map_items(Squares, (), range(4), TWO)}


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(ray_session: None, tmp_path: Path) -> None:
    results = sorted(map_items(Dies, (str(tmp_path / "mark"),), [1, 2, 3, 4], TWO))
    assert (tmp_path / "mark").exists()
    assert results == [1, 2, 3, 4]


def test_a_relative_path_means_the_folder_of_the_driver(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (Path("table.csv"), Experiment(output="out"))
    expected = {(str(tmp_path / "table.csv"), str(tmp_path / "out"))}
    assert set(map_items(Given, arguments, [1, 2], TWO)) == expected
    assert set(map_items(Given, arguments, [1], TWO, here=True)) == expected


def test_workers_get_the_named_variables_of_this_process_for_one_job(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTSPEC_TEST_A", "one")
    monkeypatch.setenv("DISTSPEC_TEST_B", "two")
    names = ["DISTSPEC_TEST_A", "DISTSPEC_TEST_B"]
    # One at a time in one worker, which is kept for the next job.
    told = list(map_items(Variables, (), names, Runtime(workers=1, env_vars=("DISTSPEC_TEST_A",))))
    assert told == ["one", None]
    assert list(map_items(Variables, (), names, Runtime(workers=1))) == [None, None]
    with pytest.raises(ConfigError, match=r"^runtime\.env_vars names DISTSPEC_TEST_C, which is not set here$"):
        list(map_items(Variables, (), names, Runtime(workers=1, env_vars=("DISTSPEC_TEST_C",))))


def test_workers_of_our_own_ray_know_object_stores_that_were_set_after_it_started(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_TEST_ONLY", "there")
    assert list(map_items(Variables, (), ["AWS_TEST_ONLY", "AWS_TEST_ONLY"], TWO)) == ["there", "there"]


def test_a_worker_with_another_version_is_refused_by_the_name_of_its_node() -> None:
    own = versions()
    Introduction("1", "node-7", own).require_same()
    with pytest.raises(ConfigError, match=rf"^node node-7 has numpy 1\.0 \(here {own['numpy']}\); install the same"):
        Introduction("1", "node-7", own | {"numpy": "1.0"}).require_same()


def test_a_range_of_workers_follows_what_there_is_room_for(ray_session: None) -> None:
    # Four slots in this Ray.
    assert workers_of(Runtime(workers=Span(max=64)), 100) == 4
    assert workers_of(Runtime(workers=Span(max=3)), 100) == 3
    assert workers_of(Runtime(), 100, Needs(cpus=2)) == 2
    assert workers_of(Runtime(), 100, Needs(memory_gb=0.75 * cluster_has().memory_gb)) == 1
    with pytest.raises(ConfigError, match=r"runtime\.workers asks for 9 CPUs"):
        workers_of(Runtime(workers=Span(min=9, max=64)), 100)


def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    program = (
        "from distspec.config import Runtime\n"
        "from distspec.runtime.cluster import connect\n"
        f"connect(Runtime(address='127.0.0.1:{port}'))\n"
    )
    begin = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert f"ConfigError: no Ray cluster at 127.0.0.1:{port}: Connection refused; see to runtime.address" in said.stderr
    assert time.monotonic() - begin < 60


def test_there_is_a_worker_for_each_item_at_most(ray_session: None) -> None:
    assert workers_of(Runtime(workers=3), 2) == 2
    assert workers_of(Runtime(workers=3), 5) == 3
    assert workers_of(Runtime(), 0) == 1


def test_what_the_cluster_never_has_is_refused(ray_session: None) -> None:
    require_resources("train.workers", Needs(4))
    with pytest.raises(ConfigError, match=r"train\.workers asks for 99 CPUs and 0 GPUs; .* ask for fewer"):
        require_resources("train.workers", Needs(99))
    with pytest.raises(ConfigError, match=r"runtime\.workers asks for 2 CPUs and 2000 GPUs"):
        workers_of(Runtime(workers=2), 2, Needs(gpus=1000))
