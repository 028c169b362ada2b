"""All scores of a store side by side, whichever layers they lie in: those of a model, of detectors, of ensembles."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final, Protocol

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from distspec.errors import LayoutError
from distspec.statistics.summaries import ByName, Histogram, TopK
from distspec.store import Layer

__all__ = [
    "Fold",
    "Scores",
    "distributions",
    "fold_here",
    "joined_scores",
    "linear_histogram",
    "list_length",
    "overlap",
    "ranks",
    "score_names",
    "top_list",
    "top_lists",
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


class Fold(Protocol):
    """Adds up what work gives for each of some items, in their order; `runtime.passes.folding` does it in workers."""

    def __call__(
        self, factory: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Any], label: str = ""
    ) -> Any:
        """Give the sum; None of no items."""
        ...


def fold_here(factory: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Any], label: str = "") -> Any:
    """Add up in this process."""
    work = factory(*arguments)
    return reduce(add, (work(item) for item in items)) if items else None


def list_length(scored: int, fraction: float) -> int:
    """Give the length of the top list that holds this share of the scored spectra, at least one if there are any.

    Example:
        >>> list_length(1001, 0.01), list_length(3, 0.01), list_length(0, 0.01)
        (11, 1, 0)
    """
    # The product of a share and a whole number may lie a rounding error above a whole number.
    return min(scored, math.ceil(fraction * scored - 1e-9))


def distributions(scores: Scores, fold: Fold = fold_here) -> dict[str, Histogram]:
    """Count the values of every score; NaN, which marks what is set aside, is not counted."""
    none = {name: Histogram.zero() for name in scores.names}
    return dict(fold(_Distributions, (scores,), range(scores.shards), "count scores") or none)


class _Distributions:
    """Counts the scores of a shard."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def __call__(self, shard: int) -> ByName:
        names = self._scores.names
        return ByName(zip(names, map(Histogram.of, self._scores.read_shard(shard, *names)), strict=True))


def linear_histogram(
    scores: Scores, name: str, bins: int, fold: Fold = fold_here
) -> tuple[Int64[np.ndarray, "bins"], Float64[np.ndarray, "bins+1"]]:
    """Count the values of one score in bins of equal width from the least to the largest; give their edges, too."""
    shards = range(scores.shards)
    ends = fold(_Ends, (scores, name), shards, "ends of scores")
    if ends is None or not ends.low <= ends.high:
        return np.zeros(bins, np.int64), np.linspace(0.0, 1.0, bins + 1)
    edges = np.linspace(ends.low, ends.high if ends.high > ends.low else ends.low + 1.0, bins + 1)
    return fold(_Counts, (scores, name, edges), shards, "count scores"), edges


@dataclass(frozen=True)
class _Range:
    low: float
    high: float

    def __add__(self, other: "_Range") -> "_Range":
        return _Range(min(self.low, other.low), max(self.high, other.high))


class _Ends:
    """Finds the least and the largest value of a score in a shard."""

    def __init__(self, scores: Scores, name: str) -> None:
        self._scores, self._name = scores, name

    def __call__(self, shard: int) -> _Range:
        (values,) = self._scores.read_shard(shard, self._name)
        return _Range(float(np.fmin.reduce(values, initial=math.inf)), float(np.fmax.reduce(values, initial=-math.inf)))


class _Counts:
    """Counts the values of a score in a shard between edges."""

    def __init__(self, scores: Scores, name: str, edges: Float64[np.ndarray, "bins+1"]) -> None:
        self._scores, self._name, self._edges = scores, name, edges

    def __call__(self, shard: int) -> Int64[np.ndarray, "bins"]:
        (values,) = self._scores.read_shard(shard, self._name)
        return np.histogram(values[~np.isnan(values)].astype(np.float64), self._edges)[0]


def top_list(scores: Scores, name: str, size: int, histogram: Histogram, fold: Fold = fold_here) -> TopK:
    """Find the `size` rows of largest score, best first; see `top_lists`."""
    return top_lists(scores, {name: size}, {name: histogram}, fold)[name]


def top_lists(
    scores: Scores, sizes: Mapping[str, int], histograms: Mapping[str, Histogram], fold: Fold = fold_here
) -> dict[str, TopK]:
    """Find the rows of largest score, best first, of several scores in one pass.

    The histograms tell beforehand which values can be in a list, so that each shard gives only those and hardly any
    list is merged.
    """
    floors = {name: (size, _floor(histograms[name], size)) for name, size in sizes.items() if size}
    found = fold(_Tops, (scores, floors), range(scores.shards) if floors else [], "list scores") or {}
    none = {name: TopK.zero(size) for name, size in sizes.items()}
    return none | {name: TopK.of(near.size, near.rows, near.scores) for name, near in found.items()}


class _Tops:
    """Lists the rows of a shard that can be in the top lists of the survey."""

    def __init__(self, scores: Scores, floors: Mapping[str, tuple[int, float]]) -> None:
        self._scores, self._floors = scores, floors

    def __call__(self, shard: int) -> ByName:
        start, _ = self._scores.bounds(shard)
        found = ByName()
        for name, (size, floor) in self._floors.items():
            (values,) = self._scores.read_shard(shard, name)
            near = np.flatnonzero(values >= floor)
            found[name] = _Near(size, near + start, values[near])
        return found


@dataclass(frozen=True, eq=False)
class _Near:
    """What may be in a top list, in no order: to sort it once is enough."""

    size: int
    rows: Int64[np.ndarray, "n"]
    scores: Float32[np.ndarray, "n"]

    def __add__(self, other: "_Near") -> "_Near":
        rows, scores = np.concatenate([self.rows, other.rows]), np.concatenate([self.scores, other.scores])
        # Where the histogram cannot tell (it knows no negative values), what waits is cut down from time to time.
        if len(rows) <= max(_WAITING, 4 * self.size):
            return _Near(self.size, rows, scores)
        top = TopK.of(self.size, rows, scores)
        return _Near(self.size, top.rows, top.scores)


def _floor(histogram: Histogram, size: int) -> float:
    """Give a value that none of the `size` largest lies below."""
    above = np.cumsum(histogram.counts[::-1])[::-1]
    bins = np.flatnonzero(above >= size)
    # One bin further down, so that rounding at a bin's edge cannot lose a value.
    lowest = int(bins[-1]) - 1 if bins.size else 0
    return float(Histogram.edges()[lowest]) if lowest > 0 else -math.inf


def ranks(
    scores: Scores, values: Mapping[str, Shaped[np.ndarray, "m"]], fold: Fold = fold_here
) -> dict[str, Int64[np.ndarray, "m"]]:
    """Give the rank of each value of some scores among all scored spectra: 1 + the number of larger ones; 0 of NaN."""
    larger = fold(_Larger, (scores, values), range(scores.shards), "rank scores") or {}
    none = {name: np.zeros(len(some), np.int64) for name, some in values.items()}
    return {name: np.where(np.isnan(some), 0, (none | larger)[name] + 1) for name, some in values.items()}


class _Larger:
    """Counts the scores of a shard that are larger than each of some values."""

    def __init__(self, scores: Scores, values: Mapping[str, Shaped[np.ndarray, "m"]]) -> None:
        self._scores, self._values = scores, values

    def __call__(self, shard: int) -> ByName:
        found = ByName()
        for name, values in self._values.items():
            (known,) = self._scores.read_shard(shard, name)
            known = np.sort(known[~np.isnan(known)])
            found[name] = len(known) - np.searchsorted(known, values, side="right")
        return found


def overlap(tops: Mapping[str, TopK]) -> Float64[np.ndarray, "k k"]:
    """Give the share of each list (row) that also is in each other one (column); lists are of equal length."""
    lists = [top.rows for top in tops.values()]
    shares = np.ones((len(lists), len(lists)))
    for first, mine in enumerate(lists):
        for second, other in enumerate(lists):
            shares[first, second] = np.isin(mine, other).mean() if len(mine) else np.nan
    return shares
