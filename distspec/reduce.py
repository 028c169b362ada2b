"""Summaries that add up: the answer does not depend on how the rows were cut or in which order parts arrive.

Each summary has an empty value, is made from a batch, and is merged with `+`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Shaped

__all__ = ["Histogram", "Moments", "TopK"]


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
