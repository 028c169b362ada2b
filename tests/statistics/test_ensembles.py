"""How detectors join to one: order, ties, and shares of the survey."""

import math
from collections.abc import Callable
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from distspec.statistics.ensembles import SurvivalFunction, rank_mean, rank_union
from distspec.statistics.summaries import TopK

NAN = np.float32(np.nan)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_ensembles_of_known_shares() -> None:
    shares = np.array([[0.1, 0.1], [0.001, 0.199], [0.5, 1.0], [NAN, NAN]], np.float32)
    np.testing.assert_allclose(rank_mean(shares), [1, 1, -math.log10(0.75), NAN], rtol=1e-5)
    np.testing.assert_allclose(rank_union(shares), [1, 3, -math.log10(0.5), NAN], rtol=1e-5)
    assert rank_mean(shares).dtype == rank_union(shares).dtype == np.float32


def test_the_union_list_is_the_union_of_lists(rng: np.random.Generator) -> None:
    ranks = np.stack([rng.permutation(1_000) for _ in range(3)], axis=1) + 1
    joined = rank_union((ranks / 1_000).astype(np.float32))
    union = set(np.flatnonzero((ranks <= 50).any(axis=1)))
    assert set(TopK.of(len(union), np.arange(1_000), joined).rows) == union


def test_the_mean_orders_as_one_minus_the_mean_share_and_survives_float32() -> None:
    """The first hundred thousand of fifty million stay apart, which 1 - share in float32 would not keep."""
    share = (np.arange(1, 100_001) / 50_000_000).astype(np.float32)
    for joined in (rank_mean, rank_union):
        assert (np.diff(joined(np.stack([share, share], axis=1))) < 0).all()
    assert len(np.unique(np.float32(1) - share)) < 40_000


def test_one_detector_joins_to_its_own_order(rng: np.random.Generator) -> None:
    scores = rng.normal(size=500).astype(np.float32)
    share = SurvivalFunction.count(np.unique(scores), scores).shares(scores)[:, None]
    for joined in (rank_mean, rank_union):
        np.testing.assert_array_equal(np.argsort(joined(share)), np.argsort(scores))


some = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])
scored = arrays(np.float32, st.integers(1, 40), elements=some)


@given(scored)
def test_shares_are_exact_where_all_values_are_edges(values: np.ndarray) -> None:
    expected = stats.rankdata(-values.astype(np.float64), "average") / len(values)
    found = SurvivalFunction.count(np.unique(values), values).shares(values)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@given(scored, st.integers(0, 40))
def test_shares_fall_as_values_rise_and_top_edges_make_the_top_exact(values: np.ndarray, top: int) -> None:
    ordered = np.unique(values)
    edges = np.unique(np.concatenate([ordered[::5], ordered[len(ordered) - min(top, len(ordered)) :]]))
    found = SurvivalFunction.count(edges, values).shares(ordered)
    assert (np.diff(found) <= 0).all()
    assert ((found > 0) & (found <= 1)).all()
    expected = SurvivalFunction.count(ordered, values).shares(edges)
    np.testing.assert_array_equal(found[np.isin(ordered, edges)], expected)


def test_shares_between_edges_are_linear(rng: np.random.Generator) -> None:
    values = rng.uniform(size=20_000).astype(np.float32)
    edges = np.linspace(0, 1, 21, dtype=np.float32)
    found = SurvivalFunction.count(edges, values).shares(values)
    np.testing.assert_allclose(found, stats.rankdata(-values) / 20_000, atol=0.003)


@given(arrays(np.float32, 40, elements=some | st.just(math.nan)), st.lists(st.integers(0, 40), max_size=5).map(sorted))
def test_survivors_do_not_depend_on_the_cut_and_nan_is_not_counted(values: np.ndarray, where: list[int]) -> None:
    edges = np.array([-math.inf, -1, 0, 2, 1e30], np.float32)
    nothing = SurvivalFunction.count(edges, np.zeros(0, np.float32))
    whole = SurvivalFunction.count(edges, values)
    merged = reduce(add, [SurvivalFunction.count(edges, part) for part in np.split(values, where)], nothing)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    assert whole.counts.sum() == np.sum(~np.isnan(values))
    np.testing.assert_array_equal(np.isnan(whole.shares(values)), np.isnan(values))
    assert np.isnan(nothing.shares(values)).all()


def test_values_beyond_the_survey_have_shares_too() -> None:
    survey = SurvivalFunction.count(np.array([1, 2], np.float32), np.array([1, 2, 2], np.float32))
    np.testing.assert_allclose(survey.shares(np.array([9, 2, 1.5, 1, -9], np.float32)) * 3, [0.5, 1.5, 2.5, 3, 3])


def survivors(*edges: float) -> SurvivalFunction:
    return SurvivalFunction.count(np.array(edges, np.float32), np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("why", "call"),
    [
        ("0 < share <= 1", lambda: rank_mean(np.array([[0.5, NAN]], np.float32))),
        ("0 < share <= 1", lambda: rank_union(np.array([[0.0, 0.5]], np.float32))),
        ("0 < share <= 1", lambda: rank_union(np.array([[1.5, 0.5]], np.float32))),
        ("0 < share <= 1", lambda: rank_mean(np.zeros((3, 0), np.float32))),
        ("ascending", lambda: survivors(2, 1)),
        ("ascending", lambda: survivors(1, 1)),
        ("ascending", lambda: survivors(1, NAN)),
        ("same ones", lambda: survivors(1) + survivors(2)),
    ],
)
def test_what_cannot_be_is_refused(why: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected .*{why}"):
        call()
