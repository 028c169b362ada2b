"""A pass over the survey: the sum does not depend on who added what, and the driver gets few summaries."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from distspec.config import Experiment, Runtime
from distspec.errors import ShardError
from distspec.pipeline import Products
from distspec.results.scores import Scores, distributions, linear_histogram, ranks, top_lists
from distspec.results.truth import recovery
from distspec.runtime import passes
from distspec.runtime.passes import fold, folding, in_order, runs_of
from distspec.stages.compare.bias import find_groups, measure_bias
from distspec.stages.score.census import take_census

ITEMS = range(40)


class Waves:
    """Work whose summaries are no whole numbers, so that the order of adding shows."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, item: int) -> np.ndarray:
        if item < 0:
            raise ShardError(f"item {item} has no wave")
        return np.sin(np.arange(1, self._size + 1) * 10.0 ** (item % 9))


def test_workers_and_this_process_add_to_the_same_bits(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "RUNS", 16)
    monkeypatch.setattr(passes, "HERE", len(ITEMS))
    here = fold(Runtime(), "score", Waves, (5,), ITEMS)
    monkeypatch.setattr(passes, "HERE", 0)
    for workers in (1, 2):
        assert_array_equal(fold(Runtime(workers=workers), "score", Waves, (5,), ITEMS), here)
    plain = np.zeros(5)
    for item in ITEMS:
        plain = plain + Waves(5)(item)
    np.testing.assert_allclose(here, plain, rtol=1e-12, atol=1e-12)


def test_nothing_to_add_is_none() -> None:
    assert fold(Runtime(), "score", Waves, (5,), []) is None


def test_an_error_of_an_item_passes_as_it_is() -> None:
    with pytest.raises(ShardError, match="item -1 has no wave"):
        fold(Runtime(), "score", Waves, (5,), [3, -1])


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


@pytest.mark.slow
def test_passes_of_a_survey_give_the_same_in_workers(
    done: tuple[Experiment, Products], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, made = done
    store, table = made.store, Scores([made.scores])
    folds = []
    for here in (10**9, 0):
        monkeypatch.setattr(passes, "HERE", here)
        fold = folding(experiment.runtime, "report")
        histograms = distributions(table, fold)
        sizes = dict.fromkeys(table.names, 40)
        tops = top_lists(table, sizes, histograms, fold)
        lists = {name: top.rows for name, top in tops.items()}
        values = {name: top.scores for name, top in tops.items()}
        kinds = [("class",), ("class", "subclass")]
        kinds = [columns for columns in kinds if set(columns) <= set(store.column_names)]
        folds.append(
            (
                {name: histogram.counts.tolist() for name, histogram in histograms.items()},
                {name: top.to_dict() for name, top in tops.items()},
                {name: found.tolist() for name, found in ranks(table, values, fold).items()},
                [part.tolist() for part in linear_histogram(table, "mse", 30, fold)],
                take_census(store, table, 5, fold),
                recovery(store, table, 0.05, fold=fold),
                measure_bias(store, table, lists, ["z", "snr"], fold),
                find_groups(store, table, lists, kinds, asked=False, fold=fold).to_dict(),
            )
        )
    here, apart = folds
    assert apart == here
    census = here[4]
    assert census.scored + census.set_aside == store.rows
    # A file's rows may go on in the next shard.
    files = store.column("file")
    usable = store.status() == 0
    assert census.files == len(set(files)) and census.scored_files == len(set(files[usable]))
