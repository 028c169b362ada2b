"""Where spectra stand among all others: distributions, top lists, ranks, overlap of lists.

Layers are read shard by shard and whatever is kept has the size of its answer, so a survey of any size will do.
"""

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from distspec.reduce import Histogram, TopK
from distspec.scores import Scores

__all__ = ["distributions", "listed", "overlap", "ranks", "spread", "top_list"]


_WAITING: Final = 1_000_000
"""Values that are held before a list is cut to its length."""


def listed(scored: int, fraction: float) -> int:
    """Give the length of the top list that holds this share of the scored spectra, at least one if there are any.

    Example:
        >>> listed(1001, 0.01), listed(3, 0.01), listed(0, 0.01)
        (11, 1, 0)
    """
    # The product of a share and a whole number may lie a rounding error above a whole number.
    return min(scored, math.ceil(fraction * scored - 1e-9))


def distributions(scores: Scores) -> dict[str, Histogram]:
    """Count the values of every score; NaN, which marks what is set aside, is not counted."""
    names = scores.names
    found = {name: Histogram.zero() for name in names}
    for shard in range(scores.shards):
        for name, values in zip(names, scores.read_shard(shard, *names), strict=True):
            found[name] += Histogram.of(values)
    return found


def spread(scores: Scores, name: str, bins: int) -> tuple[Int64[np.ndarray, "bins"], Float64[np.ndarray, "bins+1"]]:
    """Count the values of one score in bins of equal width from the least to the largest; give their edges, too."""
    low, high = math.inf, -math.inf
    for shard in range(scores.shards):
        (values,) = scores.read_shard(shard, name)
        low, high = np.fmin.reduce(values, initial=low), np.fmax.reduce(values, initial=high)
    if not low <= high:
        return np.zeros(bins, np.int64), np.linspace(0.0, 1.0, bins + 1)
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    counts = np.zeros(bins, np.int64)
    for shard in range(scores.shards):
        (values,) = scores.read_shard(shard, name)
        counts += np.histogram(values[~np.isnan(values)].astype(np.float64), edges)[0]
    return counts, edges


def top_list(scores: Scores, name: str, size: int, histogram: Histogram) -> TopK:
    """Find the `size` rows of largest score, best first.

    The histogram tells beforehand which values can be in the list, so that each shard gives only those and hardly any
    list is merged.
    """
    if size == 0:
        return TopK.zero(0)
    floor = _floor(histogram, size)
    best, rows, kept, waiting = TopK.zero(size), [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], 0
    for shard in range(scores.shards):
        start, stop = scores.bounds(shard)
        values = scores.read(name, start, stop)
        near = np.flatnonzero(values >= floor)
        rows.append(near + start)
        kept.append(values[near])
        waiting += len(near)
        # Where the histogram cannot tell (it knows no negative values), what waits is cut down from time to time.
        if waiting > max(_WAITING, 4 * size):
            best += TopK.of(size, np.concatenate(rows), np.concatenate(kept))
            rows, kept, waiting = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], 0
    return best + TopK.of(size, np.concatenate(rows), np.concatenate(kept))


def _floor(histogram: Histogram, size: int) -> float:
    """Give a value that none of the `size` largest lies below."""
    above = np.cumsum(histogram.counts[::-1])[::-1]
    bins = np.flatnonzero(above >= size)
    # One bin further down, so that rounding at a bin's edge cannot lose a value.
    lowest = int(bins[-1]) - 1 if bins.size else 0
    return float(Histogram.edges()[lowest]) if lowest > 0 else -math.inf


def ranks(scores: Scores, name: str, values: Shaped[np.ndarray, "m"]) -> Int64[np.ndarray, "m"]:
    """Give the rank of each value among all scored spectra: 1 + the number of larger scores; 0 of NaN."""
    larger = np.zeros(len(values), np.int64)
    for shard in range(scores.shards):
        known = scores.read(name, *scores.bounds(shard))
        known = np.sort(known[~np.isnan(known)])
        larger += len(known) - np.searchsorted(known, values, side="right")
    return np.where(np.isnan(values), 0, larger + 1)


def overlap(tops: Mapping[str, TopK]) -> Float64[np.ndarray, "k k"]:
    """Give the share of each list (row) that also is in each other one (column); lists are of equal length."""
    lists = [top.rows for top in tops.values()]
    shares = np.ones((len(lists), len(lists)))
    for first, mine in enumerate(lists):
        for second, other in enumerate(lists):
            shares[first, second] = np.isin(mine, other).mean() if len(mine) else np.nan
    return shares
