"""All scores of a store side by side, whichever layers they lie in: those of a model, of detectors, of ensembles."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from distspec.errors import LayoutError
from distspec.statistics.summaries import Histogram, TopK
from distspec.store import Layer

__all__ = [
    "Scores",
    "distributions",
    "joined_scores",
    "linear_histogram",
    "list_length",
    "overlap",
    "ranks",
    "score_names",
    "top_list",
]


def score_names(layer: Layer) -> list[str]:
    """Name the scores of a layer: what it says itself, else its fields that hold one number per row."""
    named = layer.attributes.get("scores")
    return list(named) if named else [name for name, (_, shape) in layer.fields.items() if shape == ()]


def joined_scores(wanted: Sequence[str], scores: "Scores") -> list[str]:
    """Name the scores that are compared and joined to ensembles: those wanted, else one or a few of each kind."""
    if wanted:
        return list(dict.fromkeys(wanted))
    # The first score of a detector bears its name; others of its layer are variants.
    detectors = [score_names(layer)[0] for layer in scores.layers if "detector" in layer.attributes]
    return [*(name for name in ("chi2", "mse", "density") if name in scores.names), *detectors]


class Scores:
    """Scores of the same rows from several layers, read by shard as from one.

    Arguments:
        layers: over all rows of one store; every score's name is its own.

    Raises:
        LayoutError: the layers have other rows or shards, or a score comes twice.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self._of: dict[str, Layer] = {}
        self._lost: Int64[np.ndarray, "l"] | None = None
        for layer in self.layers:
            first = self.layers[0]
            if (layer.parts, layer.shard_rows) != (first.parts, first.shard_rows):
                raise LayoutError(
                    f"{layer.name} has {layer.rows} rows, {first.name} has {first.rows}; run `distspec score` and "
                    "`distspec detect` on this store"
                )
            for name in score_names(layer):
                if name in self._of:
                    raise LayoutError(f"score {name!r} is in {self._of[name].name} and in {layer.name}; name one anew")
                self._of[name] = layer

    @property
    def names(self) -> list[str]:
        """Names of the scores, layer by layer."""
        return list(self._of)

    @property
    def rows(self) -> int:
        """Number of spectra, those set aside included."""
        return self.layers[0].rows if self.layers else 0

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.layers[0].shards if self.layers else 0

    @property
    def key(self) -> tuple[str, ...]:
        """What names these scores: those of their layers."""
        return tuple(layer.name for layer in self.layers)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Give the first row of a shard and one past its last."""
        return self.layers[0].bounds(shard)

    def layer(self, name: str) -> Layer:
        """Give the layer that a score lies in."""
        if name not in self._of:
            raise LayoutError(f"no score {name!r}; there are {', '.join(self._of)}")
        return self._of[name]

    def only(self, names: Iterable[str]) -> "Scores":
        """Give some of the scores, in the order named."""
        chosen = Scores([])
        chosen._of = {name: self.layer(name) for name in names}
        chosen.layers = list(dict.fromkeys(chosen._of.values()))
        return chosen

    def read(self, name: str, start: int, stop: int) -> Float32[np.ndarray, "n"]:
        """Read one score of a run of rows; NaN for what is set aside, by ingest or in any of these scores."""
        return self._without_lost(self.layer(name).read(name, start, stop), np.arange(start, stop))

    def read_shard(self, shard: int, *names: str) -> tuple[Shaped[np.ndarray, "n"], ...]:
        """Read some scores of one shard."""
        start, stop = self.bounds(shard)
        return tuple(self.read(name, start, stop) for name in names)

    def given_up(self) -> dict[int, str]:
        """Give the usable rows that one of the layers has no scores of, with the layer, and why."""
        return {row: f"{layer.name}: {why}" for layer in self.layers for row, why in layer.given_up().items()}

    def take(self, name: str, rows: Int64[np.ndarray, "m"]) -> Float32[np.ndarray, "m"]:
        """Read one score of single rows, in the order given."""
        return self._without_lost(self.layer(name).take(name, rows), rows)

    def _without_lost(self, values: Float32[np.ndarray, "m"], rows: Int64[np.ndarray, "m"]) -> Float32[np.ndarray, "m"]:
        if self._lost is None:
            self._lost = np.array(list(self.given_up()), np.int64)
        lost = np.isin(rows, self._lost) if self._lost.size else np.zeros(0, bool)
        return np.where(lost, np.float32(np.nan), values) if lost.any() else values

    def __repr__(self) -> str:
        return f"Scores({', '.join(self._of)}: {self.rows} rows)"


_WAITING: Final = 1_000_000
"""Values that are held before a list is cut to its length."""


def list_length(scored: int, fraction: float) -> int:
    """Give the length of the top list that holds this share of the scored spectra, at least one if there are any.

    Example:
        >>> list_length(1001, 0.01), list_length(3, 0.01), list_length(0, 0.01)
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


def linear_histogram(
    scores: Scores, name: str, bins: int
) -> tuple[Int64[np.ndarray, "bins"], Float64[np.ndarray, "bins+1"]]:
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
