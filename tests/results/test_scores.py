"""Top lists, ranks and overlaps read by shard equal those of the whole array."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distspec.errors import LayoutError
from distspec.results.scores import Scores, distributions, list_length, overlap, ranks, top_list
from distspec.spectra import WaveGrid
from distspec.statistics.summaries import TopK
from distspec.store import SpectraStore, StoreSpec

ROWS = 1_000


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    rng = np.random.default_rng(3)
    values = rng.lognormal(0.0, 2.0, ROWS).astype(np.float32)
    values[rng.choice(ROWS, 200)] = np.float32(7.5)  # ties
    values[::11] = np.nan
    values[5] = 0.0
    values[6] = np.float32(1e20)  # past the histogram's last edge
    return values


@pytest.fixture(scope="module")
def scores(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    grid = WaveGrid.between("log", 4000.0, 5000.0, 16)
    store = SpectraStore.create(
        tmp_path_factory.mktemp("ranking") / "store.zarr",
        StoreSpec(
            grid=grid,
            frame="rest",
            rows=ROWS,
            shard_rows=300,
            chunk_rows=300,
            columns={},
            digest="",
            recipe="",
            settings={},
        ),
    )
    layer = store.create_layer("score-x", {"latents": ("f4", (2,)), "a": ("f4", ()), "b": ("f4", ())})
    for shard in range(layer.shards):
        part = slice(*layer.bounds(shard))
        latents = np.zeros((len(values[part]), 2), np.float32)
        layer.write(shard, {"latents": latents, "a": values[part], "b": -np.abs(values[part])})
    other = store.create_layer("detect-c", {"c": ("f4", ()), "region": ("i4", ())}, {"scores": ["c"]})
    for shard in range(other.shards):
        part = slice(*other.bounds(shard))
        other.write(shard, {"c": 2 * values[part], "region": np.zeros(len(values[part]), np.int32)})
    return Scores([layer, other])


def test_scores_of_several_layers_stand_side_by_side(scores: Scores, values: np.ndarray) -> None:
    assert scores.names == ["a", "b", "c"]
    assert (scores.rows, scores.shards) == (ROWS, 4)
    np.testing.assert_array_equal(scores.take("c", np.array([4, 300, 2])), 2 * values[[4, 300, 2]])
    np.testing.assert_array_equal(scores.read("b", 250, 650), -np.abs(values[250:650]))
    assert scores.only(["c", "a"]).names == ["c", "a"] and scores.only(["c"]).key == ("detect-c",)


def test_a_score_that_comes_twice_or_is_unknown_is_refused(scores: Scores) -> None:
    with pytest.raises(LayoutError, match="'c' is in detect-c and in detect-c"):
        Scores([*scores.layers, scores.layer("c")])
    with pytest.raises(LayoutError, match="no score 'd'; there are a, b, c"):
        scores.layer("d")


def test_distributions_count_every_score_once(scores: Scores, values: np.ndarray) -> None:
    known = int((~np.isnan(values)).sum())
    assert {name: int(histogram.counts.sum()) for name, histogram in distributions(scores).items()} == {
        "a": known,
        "b": known,
        "c": known,
    }


@pytest.mark.parametrize("size", [1, 2, 17, 150, 400, 909, 5_000])
@pytest.mark.parametrize("waiting", [1_000_000, 200])
@pytest.mark.parametrize("name", ["a", "b"])
def test_top_lists_equal_those_of_the_whole(
    scores: Scores, values: np.ndarray, name: str, size: int, waiting: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("distspec.results.scores._WAITING", waiting)
    whole = values if name == "a" else -np.abs(values)
    expected = TopK.of(size, np.arange(ROWS), whole)
    found = top_list(scores, name, size, distributions(scores)[name])
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_list_of_nothing_is_empty(scores: Scores) -> None:
    assert len(top_list(scores, "a", 0, distributions(scores)["a"]).rows) == 0


def test_ranks_count_the_larger_ones(scores: Scores, values: np.ndarray) -> None:
    asked = values[[6, 5, 100, 101]]
    expected = [1 + int((values > value).sum()) for value in asked]
    np.testing.assert_array_equal(ranks(scores, {"a": asked})["a"], expected)
    assert ranks(scores, {"a": np.array([np.nan], np.float32)})["a"].tolist() == [0]  # no rank, and not the first


def test_overlap_is_the_share_in_common() -> None:
    scores = np.arange(4, 0, -1).astype(np.float32)
    tops = {name: TopK(4, np.array(rows), scores) for name, rows in {"a": [1, 2, 3, 4], "b": [4, 9, 8, 1]}.items()}
    np.testing.assert_array_equal(overlap(tops), [[1.0, 0.5], [0.5, 1.0]])


@given(st.integers(0, 10**8), st.floats(1e-6, 1.0))
def test_a_list_holds_at_least_its_share(scored: int, fraction: float) -> None:
    size = list_length(scored, fraction)
    assert 0 <= size <= scored
    assert size >= fraction * scored - 1e-6
    assert size < fraction * scored + 1


def test_a_whole_share_is_not_rounded_up() -> None:
    assert list_length(700, 0.01) == 7
