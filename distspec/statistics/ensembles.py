"""How detectors join to one: by the ranks of their scores, whatever their units.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf 2021, Astronomy and Computing.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

__all__ = ["SurvivalFunction", "rank_mean", "rank_union"]


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
class SurvivalFunction:
    """Distribution of a score over the survey, as counts at and between thresholds; merged with `+`.

    Arguments:
        edges: thresholds, ascending: distinct values of a sample and all of the top, which may be infinite.
        counts: of values below the first edge, equal to it, between it and the second, and so on; without NaN.
    """

    edges: Float32[np.ndarray, "edges"]
    counts: Int64[np.ndarray, "bins"]

    @classmethod
    def count(cls, edges: Float32[np.ndarray, "edges"], values: Float32[np.ndarray, "n"]) -> "SurvivalFunction":
        """Count a batch."""
        if not (edges[1:] > edges[:-1]).all() or np.isnan(edges).any():
            raise ValueError(f"{len(edges)} edges; expected them ascending, each once, none NaN (numpy.unique)")
        bins = _bins(edges, values[~np.isnan(values)])
        return cls(edges, np.bincount(bins, minlength=2 * len(edges) + 1).astype(np.int64))

    def __add__(self, other: "SurvivalFunction") -> "SurvivalFunction":
        if not np.array_equal(self.edges, other.edges):
            raise ValueError(f"{len(self.edges)} and {len(other.edges)} edges differ; expected counts at the same ones")
        return SurvivalFunction(self.edges, self.counts + other.counts)

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
