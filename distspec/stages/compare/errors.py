"""What a model leaves of every spectrum of a survey: statistics, histograms and lists of large errors.

All is read in blocks of as many scored spectra each, whatever the shards, so that results are equal in every bit
however the store is cut, and memory does not grow with the survey.

References:
    Sharma, Kembhavi, Kembhavi, Sivarani & Abraham 2019, BSRSL 88, 174, table 1, fig. 3 and section 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from distspec.config import Errors
from distspec.results.scores import Fold, fold_here
from distspec.statistics.summaries import TABLE_ROWS, Moments, Selection, TopK, quantile_ranks
from distspec.store import Layer, SpectraStore

__all__ = ["BINS", "LISTED", "MEASURES", "Residuals", "measure_residuals"]

MEASURES: Final = ("mse", "rmse", "difference")
"""Errors of a spectrum, each over its good pixels; the unit is the store's, squared for `mse`."""

BINS: Final = 60
"""Of the histograms."""

LISTED: Final = 10_000
"""Spectra that are listed by either cut, those of largest errors; all are counted."""

_BLOCK: Final = 1 << 16
"""Spectra that are looked at together."""

_QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 1.0, 0.001, 0.999)
"""Those of the table, and those between which the histograms reach."""

_PARTS: Final = 3
"""Parts of equal number by signal-to-noise ratio."""


class _Block(NamedTuple):
    """Some scored spectra, in the order of the store."""

    rows: Int64[np.ndarray, "n"]
    rmse: Float32[np.ndarray, "n"]
    difference: Float32[np.ndarray, "n"]
    snr: Float32[np.ndarray, "n"]
    """Median signal-to-noise ratio per pixel; NaN where unknown."""

    def errors(self) -> Float64[np.ndarray, "n 3"]:
        """Give all `MEASURES`."""
        rmse = self.rmse.astype(np.float64)
        return np.stack([rmse**2, rmse, self.difference.astype(np.float64)], axis=1)

    def ordered(self) -> tuple[Float32[np.ndarray, "n 3"], Bool[np.ndarray, "n 3"]]:
        """Give what order statistics are taken of, and what counts."""
        values = np.stack([self.rmse, self.difference, self.snr], axis=1)
        return values, ~np.isnan(values)


@dataclass(frozen=True, eq=False)
class Residuals:
    """Errors of a survey.

    Arguments:
        facts: plain values for JSON: `spectra`; `statistics`, the `MEASURES` by the rows of Sharma's table; `snr_bins`,
            the mean RMSE of thirds by S/N, empty without S/N; `histograms` with `edges`, `counts` and the numbers
            `below` and `above` these; `cuts`, the limits of both lists; `beyond`, how many are beyond each.
        rows: that are listed, those of largest difference first, then those of largest RMSE.
        rmse, difference, snr: of these rows.
        sigmas: their differences from the mean difference, in standard deviations.
    """

    facts: dict[str, Any]
    rows: Int64[np.ndarray, "m"]
    rmse: Float32[np.ndarray, "m"]
    difference: Float32[np.ndarray, "m"]
    snr: Float32[np.ndarray, "m"]
    sigmas: Float64[np.ndarray, "m"]


def measure_residuals(store: SpectraStore, layer: Layer, settings: Errors, fold: Fold = fold_here) -> Residuals | None:
    """Measure the errors of all spectra that a model scored.

    Arguments:
        store: whose column `snr` parts the spectra, if it has one.
        layer: with fields `rmse` and `difference`, NaN for what is set aside.
        settings: limits of the lists.
        fold: adds up over shards and blocks.

    Returns:
        Statistics and lists; None where no spectrum has an error.

    References:
        Sharma et al. 2019, table 1 and fig. 3: mean squared error, its root, mean of original - reconstruction.
    """
    known = fold(_Known, (layer,), range(layer.shards), "count errors")
    starts = np.concatenate([[0], known.cumsum()]) if known is not None else np.zeros(1, np.int64)
    spectra = int(starts[-1])
    if spectra == 0:
        return None
    blocks = _Blocks(store, layer, starts)

    def over_blocks(factory: Callable[..., Any], *arguments: Any) -> Any:
        return fold(factory, (blocks, *arguments), range(-(-spectra // _BLOCK)), "errors")

    first = over_blocks(_First)
    selection = _select(over_blocks, first.lowest)
    statistics, reach = _statistics(first.moments, selection)
    cuts = _cuts(statistics, settings)
    return _listed(blocks, over_blocks, statistics, cuts, _edges(reach, cuts), selection, spectra)


class _Known:
    """Counts the spectra of a shard that have errors."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __call__(self, shard: int) -> "_Counts":
        return _Counts(np.array([_known(*self._layer.read_shard(shard, "rmse", "difference")).sum()]))


def _known(rmse: Float32[np.ndarray, "n"], difference: Float32[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    return np.asarray(np.isfinite(rmse) & np.isfinite(difference))


class _Blocks:
    """Reads spectra that have errors, in blocks of equal length; small and picklable.

    Arguments:
        store: whose S/N is told.
        layer: with the errors.
        starts: number of these spectra before each shard, and of all.
    """

    def __init__(self, store: SpectraStore, layer: Layer, starts: Int64[np.ndarray, "shards+1"]) -> None:
        self._store, self._layer, self._starts = store, layer, starts
        self._has_snr = "snr" in store.column_names

    def read(self, number: int) -> _Block:
        """Read a block, from one shard or several."""
        begin, end = number * _BLOCK, min((number + 1) * _BLOCK, int(self._starts[-1]))
        low = int(np.searchsorted(self._starts, begin, "right")) - 1
        high = int(np.searchsorted(self._starts, end, "left"))
        parts = [self._shard(shard) for shard in range(low, high)]
        joined = _Block(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        before = int(self._starts[low])
        return _Block(*(values[begin - before : end - before] for values in joined))

    def _shard(self, shard: int) -> _Block:
        start, stop = self._layer.bounds(shard)
        rmse, difference = self._layer.read_shard(shard, "rmse", "difference")
        known = _known(rmse, difference)
        snr = np.full(stop - start, np.nan, np.float32)
        if self._has_snr:
            told = self._store.base.read("columns/snr", start, stop).astype(np.float32)
            snr = np.where(np.isfinite(told), told, np.float32(np.nan))
        return _Block(np.arange(start, stop)[known], rmse[known], difference[known], snr[known])

    def take(self, rows: Int64[np.ndarray, "m"]) -> tuple[Float32[np.ndarray, "m"], ...]:
        """Read RMSE, difference and S/N of single rows."""
        snr = np.full(len(rows), np.nan, np.float32)
        if self._has_snr:
            snr = np.asarray(self._store.base.take("columns/snr", rows), np.float32)
        return self._layer.take("rmse", rows), self._layer.take("difference", rows), snr


@dataclass(frozen=True, eq=False)
class _Found:
    """Mean and spread of all errors, and the first pass of their order statistics."""

    moments: Moments
    lowest: Selection

    def __add__(self, other: "_Found") -> "_Found":
        return _Found(self.moments + other.moments, self.lowest + other.lowest)


class _First:
    def __init__(self, blocks: _Blocks) -> None:
        self._blocks = blocks

    def __call__(self, number: int) -> _Found:
        block = self._blocks.read(number)
        errors = block.errors()
        return _Found(Moments.of(errors, np.ones_like(errors, bool)), Selection.start(3).count([block.ordered()]))


class _Next:
    """Counts for one more pass of the order statistics."""

    def __init__(self, blocks: _Blocks, selection: Selection) -> None:
        self._blocks, self._selection = blocks, selection

    def __call__(self, number: int) -> Selection:
        return self._selection.count([self._blocks.read(number).ordered()])


def _select(over_blocks: Callable[..., Any], lowest: Selection) -> Selection:
    """Find quantiles of all three columns, and behind them the values at which the S/N parts begin."""
    total = lowest.total
    # As many in each part as numpy.array_split gives: the first ones have one more.
    starts = np.cumsum([len(range(part, int(total[2]), _PARTS)) for part in range(_PARTS - 1)])
    limits = np.zeros((_PARTS - 1, 3), np.int64)
    limits[:, 2] = np.minimum(starts, max(int(total[2]) - 1, 0))
    selection = lowest.narrow(np.concatenate([quantile_ranks(total, _QUANTILES), limits]))
    while not selection.done:
        counted: Selection = over_blocks(_Next, selection)
        selection = counted.narrow()
    return selection


def _statistics(
    moments: Moments, selection: Selection
) -> tuple[dict[str, dict[str, float]], Float64[np.ndarray, "2 3"]]:
    """Give the table, and the quantiles between which histograms reach."""
    found = selection.values[: 2 * len(_QUANTILES), :2].astype(np.float64)
    # The square of an order statistic is that of the squares.
    found = np.concatenate([found[:, :1] ** 2, found], axis=1)
    position = np.array(_QUANTILES) * max(int(selection.total[0]) - 1, 0)
    share = (position - np.floor(position))[:, None]
    quantiles = found[::2] * (1 - share) + found[1::2] * share
    table = np.concatenate([[moments.mean, np.sqrt(moments.variance)], quantiles[:5]])
    lines = zip(TABLE_ROWS, table.tolist(), strict=True)
    named = {row: dict(zip(MEASURES, values, strict=True)) for row, values in lines}
    return named, quantiles[5:]


def _cuts(statistics: dict[str, dict[str, float]], settings: Errors) -> dict[str, Any]:
    """Give the limits beyond which spectra are listed."""
    mean, std = statistics["mean"], statistics["std"]
    reach = settings.sigma * std["difference"]
    chosen = settings.rmse is not None
    limit = settings.rmse if settings.rmse is not None else mean["rmse"] + settings.sigma * std["rmse"]
    return {
        "sigma": settings.sigma,
        "difference": [mean["difference"] - reach, mean["difference"] + reach],
        "rmse": limit,
        "rmse_is_set": chosen,
    }


def _edges(reach: Float64[np.ndarray, "2 3"], cuts: dict[str, Any]) -> dict[str, Float64[np.ndarray, "bins+1"]]:
    """Choose the histograms' edges: from the 0.1 % to the 99.9 % quantile, so far out that the cuts are seen."""
    limits = {"mse": [cuts["rmse"] ** 2], "rmse": [cuts["rmse"]], "difference": cuts["difference"]}
    edges = {}
    for (low, high), (name, lines) in zip(reach.T, limits.items(), strict=True):
        low, high = min(low, *lines, high), max(high, *lines, low)
        margin = 0.03 * (high - low)
        # Errors without a sign begin at 0.
        low = low - margin if name == "difference" else max(low - margin, 0.0)
        # One value alone has a bin of its own.
        high = high + margin if high > low else low + max(abs(low), 1.0)
        edges[name] = np.linspace(low, high, BINS + 1)
    return edges


@dataclass(frozen=True, eq=False)
class _Cut:
    """Where histograms and lists are cut.

    Arguments:
        mean, std: of the difference.
        sigma, rmse: limits of the lists.
        edges: of the histograms.
    """

    mean: float
    std: float
    sigma: float
    rmse: float
    edges: dict[str, Float64[np.ndarray, "bins+1"]]


@dataclass(frozen=True, eq=False)
class _Lists:
    """Histograms, numbers beyond the cuts, the lists and the S/N parts of some blocks."""

    counts: Int64[np.ndarray, "3 bins+2"]
    beyond: Int64[np.ndarray, "3"]
    odd: TopK
    bad: TopK
    parts: "_Parts"

    def __add__(self, other: "_Lists") -> "_Lists":
        return _Lists(
            self.counts + other.counts,
            self.beyond + other.beyond,
            self.odd + other.odd,
            self.bad + other.bad,
            self.parts + other.parts,
        )


class _Lister:
    """Counts the histograms and the S/N parts of a block, and lists what is beyond the cuts."""

    def __init__(
        self, blocks: _Blocks, cut: _Cut, selection: Selection, tied: Int64[np.ndarray, "blocks limits"]
    ) -> None:
        self._blocks, self._cut, self._selection = blocks, cut, selection
        self._tied = np.cumsum(tied, axis=0) - tied

    def __call__(self, number: int) -> _Lists:
        block, cut = self._blocks.read(number), self._cut
        errors = block.errors()
        away = np.abs(errors[:, 2] - cut.mean)
        odd, bad = away > cut.sigma * cut.std, errors[:, 1] > cut.rmse
        return _Lists(
            np.stack([_binned(values, cut.edges[name]) for name, values in zip(MEASURES, errors.T, strict=True)]),
            np.array([int(which.sum()) for which in (odd, bad, odd | bad)]),
            TopK.of(LISTED, block.rows[odd], away[odd]),
            TopK.of(LISTED, block.rows[bad], errors[bad, 1]),
            _Parts.of(block, self._selection, self._tied[number]),
        )


def _listed(
    blocks: _Blocks,
    over_blocks: Callable[..., Any],
    statistics: dict[str, dict[str, float]],
    cuts: dict[str, Any],
    edges: dict[str, Float64[np.ndarray, "bins+1"]],
    selection: Selection,
    spectra: int,
) -> Residuals:
    """Count the histograms and the S/N parts, and list what is beyond the cuts."""
    mean, std = statistics["mean"]["difference"], statistics["std"]["difference"]
    cut = _Cut(mean, std, cuts["sigma"], cuts["rmse"], edges)
    tied = over_blocks(_Tied, selection).values
    found: _Lists = over_blocks(_Lister, cut, selection, tied)
    joined = np.concatenate([found.odd.rows, found.bad.rows])
    rows = joined[np.sort(np.unique(joined, return_index=True)[1])]
    rmse, difference, snr = blocks.take(rows)
    facts = {
        "spectra": spectra,
        "statistics": statistics,
        "snr_bins": found.parts.told(),
        "histograms": {
            name: _histogram(edges[name], counts) for name, counts in zip(MEASURES, found.counts, strict=True)
        },
        "cuts": cuts,
        "beyond": dict(zip(("difference", "rmse", "either"), found.beyond.tolist(), strict=True)),
        "listed": len(rows),
    }
    sigmas = (difference.astype(np.float64) - mean) / (std or math.inf)
    return Residuals(facts, rows, rmse, difference, snr, sigmas)


def _binned(values: Float64[np.ndarray, "n"], edges: Float64[np.ndarray, "bins+1"]) -> Int64[np.ndarray, "bins+2"]:
    """Count what lies below the edges, in each bin, and above."""
    place = np.searchsorted(edges, values, "right")
    # The last bin holds its upper edge, as numpy's does.
    place[values == edges[-1]] -= 1
    return np.bincount(place, minlength=len(edges) + 1).astype(np.int64)


def _histogram(edges: Float64[np.ndarray, "bins+1"], counts: Int64[np.ndarray, "bins+2"]) -> dict[str, Any]:
    inside = counts[1:-1].tolist()
    return {"edges": edges.tolist(), "counts": inside, "below": int(counts[0]), "above": int(counts[-1])}


@dataclass(frozen=True, eq=False)
class _Counts:
    """Numbers of one shard or block after the other."""

    values: Int64[np.ndarray, "n ..."]

    def __add__(self, other: "_Counts") -> "_Counts":
        return _Counts(np.concatenate([self.values, other.values]))

    def cumsum(self) -> Int64[np.ndarray, "n ..."]:
        return self.values.cumsum(axis=0)


def _limits(selection: Selection) -> tuple[Float32[np.ndarray, "limits"], Int64[np.ndarray, "limits"]]:
    """Give the S/N at which parts begin, and how many spectra of exactly that S/N belong to the part before.

    After the last pass a target's rank is that among the values equal to it.
    """
    behind = slice(2 * len(_QUANTILES), None)
    return selection.values[behind, 2], selection.rank[behind, 2]


class _Tied:
    """Counts the spectra of a block whose S/N is one at which a part begins."""

    def __init__(self, blocks: _Blocks, selection: Selection) -> None:
        self._blocks, self._limits = blocks, _limits(selection)[0]

    def __call__(self, number: int) -> _Counts:
        snr = self._blocks.read(number).snr
        return _Counts((snr[:, None] == self._limits).sum(axis=0)[None].astype(np.int64))


@dataclass(frozen=True, eq=False)
class _Parts:
    """Mean RMSE of parts of equal number by S/N: as if spectra were sorted by it, those of equal S/N by their row."""

    moments: Moments
    span: Float64[np.ndarray, "parts 2"]

    @classmethod
    def of(cls, block: _Block, selection: Selection, tied: Int64[np.ndarray, "limits"]) -> "_Parts":
        """Take a block, before which there are so many spectra of exactly the S/N at which parts begin."""
        part = np.zeros(len(block.rows), np.int64)
        for limit, before, number in zip(*_limits(selection), tied, strict=True):
            same = block.snr == limit
            part += (block.snr > limit) | (same & (number + np.cumsum(same) > before))
        mine = (part[:, None] == np.arange(_PARTS)) & ~np.isnan(block.snr)[:, None]
        rmse = np.broadcast_to(block.rmse[:, None].astype(np.float64), mine.shape)
        snr = block.snr[:, None].astype(np.float64)
        low, high = np.where(mine, snr, np.inf).min(axis=0), np.where(mine, snr, -np.inf).max(axis=0)
        return cls(Moments.of(rmse, mine), np.stack([low, high], axis=1))

    def __add__(self, other: "_Parts") -> "_Parts":
        low = np.minimum(self.span[:, 0], other.span[:, 0])
        high = np.maximum(self.span[:, 1], other.span[:, 1])
        return _Parts(self.moments + other.moments, np.stack([low, high], axis=1))

    def told(self) -> list[dict[str, float]]:
        """Give the parts that hold a spectrum, from the lowest S/N, in plain values."""
        columns = zip(self.moments.weight.tolist(), self.moments.mean.tolist(), self.span.tolist(), strict=True)
        return [
            {"from": span[0], "to": span[1], "spectra": int(count), "rmse": rmse}
            for count, rmse, span in columns
            if count
        ]
