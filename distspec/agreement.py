"""How far lists of anomalies agree, what they lean towards, and how detectors join to one: mathematics, no files.

Two lists of g1 and g2 rows, drawn at random from the same n anomalies, share k rows with the chance P(k | n) =
C(g1, k) C(n - g1, g2 - k) / C(n, g2) of mean g1 g2 / n, so the overlap of two detectors tells how many there are.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf 2021, Astronomy and Computing: eqs. 1 and A.3, figs. 2 and 3.
    Chapman 1951, Univ. California Publ. Statistics 1, 131: an estimate from one overlap that is free of bias.
    Darroch 1958, Biometrika 45, 343: the likelihood of n from several lists depends on their distinct rows alone.
    Efron & Stein 1981, Annals of Statistics 9, 586: the jackknife's variance is not too small.
    Holm 1979, Scandinavian Journal of Statistics 6, 65.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from scipy import special, stats

__all__ = [
    "ASSUMPTION",
    "Concentration",
    "Estimate",
    "Group",
    "Joint",
    "Survivors",
    "Uniformity",
    "concentration",
    "curve",
    "estimate",
    "holm",
    "joint",
    "log_probability",
    "overlaps",
    "rank_mean",
    "rank_union",
    "spread_of_overlap",
    "uniformity",
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


class _Plain:
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for what is unknown."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, _Plain):
        return value.to_dict()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


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


def spread_of_overlap(n: int, g1: int, g2: int) -> tuple[float, float]:
    """Give mean and standard deviation of the overlap of two lists drawn at random from n; exact for any n."""
    if not 0 <= min(g1, g2) <= max(g1, g2) <= n or n < 1:
        raise ValueError(f"lists of {g1} and {g2} rows from {n}; expected none longer than what it is drawn from")
    return g1 * g2 / n, math.sqrt(g1 * g2 / n * (1 - g1 / n) * (n - g2) / max(n - 1, 1))


@dataclass(frozen=True)
class Estimate(_Plain):
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


def log_probability(k: int, n: int, g1: int, g2: int) -> float:
    """Give log P(k | n, g1, g2); -inf where no such draws exist."""
    if max(g1, g2) > n or not max(0, g1 + g2 - n) <= k <= min(g1, g2):
        return -math.inf
    ways = special.gammaln(np.array([g1, g2, k, g1 - k, g2 - k]) + 1.0)
    return float(ways @ [1, 1, -1, -1, -1]) + _Likelihood.of_pairs(np.array([[g1, k], [k, g2]])).value(n)


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
class Joint(_Plain):
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


@dataclass(frozen=True, eq=False)
class Uniformity(_Plain):
    """Whether a list is spread over the ranks of a property as the survey is.

    Arguments:
        distance: Kolmogorov-Smirnov: largest difference between the two distribution functions.
        p: chance of such a distance for a random list; larger than the true one where values are tied.
        critical: distance that a random list exceeds in 5 % of cases (Stephens 1970; to 0.3 % from five members on).
        mean: share of the survey below a member, on average: 0.5 for a random list, more if it leans to large values.
        counts: members in ten parts of the survey, as equal as can be, from the smallest values; members of tied
            values are shared out, so these need not be whole.
        expected: counts of a random list.
        sd: of the counts of a random list (hypergeometric; less where values are tied).
    """

    distance: float
    p: float
    critical: float
    mean: float
    counts: Float64[np.ndarray, "10"]
    expected: Float64[np.ndarray, "10"]
    sd: Float64[np.ndarray, "10"]


def uniformity(ranks: Int64[np.ndarray, "m"], total: int, equal: Int64[np.ndarray, "m"] | None = None) -> Uniformity:
    """Test the ranks that a list's members have in a property against uniform ones.

    The distribution functions are compared where the property has values, never within ties: an order of tied spectra
    that is made up could look like a bias of its own.

    Arguments:
        ranks: for each member the number of spectra of smaller value, 0 to total - 1.
        total: spectra of which the property is known.
        equal: for each member the number of spectra of its value, itself among them; None where no two are equal.

    Raises:
        ValueError: there are no ranks, they are not integers, or cannot be those of distinct spectra.
    """
    equal = np.ones_like(ranks) if equal is None else equal
    if not len(ranks) or ranks.dtype.kind != "i" or equal.dtype.kind != "i":
        raise ValueError(f"{len(ranks)} ranks of {ranks.dtype}; expected whole numbers, at least one")
    size, ordered = len(ranks), np.sort(ranks)
    below, upto = (np.searchsorted(ordered, ranks, side) for side in ("left", "right"))
    if ranks.min() < 0 or (ranks + equal).max() > total or (upto - below > equal).any():
        raise ValueError(f"ranks {ordered[0]} to {ordered[-1]} of {total}; expected distinct ones, or `equal` for ties")
    distance = max(np.abs(below / size - ranks / total).max(), np.abs(upto / size - (ranks + equal) / total).max())
    edges = np.arange(11) * total // 10
    inside = np.minimum((ranks + equal)[:, None], edges[1:]) - np.maximum(ranks[:, None], edges[:-1])
    expected, sd = np.array([spread_of_overlap(total, int(width), size) for width in np.diff(edges)]).T
    p, critical = float(stats.kstwo.sf(distance, size)), 1.3581 / (size**0.5 + 0.12 + 0.11 / size**0.5)
    mean, counts = ((ranks + equal / 2) / total).mean(), (np.maximum(inside, 0) / equal[:, None]).sum(axis=0)
    return Uniformity(float(distance), p, critical, float(mean), counts, expected, sd)


def holm(p: Float[np.ndarray, "m"], tests: int | None = None) -> Float64[np.ndarray, "m"]:
    """Correct p-values for the number of tests (Holm), whatever the dependence between them.

    Arguments:
        p: over properties and detectors, say; NaN marks a test that was not made.
        tests: made in all, those left out of `p` having found nothing; None for those in `p`.

    Raises:
        ValueError: a value is not in 0 to 1, or there are fewer tests than values.
    """
    values = p[~np.isnan(p)].astype(np.float64)
    count = len(values) if tests is None else tests
    if ((values < 0) | (values > 1)).any() or count < len(values):
        raise ValueError(f"{len(values)} p-values of {count} tests; expected values in 0 to 1, and a test for each")
    order, found = np.argsort(p, kind="stable"), np.full(len(p), np.nan)  # NaN comes last
    raised = np.maximum.accumulate(np.sort(values) * (count - np.arange(len(values))))
    found[order[: len(values)]] = np.minimum(raised, 1.0)
    return found


@dataclass(frozen=True)
class Group(_Plain):
    """Members of a list that share a label (a plate, say), how many a random list has, and the corrected p."""

    label: str | int
    members: int
    expected: float
    p: float


@dataclass(frozen=True)
class Concentration(_Plain):
    """Whether members of a list come together on few plates, fibres, exposures or files.

    Arguments:
        p: chance of the largest excess on any label; 1 where no label has two members.
        labels: of the survey: tests that p is corrected for.
        largest: excess, significant or not; None where no label has two members.
        groups: labels that hold too many members, smallest p first.
    """

    p: float
    labels: int
    largest: Group | None
    groups: tuple[Group, ...]


def concentration(
    members: Shaped[np.ndarray, "m"],
    labels: Shaped[np.ndarray, "c"],
    counts: Int64[np.ndarray, "c"],
    limit: float = 0.01,
) -> Concentration:
    """Find labels that more members of a list share than chance brings.

    A label of two members or more has the exact hypergeometric chance of at least so many, corrected (Holm) for all
    labels of the survey: any could have been found. The smallest p is the test of the list as a whole, too: with few
    members expected on a label chi-squared does not hold, and no Monte Carlo reaches the p of a planted group.

    Arguments:
        members: label of each member; text or integers.
        labels: all labels of the survey, each once, in any order.
        counts: spectra of the survey with each label.
        limit: corrected p below which a group is named.

    Raises:
        ValueError: labels are floats or occur twice, or the survey lacks one, or has fewer spectra of it than the list.
    """
    if not labels.dtype.kind == members.dtype.kind in "iuU":
        raise ValueError(f"labels {members.dtype} in {labels.dtype}; expected both to be text, or both integers")
    order = np.argsort(labels, kind="stable")
    labels, counts = labels[order], counts[order]
    seen, held = np.unique(members, return_counts=True)
    place = np.searchsorted(labels, seen)
    known = place < len(labels)
    known[known] = labels[place[known]] == seen[known]
    if (labels[1:] == labels[:-1]).any() or not known.all() or (held > counts[place]).any():
        raise ValueError(f"{len(labels)} labels for {len(members)} members; expected each label once, with its count")
    several = held >= 2
    seen, held, place = seen[several], held[several], place[several]
    size, total = len(members), int(counts.sum())
    chance = stats.hypergeom.sf(held - 1, total, counts[place], size)
    columns = (seen, held, counts[place] * size / total, holm(chance, len(labels)))
    order = np.argsort(chance, kind="stable")
    groups = tuple(Group(*facts) for facts in zip(*(column[order].tolist() for column in columns), strict=True))
    significant = tuple(group for group in groups if group.p < limit)
    return Concentration(groups[0].p if groups else 1.0, len(labels), groups[0] if groups else None, significant)


def _checked(shares: Float32[np.ndarray, "n k"]) -> Float32[np.ndarray, "n k"]:
    unknown = np.isnan(shares)
    gaps = unknown.any(axis=1) & ~unknown.all(axis=1)
    if gaps.any() or ((shares <= 0) | (shares > 1)).any() or not shares.shape[1]:
        raise ValueError(
            f"{shares.shape} shares, NaN of some detectors in {gaps.sum()} rows; expected 0 < share <= 1 or NaN of all"
        )
    return shares


def rank_mean(shares: Float32[np.ndarray, "n k"]) -> Float32[np.ndarray, "n"]:
    """Join detectors by the mean of ranks: -log10 of the mean share.

    Odder is higher, in the order of 1 - mean; of tens of millions of spectra float32 keeps the top apart near 0, not 1.

    Arguments:
        shares: of the survey that is at least as odd, r/n by each detector with r = 1 the oddest; NaN where not scored.

    Raises:
        ValueError: a share is outside 0 to 1, or one detector has none where another has.
    """
    return np.asarray(-np.log10(_checked(shares).mean(axis=1, dtype=np.float64)), np.float32)


def rank_union(shares: Float32[np.ndarray, "n k"]) -> Float32[np.ndarray, "n"]:
    """Join detectors so that a top list is the union of theirs: -log10 of the least share; see `rank_mean`."""
    return np.asarray(-np.log10(_checked(shares).min(axis=1).astype(np.float64)), np.float32)


def _bins(edges: Float32[np.ndarray, "edges"], values: Float32[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    return np.searchsorted(edges, values, "left") + np.searchsorted(edges, values, "right")


@dataclass(frozen=True, eq=False)
class Survivors:
    """Distribution of a score over the survey, as counts at and between thresholds; merged with `+`.

    Arguments:
        edges: thresholds, ascending: distinct values of a sample and all of the top, which may be infinite.
        counts: of values below the first edge, equal to it, between it and the second, and so on; without NaN.
    """

    edges: Float32[np.ndarray, "edges"]
    counts: Int64[np.ndarray, "bins"]

    @classmethod
    def count(cls, edges: Float32[np.ndarray, "edges"], values: Float32[np.ndarray, "n"]) -> "Survivors":
        """Count a batch."""
        if not (edges[1:] > edges[:-1]).all() or np.isnan(edges).any():
            raise ValueError(f"{len(edges)} edges; expected them ascending, each once, none NaN (numpy.unique)")
        bins = _bins(edges, values[~np.isnan(values)])
        return cls(edges, np.bincount(bins, minlength=2 * len(edges) + 1).astype(np.int64))

    def __add__(self, other: "Survivors") -> "Survivors":
        if not np.array_equal(self.edges, other.edges):
            raise ValueError(f"{len(self.edges)} and {len(other.edges)} edges differ; expected counts at the same ones")
        return Survivors(self.edges, self.counts + other.counts)

    def shares(self, values: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
        """Give the share r/n of the survey at least as odd as each value; ties have their middle rank; NaN stays NaN.

        It is exact for values that are edges, and linear in between. Beyond the outermost edges, or towards an infinite
        one, all have the middle rank of what lies there.
        """
        bins = _bins(self.edges, values)
        above, held = self.counts[::-1].cumsum()[::-1][bins] - self.counts[bins], self.counts[bins]
        ends = np.concatenate([[-np.inf], self.edges.astype(np.float64), [np.inf]])
        low, high = ends[bins // 2], ends[bins // 2 + 1]
        inside = (bins % 2 == 0) & np.isfinite(low) & np.isfinite(high)
        with np.errstate(invalid="ignore"):
            below = np.where(inside, (high - values) / np.where(inside, high - low, 1.0), 0.5)
        rank = np.where(np.isnan(values), np.nan, above + below * held + 0.5)
        total = int(self.counts.sum())
        return np.asarray(np.minimum(rank / total, 1.0) if total else np.full(len(values), np.nan), np.float32)
