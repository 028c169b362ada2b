"""Any tree of merges equals one pass."""

import math
import warnings
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distspec.statistics.summaries import (
    Histogram,
    Moments,
    Selection,
    Sums,
    TopK,
    quantile,
    quantile_ranks,
    row_mean,
    row_median,
)

pytestmark = pytest.mark.numeric

cuts = st.lists(st.integers(0, 60), max_size=6).map(sorted)
values = arrays(np.float32, 60, elements=st.floats(-1e3, 1e3, width=32))


def parts(length: int, where: list[int]) -> list[slice]:
    edges = [0, *where, length]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


@given(values, cuts)
def test_moments_do_not_depend_on_the_cut(data: np.ndarray, where: list[int]) -> None:
    table = data.reshape(20, 3)
    good = table > -500
    whole = Moments.of(table, good)
    merged = reduce(add, [Moments.of(table[p], good[p]) for p in parts(20, [w // 3 for w in where])], Moments.zero(3))
    for name in ("weight", "mean", "variance"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    for column in range(3):
        kept = table[good[:, column], column].astype(np.float64)
        if len(kept):
            np.testing.assert_allclose(whole.mean[column], kept.mean(), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(whole.variance[column], kept.var(), rtol=1e-9, atol=1e-6)


@given(values, cuts, st.integers(1, 70))
def test_top_lists_do_not_depend_on_the_cut(data: np.ndarray, where: list[int], size: int) -> None:
    scores = np.round(data / 100)  # many ties
    scores[::7] = np.nan
    rows = np.arange(60)
    whole = TopK.of(size, rows, scores)
    merged = reduce(add, [TopK.of(size, rows[p], scores[p]) for p in parts(60, where)], TopK.zero(size))
    np.testing.assert_array_equal(merged.rows, whole.rows)
    known = rows[~np.isnan(scores)]
    expected = sorted(known.tolist(), key=lambda row: (-scores[row], row))[:size]
    assert whole.rows.tolist() == expected


@given(values, cuts)
def test_histograms_do_not_depend_on_the_cut(data: np.ndarray, where: list[int]) -> None:
    whole = Histogram.of(data)
    merged = reduce(add, [Histogram.of(data[p]) for p in parts(60, where)], Histogram.zero())
    np.testing.assert_array_equal(merged.counts, whole.counts)
    assert whole.counts.sum() == 60


def test_histogram_bins_hold_their_values() -> None:
    edges = Histogram.edges()
    middle = np.sqrt(edges[100] * edges[101])
    counts = Histogram.of(np.array([middle, np.nan, 0.0, np.inf])).counts
    assert counts[100] == 1
    assert counts[0] == 1
    assert counts[-1] == 1


# --- exact summaries --------------------------------------------------------------------------------------------------

anything = arrays(
    np.float32,
    (20, 3),
    elements=st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 1e-45, -1e-45, 3e38, -3e38]),
    ),
)
masks = arrays(np.bool_, (20, 3))
QUANTILES = (0.16, 0.5, 0.84)


def select(data: np.ndarray, good: np.ndarray, where: list[int], ranks: np.ndarray | None = None) -> Selection:
    selection = Selection.start(data.shape[1])
    while not selection.done:
        counted = reduce(add, [selection.count([(data[p], good[p])]) for p in parts(len(data), where)], selection)
        wanted = ranks if ranks is not None else quantile_ranks(counted.total, QUANTILES)
        selection = counted.narrow(wanted if selection.level == 0 else None)
    return selection


@settings(deadline=None)
@given(anything, masks, cuts, st.integers(0, 30))
def test_selection_finds_the_sorted_values(data: np.ndarray, good: np.ndarray, where: list[int], rank: int) -> None:
    count = good.sum(axis=0)
    ranks = np.stack([np.minimum(rank, np.maximum(count - 1, 0)), np.zeros(3, int), np.maximum(count - 1, 0)])
    found = select(data, good, [w // 3 for w in where], ranks).values
    for column in range(3):
        ordered = np.sort(data[good[:, column], column])
        expected = ordered[ranks[:, column]] if len(ordered) else np.full(3, np.nan, np.float32)
        np.testing.assert_array_equal(found[:, column], expected)
    assert found.dtype == np.float32


@settings(deadline=None)
@given(anything, masks, cuts)
def test_median_is_that_of_numpy_in_every_bit(data: np.ndarray, good: np.ndarray, where: list[int]) -> None:
    selection = select(data, good, [w // 3 for w in where])
    holes = np.where(good, data, np.float32(np.nan))
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column without values
        median = np.nanmedian(holes, axis=0)
        others = np.nanquantile(holes.astype(np.float64), QUANTILES, axis=0)
    ours = quantile(selection, QUANTILES)
    finite = ~np.isinf(median)  # numpy adds two huge values in float32
    np.testing.assert_array_equal(ours[1][finite], median[finite])
    np.testing.assert_allclose(ours, others, rtol=1e-6, atol=1e-30)
    assert np.isnan(ours[:, ~good.any(axis=0)]).all()


@settings(deadline=None)
@given(anything, masks, cuts)
def test_sums_are_exact_whatever_the_cut(data: np.ndarray, good: np.ndarray, where: list[int]) -> None:
    whole = Sums.of(3, [(data, good)])
    merged = reduce(add, [Sums.of(3, [(data[p], good[p])]) for p in parts(20, [w // 3 for w in where])])
    assert merged.mean.tobytes() == whole.mean.tobytes()
    assert Sums.of(3, [(data[::-1], good[::-1])]).mean.tobytes() == whole.mean.tobytes()
    for column in range(3):
        kept = data[good[:, column], column].astype(np.float64)
        expected = math.fsum(kept) / len(kept) if len(kept) else np.nan
        np.testing.assert_allclose(whole.mean[column], expected, rtol=1e-12, atol=1e-12 * np.abs(kept).max(initial=0))


def test_what_is_not_good_does_not_count() -> None:
    data = np.array([[np.nan], [2.0], [np.inf], [4.0]], np.float32)
    good = np.isfinite(data)
    assert Sums.of(1, [(data, good)]).mean.tolist() == [3.0]
    assert quantile(select(data, good, []), QUANTILES)[1].tolist() == [3.0]
    assert select(data[:0], good[:0], []).total.tolist() == [0]


def test_counts_of_a_pass_that_saw_nothing_are_small() -> None:
    assert Selection.start(4000).counts.nbytes == 0
    counted = Selection.start(2).count([(np.ones((3, 2), np.float32), np.ones((3, 2), bool))])
    following = counted.narrow(quantile_ranks(counted.total, QUANTILES))
    assert following.counts.nbytes == 0
    assert following.prefix.shape == (1, 2)  # six targets of equal prefix are counted once


# --- the other axis ---------------------------------------------------------------------------------------------------


def test_rows_reduce_as_numpy_does(rng: np.random.Generator) -> None:
    for pixels in (1, 30, 31):
        data, good = rng.normal(0, 1, (50, pixels)), rng.random((50, pixels)) > 0.3
        data[~good] = rng.choice([np.nan, np.inf, -1e30], (~good).sum())
        holes = np.where(good, data, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(row_median(data, good), np.nanmedian(holes, axis=1))
            np.testing.assert_allclose(row_mean(data, good), np.nanmean(holes, axis=1), rtol=1e-12, atol=1e-15)
