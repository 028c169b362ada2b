"""Any tree of merges equals one pass."""

from functools import reduce
from operator import add

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distspec.reduce import Histogram, Moments, TopK

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
