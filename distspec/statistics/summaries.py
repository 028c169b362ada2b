"""Summaries that add up: the answer does not depend on how the rows were cut or in which order parts arrive.

Each summary has an empty value, is made from a batch, and is merged with `+`. `Sums` and `Selection` are exact: their
results are equal in every bit whatever the cut. `row_median` and `row_mean` reduce the other axis, so need no merging.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped, UInt32

__all__ = [
    "TABLE_ROWS",
    "Batch",
    "Histogram",
    "Moments",
    "Selection",
    "Sums",
    "TopK",
    "quantile",
    "quantile_ranks",
    "row_mean",
    "row_median",
]

Batch = tuple[Float32[np.ndarray, "n columns"], Bool[np.ndarray, "n columns"]]
"""Values, and which of them count."""

TABLE_ROWS = ("mean", "std", "min", "25 %", "50 %", "75 %", "max")
"""Of a table of errors, in their order."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted count, mean and sum of squared deviations per column, ignoring what has no weight.

    Merged by the parallel update of Chan, Golub & LeVeque (1979), which does not cancel as sums of squares do.
    """

    weight: Float64[np.ndarray, "columns"]
    mean: Float64[np.ndarray, "columns"]
    deviation: Float64[np.ndarray, "columns"]

    @classmethod
    def zero(cls, columns: int) -> "Moments":
        """Give the moments of no rows."""
        return cls(*(np.zeros(columns) for _ in range(3)))

    @classmethod
    def of(cls, values: Shaped[np.ndarray, "n columns"], good: Shaped[np.ndarray, "n columns"]) -> "Moments":
        """Summarize a batch; entries where `good` is False do not count, whatever they hold."""
        weight = good.sum(axis=0).astype(np.float64)
        clean = np.where(good, values, 0.0).astype(np.float64)
        mean = np.divide(clean.sum(axis=0), weight, out=np.zeros_like(weight), where=weight > 0)
        return cls(weight, mean, (np.where(good, clean - mean, 0.0) ** 2).sum(axis=0))

    def __add__(self, other: "Moments") -> "Moments":
        weight = self.weight + other.weight
        share = np.divide(other.weight, weight, out=np.zeros_like(weight), where=weight > 0)
        step = other.mean - self.mean
        deviation = self.deviation + other.deviation + step**2 * self.weight * share
        return Moments(weight, self.mean + step * share, deviation)

    @property
    def variance(self) -> Float64[np.ndarray, "columns"]:
        """Population variance; 0 where nothing was counted."""
        return np.asarray(np.divide(self.deviation, self.weight, out=np.zeros_like(self.weight), where=self.weight > 0))


class ByName(dict[Any, Any]):
    """Summaries by name, which are added name by name; a name that one of two lacks is taken from the other."""

    def __add__(self, other: Mapping[Any, Any]) -> "ByName":
        return ByName(self | {name: self[name] + more if name in self else more for name, more in other.items()})


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts in logarithmic bins of fixed edges, so that any two histograms add up.

    Values of zero and below fall in the first bin, values beyond the last edge in the last; NaN is not counted.
    """

    counts: Int64[np.ndarray, "bins"]

    LOW = -6.0
    HIGH = 12.0
    BINS = 720

    @classmethod
    def zero(cls) -> "Histogram":
        """Give the histogram of no values."""
        return cls(np.zeros(cls.BINS, np.int64))

    @classmethod
    def of(cls, values: Shaped[np.ndarray, "n"]) -> "Histogram":
        """Count a batch of values."""
        values = values[~np.isnan(values)].astype(np.float64)
        logs = np.log10(np.clip(values, 10.0**cls.LOW, 10.0**cls.HIGH))
        bins = np.floor((logs - cls.LOW) / (cls.HIGH - cls.LOW) * cls.BINS).astype(np.int64)
        return cls(np.bincount(np.clip(bins, 0, cls.BINS - 1), minlength=cls.BINS).astype(np.int64))

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(self.counts + other.counts)

    @classmethod
    def edges(cls) -> Float64[np.ndarray, "bins+1"]:
        """Give the edges of the bins."""
        return np.asarray(10.0 ** np.linspace(cls.LOW, cls.HIGH, cls.BINS + 1))


@dataclass(frozen=True, eq=False)
class TopK:
    """The k rows of largest score, best first; ties go to the smaller row, so the list is unique."""

    size: int
    rows: Int64[np.ndarray, "k"]
    scores: Shaped[np.ndarray, "k"]

    @classmethod
    def zero(cls, size: int) -> "TopK":
        """Give the empty list of at most `size` rows."""
        return cls(size, np.zeros(0, np.int64), np.zeros(0, np.float32))

    @classmethod
    def of(cls, size: int, rows: Int64[np.ndarray, "n"], scores: Shaped[np.ndarray, "n"]) -> "TopK":
        """Pick the best of a batch; rows whose score is NaN are left out."""
        known = ~np.isnan(scores)
        rows, scores = rows[known], scores[known]
        if len(rows) > size:
            # Everything tied with the k-th score must stay until ties are broken by row.
            threshold = np.partition(scores, len(scores) - size)[len(scores) - size]
            near = scores >= threshold
            rows, scores = rows[near], scores[near]
        order = np.lexsort((rows, -scores))[:size]
        return cls(size, rows[order], scores[order])

    def __add__(self, other: "TopK") -> "TopK":
        size = min(self.size, other.size)
        return TopK.of(size, np.concatenate([self.rows, other.rows]), np.concatenate([self.scores, other.scores]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; rows stay integers."""
        return {"rows": self.rows.tolist(), "scores": [float(score) for score in self.scores]}


@dataclass(frozen=True, eq=False)
class Sums:
    """Exact sums of float32 values per column: integers, one for each binary exponent, so no order of adding matters.

    Exact up to 5e11 values a column; 2 kB for each column.
    """

    count: Int64[np.ndarray, "columns"]
    parts: Int64[np.ndarray, "columns 256"]

    @classmethod
    def of(cls, columns: int, batches: Iterable[Batch]) -> "Sums":
        """Add batches up; entries that are not good do not count, whatever they hold."""
        count, parts = np.zeros(columns, np.int64), np.zeros(columns * 256, np.int64)
        base = np.arange(columns, dtype=np.int64) * 256
        for values, good in batches:
            bits = values.view(np.int32)
            exponent = (bits >> 23) & 255
            # Of denormal numbers (exponent 0) the leading bit is not implied, and their unit is that of exponent 1.
            mantissa = (bits & 0x7FFFFF) | np.where(exponent > 0, 0x800000, 0)
            np.add.at(parts, (base + exponent)[good], np.where(bits < 0, -mantissa, mantissa)[good].astype(np.int64))
            count += good.sum(axis=0)
        return cls(count, parts.reshape(columns, 256))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.count + other.count, self.parts + other.parts)

    @property
    def mean(self) -> Float64[np.ndarray, "columns"]:
        """Mean of each column; NaN where nothing was counted."""
        unit = 2.0 ** (np.maximum(np.arange(256), 1) - 150.0)
        return np.asarray(np.where(self.count > 0, (self.parts * unit).sum(axis=1) / np.maximum(self.count, 1), np.nan))


@dataclass(frozen=True, eq=False)
class Selection:
    """Exact order statistics per column of float32 values too many to hold, found in three passes over them.

    A float32 is mapped to an integer of the same order. Each pass counts the next 11, 11 or 10 bits of the values that
    share the bits found so far with a wanted one, so memory is 8 kB for each column and distinct prefix, whatever the
    number of rows. Infinite values are ordered too; -0 counts as 0.

    Example:
        >>> values, good = np.array([[3.0], [1.0], [2.0]], np.float32), np.ones((3, 1), bool)
        >>> selection = Selection.start(1).count([(values, good)])
        >>> selection = selection.narrow(selection.total // 2 + np.zeros((1, 1), int))  # rank 1 of 0, 1, 2
        >>> while not selection.done:
        ...     selection = selection.count([(values, good)]).narrow()
        >>> selection.values
        array([[2.]], dtype=float32)
    """

    level: int
    total: Int64[np.ndarray, "columns"]
    rank: Int64[np.ndarray, "targets columns"]
    """Rank of each target among the values that share its prefix."""
    slot: Int64[np.ndarray, "targets columns"]
    """Which of the prefixes below is the target's: most targets share theirs, so each is counted once."""
    prefix: UInt32[np.ndarray, "slots columns"]
    counts: UInt32[np.ndarray, "slots columns bins"]

    BITS = (11, 11, 10)
    NO_PREFIX = np.uint32(0xFFFFFFFF)

    @classmethod
    def start(cls, columns: int) -> "Selection":
        """Give the first pass before it has seen a value."""
        nothing = np.zeros((0, columns), np.int64)
        total, prefix = np.zeros(columns, np.int64), np.zeros((1, columns), np.uint32)
        return cls(0, total, nothing, nothing, prefix, np.zeros((1, columns, 0), np.uint32))

    @property
    def done(self) -> bool:
        """Whether the values are known, so that no pass is left."""
        return self.level == len(self.BITS)

    def count(self, batches: Iterable[Batch]) -> "Selection":
        """Give the counts of these batches alone, in this pass; add them up over all batches, then `narrow`."""
        slots, columns = self.prefix.shape
        bits = self.BITS[self.level]
        behind = 32 - sum(self.BITS[: self.level + 1])
        flat = np.zeros((slots, columns << bits), np.uint32)
        total = np.zeros(columns, np.int64)
        base = (np.arange(columns, dtype=np.int64) << bits)[None, :]
        for values, good in batches:
            ordered = _ordered(values)
            index = base + ((ordered >> np.uint32(behind)) & np.uint32((1 << bits) - 1))
            if self.level == 0:
                np.add.at(flat[0], index[good], np.uint32(1))
                total += good.sum(axis=0)
                continue
            leading = ordered >> np.uint32(behind + bits)
            for slot, prefix in enumerate(self.prefix):
                np.add.at(flat[slot], index[good & (leading == prefix)], np.uint32(1))
        return Selection(
            self.level,
            total if self.level == 0 else self.total,
            self.rank,
            self.slot,
            self.prefix,
            flat.reshape(slots, columns, -1),
        )

    def __add__(self, other: "Selection") -> "Selection":
        # A pass that has seen nothing carries no counts, so that it is small where it travels to workers.
        if not self.counts.size or not other.counts.size:
            return self if self.counts.size else other
        total = self.total + other.total if self.level == 0 else self.total
        return Selection(self.level, total, self.rank, self.slot, self.prefix, self.counts + other.counts)

    def narrow(self, ranks: Int64[np.ndarray, "targets columns"] | None = None) -> "Selection":
        """End a pass: find the next bits of each target, and give the empty next pass.

        Arguments:
            ranks: after the first pass, the wanted ranks: 0 is the smallest of the `total` values of a column.
        """
        columns = np.arange(len(self.total))
        rank = self.rank if ranks is None else ranks.astype(np.int64)
        slot = self.slot if ranks is None else np.zeros_like(rank)
        found, left = np.empty(rank.shape, np.uint32), np.empty_like(rank)
        for target in range(len(rank)):
            upto = np.cumsum(self.counts[slot[target], columns], axis=1, dtype=np.uint32)
            digit = np.minimum((upto <= rank[target][:, None]).sum(axis=1), upto.shape[1] - 1)
            before = np.where(digit > 0, upto[columns, digit - 1], 0)
            left[target] = rank[target] - before
            leading = self.prefix[slot[target], columns] << np.uint32(self.BITS[self.level])
            found[target] = leading | digit.astype(np.uint32)
        slot, prefix = _share(found)
        empty = np.zeros((*prefix.shape, 0), np.uint32)
        return Selection(self.level + 1, self.total, left, slot, prefix, empty)

    @property
    def values(self) -> Float32[np.ndarray, "targets columns"]:
        """The wanted values after the last pass; NaN in a column without any value."""
        ordered = self.prefix[self.slot, np.arange(len(self.total))]
        sign = np.uint32(1 << 31)
        bits = np.where(ordered >= sign, ordered ^ sign, ~ordered)
        return np.where(self.total > 0, bits.view(np.float32), np.float32(np.nan))


def _ordered(values: Float32[np.ndarray, "n columns"]) -> UInt32[np.ndarray, "n columns"]:
    """Map float32 to integers of the same order."""
    # Adding 0 turns -0 into 0, so that equal values stay equal.
    bits = (values + np.float32(0)).view(np.uint32)
    flip = (bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31)
    return bits ^ flip


def _share(
    prefix: UInt32[np.ndarray, "targets columns"],
) -> tuple[Int64[np.ndarray, "targets columns"], UInt32[np.ndarray, "slots columns"]]:
    """Find the distinct prefixes of each column, and for each target which of them is its own."""
    columns = np.arange(prefix.shape[1])
    order = np.argsort(prefix, axis=0, kind="stable")
    ordered = np.take_along_axis(prefix, order, axis=0)
    place = np.zeros(prefix.shape, np.int64)
    np.cumsum(ordered[1:] != ordered[:-1], axis=0, out=place[1:])
    slot = np.empty_like(place)
    np.put_along_axis(slot, order, place, axis=0)
    distinct = np.full((int(place.max(initial=0)) + 1, len(columns)), Selection.NO_PREFIX)
    distinct[place, columns] = ordered
    return slot, distinct


def quantile_ranks(total: Int64[np.ndarray, "columns"], quantiles: tuple[float, ...]) -> Int64[np.ndarray, "t columns"]:
    """Give the ranks that `quantile` needs: for each quantile the two order statistics around q (n - 1)."""
    last = np.maximum(total - 1, 0)
    low = [np.floor(q * last).astype(np.int64) for q in quantiles]
    return np.stack([rank for below in low for rank in (below, np.minimum(below + 1, last))])


def quantile(selection: Selection, quantiles: tuple[float, ...]) -> Float32[np.ndarray, "quantiles columns"]:
    """Interpolate linearly between the order statistics of `quantile_ranks`, as numpy does by default."""
    low, high = selection.values[::2].astype(np.float64), selection.values[1::2].astype(np.float64)
    position = np.array(quantiles)[:, None] * np.maximum(selection.total - 1, 0)
    share = position - np.floor(position)
    return np.asarray(low * (1.0 - share) + high * share, np.float32)


def row_median(values: Float[np.ndarray, "n columns"], good: Bool[np.ndarray, "n columns"]) -> Float[np.ndarray, "n"]:
    """Median over the good entries of each row, in float64; NaN where there is none."""
    # numpy's nanmedian loops over rows. Here the bad entries become -inf and +inf in turn, which leaves the middle of
    # the good ones in the middle of the row: the same places for all rows, so that a partition finds them unsorted.
    columns = values.shape[1]
    count = good.sum(axis=1)
    if columns == 0 or not good.any():
        return np.full(len(values), np.nan)
    filled = values
    if count.min() < columns:
        infinity = values.dtype.type(np.inf)
        side = np.where(np.cumsum(~good, axis=1, dtype=np.int32) & 1, infinity, -infinity)
        filled = np.where(good, values, side)
    middle = sorted({max((columns - 3) // 2, 0), (columns - 1) // 2, columns // 2})
    parted = np.partition(filled, middle, axis=1)
    below = (columns - count) // 2
    places = np.stack([below + np.maximum(count - 1, 0) // 2, np.minimum(below + count // 2, columns - 1)], axis=1)
    pair = np.take_along_axis(parted, places, axis=1).astype(np.float64)
    return np.where(count > 0, 0.5 * (pair[:, 0] + pair[:, 1]), np.nan)


def row_mean(values: Float[np.ndarray, "n columns"], good: Bool[np.ndarray, "n columns"]) -> Float[np.ndarray, "n"]:
    """Unweighted mean over the good entries of each row, in float64; NaN where there is none."""
    count = good.sum(axis=1)
    total = np.where(good, values, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
