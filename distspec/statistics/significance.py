"""What a list leans towards: ranks of a property against uniform ones, labels that come too often, many tests at once.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf 2021, Astronomy and Computing: fig. 3.
    Holm 1979, Scandinavian Journal of Statistics 6, 65.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped
from scipy import stats

from distspec.statistics.overlap import overlap_moments
from distspec.statistics.plain import Plain

__all__ = ["Concentration", "Group", "Uniformity", "concentration", "holm", "uniformity"]


@dataclass(frozen=True, eq=False)
class Uniformity(Plain):
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
    expected, sd = np.array([overlap_moments(total, int(width), size) for width in np.diff(edges)]).T
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
class Group(Plain):
    """Members of a list that share a label (a plate, say), how many a random list has, and the corrected p."""

    label: str | int
    members: int
    expected: float
    p: float


@dataclass(frozen=True)
class Concentration(Plain):
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
