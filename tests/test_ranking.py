"""Top lists, ranks and overlaps read by shard equal those of the whole array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distspec.ranking import distributions, listed, overlap, ranks, score_names, top_list
from distspec.reduce import TopK
from distspec.spectra import WaveGrid
from distspec.store import Layer, SpectraStore

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
def layer(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    grid = WaveGrid.between("log", 4000.0, 5000.0, 16)
    store = SpectraStore.create(
        tmp_path_factory.mktemp("ranking") / "store.zarr",
        grid=grid,
        frame="rest",
        rows=ROWS,
        shard_rows=300,
        chunk_rows=300,
        columns={},
        digest="",
        recipe="",
        settings={},
    )
    layer = store.create_layer("score-x", {"latents": ("f4", (2,)), "a": ("f4", ()), "b": ("f4", ())})
    for shard in range(layer.shards):
        part = slice(*layer.bounds(shard))
        latents = np.zeros((len(values[part]), 2), np.float32)
        layer.write(shard, {"latents": latents, "a": values[part], "b": -np.abs(values[part])})
    return layer


def test_scores_are_the_fields_of_one_number(layer: Layer) -> None:
    assert score_names(layer) == ["a", "b"]


def test_distributions_count_every_score_once(layer: Layer, values: np.ndarray) -> None:
    known = int((~np.isnan(values)).sum())
    assert {name: int(histogram.counts.sum()) for name, histogram in distributions(layer).items()} == {
        "a": known,
        "b": known,
    }


@pytest.mark.parametrize("size", [1, 2, 17, 150, 400, 909, 5_000])
@pytest.mark.parametrize("name", ["a", "b"])
def test_top_lists_equal_those_of_the_whole(layer: Layer, values: np.ndarray, name: str, size: int) -> None:
    whole = values if name == "a" else -np.abs(values)
    expected = TopK.of(size, np.arange(ROWS), whole)
    found = top_list(layer, name, size, distributions(layer)[name])
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_list_of_nothing_is_empty(layer: Layer) -> None:
    assert len(top_list(layer, "a", 0, distributions(layer)["a"]).rows) == 0


def test_ranks_count_the_larger_ones(layer: Layer, values: np.ndarray) -> None:
    asked = values[[6, 5, 100, 101]]
    expected = [1 + int((values > value).sum()) for value in asked]
    np.testing.assert_array_equal(ranks(layer, "a", asked), expected)


def test_overlap_is_the_share_in_common() -> None:
    scores = np.arange(4, 0, -1).astype(np.float32)
    tops = {name: TopK(4, np.array(rows), scores) for name, rows in {"a": [1, 2, 3, 4], "b": [4, 9, 8, 1]}.items()}
    np.testing.assert_array_equal(overlap(tops), [[1.0, 0.5], [0.5, 1.0]])


@given(st.integers(0, 10**8), st.floats(1e-6, 1.0))
def test_a_list_holds_at_least_its_share(scored: int, fraction: float) -> None:
    size = listed(scored, fraction)
    assert 0 <= size <= scored
    assert size >= fraction * scored - 1e-6
    assert size < fraction * scored + 1


def test_a_whole_share_is_not_rounded_up() -> None:
    assert listed(700, 0.01) == 7
