"""How many anomalies there are, from what lists of them share.

Two lists of g1 and g2 rows, drawn at random from the same n anomalies, share k rows with the chance P(k | n) =
C(g1, k) C(n - g1, g2 - k) / C(n, g2) of mean g1 g2 / n, so the overlap of two detectors tells how many there are.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf 2021, Astronomy and Computing: eqs. 1 and A.3, fig. 2.
    Chapman 1951, Univ. California Publ. Statistics 1, 131: an estimate from one overlap that is free of bias.
    Darroch 1958, Biometrika 45, 343: the likelihood of n from several lists depends on their distinct rows alone.
    Efron & Stein 1981, Annals of Statistics 9, 586: the jackknife's variance is not too small.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from scipy import stats

from distspec.statistics.plain import Plain

__all__ = [
    "ASSUMPTION",
    "Estimate",
    "Joint",
    "curve",
    "estimate",
    "joint",
    "overlap_moments",
    "overlaps",
]

ASSUMPTION = (
    "lists are taken as uniform draws from one pool of anomalies: a bias that detectors share makes n too small, "
    "opposite biases and false positives make it too large"
)
"""To be printed beside every n."""

Lists = Mapping[str, Int64[np.ndarray, "_"]]
"""Rows by the name of the detector that lists them."""

Interval = tuple[int, int | None]
"""Least and largest n; None where there is no upper end."""


def _members(lists: Lists) -> Int64[np.ndarray, "k rows"]:
    """Tell for each list which of all distinct rows it holds: 1 or 0."""
    for name, rows in lists.items():
        if rows.dtype.kind != "i" or len(np.unique(rows)) < rows.size:
            raise ValueError(f"list {name!r} of {rows.size} {rows.dtype}; expected whole row numbers, each once")
    owner = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists.values()])
    distinct, column = np.unique(np.concatenate([np.zeros(0, np.int64), *lists.values()]), return_inverse=True)
    found = np.zeros((len(lists), len(distinct)), np.int64)
    found[owner, column] = 1
    return found


def overlaps(lists: Lists) -> Int64[np.ndarray, "k k"]:
    """Count the rows that each pair of lists shares; the diagonal holds the lengths.

    Raises:
        ValueError: a list holds a row twice, or its rows are not integers.
    """
    found = _members(lists)
    return np.asarray(found @ found.T)


def overlap_moments(n: int, g1: int, g2: int) -> tuple[float, float]:
    """Give mean and standard deviation of the overlap of two lists drawn at random from n; exact for any n."""
    if not 0 <= min(g1, g2) <= max(g1, g2) <= n or n < 1:
        raise ValueError(f"lists of {g1} and {g2} rows from {n}; expected none longer than what it is drawn from")
    return g1 * g2 / n, math.sqrt(g1 * g2 / n * (1 - g1 / n) * (n - g2) / max(n - 1, 1))


@dataclass(frozen=True)
class Estimate(Plain):
    """Number of anomalies n from what lists share, resting on `ASSUMPTION`.

    Arguments:
        shared: overlap of a pair, or its sum over pairs; of lists as a whole, the repeats among all their rows.
        n: the most likely, the smaller of two that are equally so; None where nothing is shared.
        within68: the n whose log likelihood is at most 0.5 below the largest. Where nothing is shared, from the least n
            that leaves this a chance of 32 %, one-sided.
        within95: the same for 1.92 and 5 %.
        chapman: (g1 + 1)(g2 + 1)/(k + 1) - 1 of one pair, free of bias where g1 + g2 >= n; None for several.
    """

    shared: int
    n: int | None
    within68: Interval
    within95: Interval
    chapman: float | None = None


@dataclass(frozen=True, eq=False)
class _Likelihood:
    """log L(n) = Σ w log (n)_m up to a constant, (n)_m = n (n-1) ... (n-m+1).

    Of a pair P(k | n) ∝ (n)_u / ((n)_g1 (n)_g2), where u = g1 + g2 - k rows are in either list. There is one maximum:
    log L(n) - log L(n-1) is a power series in 1/n whose coefficients change sign once at most, as every m of weight +1
    is at least as large as those of weight -1. (Of pairs of unequal lists: also if each k < 0.58 of the shorter.)
    """

    sizes: Int64[np.ndarray, "terms"]
    weights: Int64[np.ndarray, "terms"]

    @classmethod
    def of_pairs(cls, shared: Int64[np.ndarray, "k k"]) -> "_Likelihood":
        """Multiply the likelihoods of all pairs, from their overlaps."""
        first, second = np.triu_indices(len(shared), 1)
        g1, g2 = shared[first, first], shared[second, second]
        return cls(np.concatenate([g1 + g2 - shared[first, second], g1, g2]), np.repeat([1, -1, -1], len(first)))

    def value(self, n: int) -> float:
        """Give log L(n); of pairs that share nothing it needs no constant to be the logarithm of a chance."""
        # log (n)_m = m log n + Σ log(1 - i/n) over i < m. Differences of log-gamma lose their digits at large n.
        partial = np.concatenate([[0.0], np.cumsum(np.log1p(np.arange(self.sizes.max()) / -n))])
        return float(self.weights @ partial[self.sizes]) + int(self.weights @ self.sizes) * math.log(n)

    def rises(self, n: int) -> bool:
        """Whether L(n) > L(n-1); a difference of the size of rounding errors is none."""
        logs = np.log1p(self.sizes / -n)
        return float(-self.weights @ logs) > 2**-50 * float(np.abs(logs).sum())

    def peak(self, least: int, most: int | None) -> int | None:
        """Find the most likely n >= least; None where the likelihood rises for ever."""
        if int(self.weights @ self.sizes) == 0:
            return None
        n = _first(least, lambda n: not self.rises(n + 1))
        return n if most is None else min(n, most)

    def estimate(self, least: int, most: int | None, chapman: float | None = None) -> Estimate:
        """Find the most likely n and its intervals, exact to the integer."""
        if most is not None and most < least:
            raise ValueError(f"{least} distinct rows listed of {most} spectra; expected no more rows than spectra")
        n = self.peak(least, most)
        levels = [math.log(p) if n is None else self.value(n) - drop for drop, p in ((0.5, 0.32), (1.92, 0.05))]
        first, second = (self._within(level, least, n, most) for level in levels)
        return Estimate(-int(self.weights @ self.sizes), n, first, second, chapman)

    def _within(self, level: float, least: int, n: int | None, most: int | None) -> Interval:
        low, high = _first(least, lambda m: self.value(m) >= level, n), most
        if n is not None and (most is None or self.value(most) < level):
            high = _first(n, lambda m: self.value(m) < level) - 1
        return low if most is None else min(low, most), high


def _first(low: int, holds: Callable[[int], bool], high: int | None = None) -> int:
    """Find by bisection the least integer from `low` for which a condition holds; it is known to hold at `high`."""
    step = 1 if high is None else high - low
    while high is None and not holds(low + step):
        step *= 2
    return low + bisect_left(range(low, low + step), True, key=holds)


def estimate(k: int, g1: int, g2: int, most: int | None = None) -> Estimate:
    """Estimate the number of anomalies from the k rows that two lists of g1 and g2 rows share.

    Arguments:
        most: spectra in the survey, which n cannot exceed; None for no limit.

    Raises:
        ValueError: no two such lists exist.

    Example:
        >>> estimate(20, 500, 500).n, estimate(20, 500, 500).within68
        (12499, (10173, 15637))
    """
    if not 0 <= k <= min(g1, g2) or max(g1, g2) < 1:
        raise ValueError(f"lists of {g1} and {g2} rows that share {k}; expected 0 <= shared <= the shorter length")
    likelihood = _Likelihood.of_pairs(np.array([[g1, k], [k, g2]]))
    return likelihood.estimate(g1 + g2 - k, most, (g1 + 1) * (g2 + 1) / (k + 1) - 1)


@dataclass(frozen=True, eq=False)
class Joint(Plain):
    """Number of anomalies from all lists at once, with intervals of three kinds.

    Arguments:
        names: of the lists.
        overlaps: rows that each pair shares; the diagonal holds the lengths.
        mean: overlap of a pair, on average.
        distinct: rows that are in any list.
        pairs: from Σ log P(k_ij | n), as if pairs were independent. They are not, as each list is in several, though
            under `ASSUMPTION` they are uncorrelated.
        whole: from the likelihood of all lists together, in which nothing but `ASSUMPTION` is assumed.
        without: n of `pairs` when the list of this name is left out; None where the others share nothing.
        methods68: jackknife over lists, in 1/n: how far n depends on the choice of detectors. The honest one where they
            differ, which the others cannot see; too wide where they do not. None of two lists, or with nothing shared.
        methods95: the same at 95 %.
    """

    names: tuple[str, ...]
    overlaps: Int64[np.ndarray, "k k"]
    mean: float
    distinct: int
    pairs: Estimate
    whole: Estimate
    without: dict[str, int | None]
    methods68: Interval | None
    methods95: Interval | None


def joint(lists: Lists, most: int | None = None) -> Joint:
    """Estimate the number of anomalies from all pairs of lists.

    Arguments:
        most: spectra in the survey, which n cannot exceed; None for no limit.

    Raises:
        ValueError: fewer than two lists, an empty one, a row twice in a list, or more distinct rows than spectra.
    """
    found = _members(lists)
    if len(lists) < 2 or not found.any(axis=1).all():
        raise ValueError(f"lists of {[len(rows) for rows in lists.values()]} rows; expected two or more, none empty")
    shared, distinct = found @ found.T, found.shape[1]
    pairs = _Likelihood.of_pairs(shared).estimate(distinct, most)
    whole = _Likelihood(np.append(distinct, np.diag(shared)), np.append(1, np.full(len(lists), -1)))
    without: dict[str, int | None] = {}
    for place, name in enumerate(lists if len(lists) > 2 else ()):
        others = np.delete(found, place, axis=0)
        without[name] = _Likelihood.of_pairs(others @ others.T).peak(int(others.any(axis=0).sum()), most)
    methods = [_jackknife(pairs.n, list(without.values()), level, distinct, most) for level in (0.6827, 0.95)]
    mean = float(shared[np.triu_indices(len(lists), 1)].mean())
    return Joint(tuple(lists), shared, mean, distinct, pairs, whole.estimate(distinct, most), without, *methods)


def _jackknife(n: int | None, without: list[int | None], level: float, least: int, most: int | None) -> Interval | None:
    """Give the interval of n from the estimates without each list, with Student's t.

    1/n is linear in the overlaps, near to symmetric, and 0 where nothing is shared.
    """
    if n is None or len(without) < 3:
        return None
    inverse = np.array([0.0 if other is None else 1 / other for other in without])
    reach = float(stats.t.ppf(0.5 + level / 2, len(without) - 1)) * math.sqrt((len(without) - 1) * inverse.var())
    low = min(n, max(least, math.ceil(1 / (1 / n + reach))))
    high = max(n, math.floor(1 / (1 / n - reach))) if reach < 1 / n else most
    return low, high if most is None or high is None else min(high, most)


def curve(ranked: Lists, sizes: Sequence[int], most: int | None = None) -> dict[int, Joint]:
    """Estimate n from the first g rows of each list, best first, for all sizes g up to the shortest length: n(g)."""
    longest = min((len(rows) for rows in ranked.values()), default=0)
    kept = sorted({size for size in sizes if 1 <= size <= longest})
    return {size: joint({name: rows[:size] for name, rows in ranked.items()}, most) for size in kept}
