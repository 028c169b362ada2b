"""What a model leaves of every spectrum of a survey: statistics, histograms and lists of large errors.

All is read in blocks of as many scored spectra each, whatever the shards, so that results are equal in every bit
however the store is cut, and memory does not grow with the survey.

References:
    Sharma, Kembhavi, Kembhavi, Sivarani & Abraham 2019, BSRSL 88, 174, table 1, fig. 3 and section 4.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from distspec.config import Errors
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


def measure_residuals(store: SpectraStore, layer: Layer, settings: Errors) -> Residuals | None:
    """Measure the errors of all spectra that a model scored.

    Arguments:
        store: whose column `snr` parts the spectra, if it has one.
        layer: with fields `rmse` and `difference`, NaN for what is set aside.
        settings: limits of the lists.

    Returns:
        Statistics and lists; None where no spectrum has an error.

    References:
        Sharma et al. 2019, table 1 and fig. 3: mean squared error, its root, mean of original - reconstruction.
    """
    reader = _Reader(store, layer)
    moments, lowest = Moments.zero(len(MEASURES)), Selection.start(3)
    first = lowest
    for block in reader.blocks():
        errors = block.errors()
        moments += Moments.of(errors, np.ones_like(errors, bool))
        lowest += first.count([block.ordered()])
    spectra = int(lowest.total[0])
    if spectra == 0:
        return None
    selection = _select(reader, lowest)
    statistics, reach = _statistics(moments, selection)
    cuts = _cuts(statistics, settings)
    return _listed(reader, statistics, cuts, _edges(reach, cuts), selection, spectra)


class _Reader:
    """Reads a layer and the S/N again and again, in blocks of equal length."""

    def __init__(self, store: SpectraStore, layer: Layer) -> None:
        self._store, self._layer = store, layer
        self._has_snr = "snr" in store.column_names

    def blocks(self) -> Iterator[_Block]:
        left: list[_Block] = []
        held = 0
        for shard in range(self._layer.shards):
            left.append(self._shard(shard))
            held += len(left[-1].rows)
            while held >= _BLOCK:
                joined = _join(left)
                yield _Block(*(values[:_BLOCK] for values in joined))
                left, held = [_Block(*(values[_BLOCK:] for values in joined))], held - _BLOCK
        if held:
            yield _join(left)

    def _shard(self, shard: int) -> _Block:
        start, stop = self._layer.bounds(shard)
        rmse, difference = self._layer.read_shard(shard, "rmse", "difference")
        known = np.isfinite(rmse) & np.isfinite(difference)
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


def _join(blocks: list[_Block]) -> _Block:
    return _Block(*(np.concatenate(values) for values in zip(*blocks, strict=True)))


def _select(reader: _Reader, lowest: Selection) -> Selection:
    """Find quantiles of all three columns, and behind them the values at which the S/N parts begin."""
    total = lowest.total
    # As many in each part as numpy.array_split gives: the first ones have one more.
    starts = np.cumsum([len(range(part, int(total[2]), _PARTS)) for part in range(_PARTS - 1)])
    limits = np.zeros((_PARTS - 1, 3), np.int64)
    limits[:, 2] = np.minimum(starts, max(int(total[2]) - 1, 0))
    selection = lowest.narrow(np.concatenate([quantile_ranks(total, _QUANTILES), limits]))
    while not selection.done:
        counts = (selection.count([block.ordered()]) for block in reader.blocks())
        selection = reduce(add, counts, selection).narrow()
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


def _listed(
    reader: _Reader,
    statistics: dict[str, dict[str, float]],
    cuts: dict[str, Any],
    edges: dict[str, Float64[np.ndarray, "bins+1"]],
    selection: Selection,
    spectra: int,
) -> Residuals:
    """Count the histograms and the S/N parts, and list what is beyond the cuts, in one more pass."""
    mean, std = statistics["mean"]["difference"], statistics["std"]["difference"]
    counts = {name: np.zeros(BINS + 2, np.int64) for name in MEASURES}
    beyond = {"difference": 0, "rmse": 0, "either": 0}
    tops = [TopK.zero(LISTED), TopK.zero(LISTED)]
    parts = _Parts(selection)
    for block in reader.blocks():
        errors = block.errors()
        for name, values in zip(MEASURES, errors.T, strict=True):
            counts[name] += _binned(values, edges[name])
        away = np.abs(errors[:, 2] - mean)
        odd, bad = away > cuts["sigma"] * std, errors[:, 1] > cuts["rmse"]
        for name, which in (("difference", odd), ("rmse", bad), ("either", odd | bad)):
            beyond[name] += int(which.sum())
        tops[0] += TopK.of(LISTED, block.rows[odd], away[odd])
        tops[1] += TopK.of(LISTED, block.rows[bad], errors[bad, 1])
        parts.take(block)
    joined = np.concatenate([top.rows for top in tops])
    rows = joined[np.sort(np.unique(joined, return_index=True)[1])]
    rmse, difference, snr = reader.take(rows)
    facts = {
        "spectra": spectra,
        "statistics": statistics,
        "snr_bins": parts.told(),
        "histograms": {name: _histogram(edges[name], counts[name]) for name in MEASURES},
        "cuts": cuts,
        "beyond": beyond,
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


class _Parts:
    """Mean RMSE of parts of equal number by S/N: as if spectra were sorted by it, those of equal S/N by their row."""

    def __init__(self, selection: Selection) -> None:
        behind = slice(2 * len(_QUANTILES), None)
        self._limits = selection.values[behind, 2]
        # After the last pass a target's rank is that among the values equal to it: as many belong to the part before.
        self._before = selection.rank[behind, 2]
        self._tied = np.zeros(len(self._limits), np.int64)
        self._moments = Moments.zero(_PARTS)
        self._span = np.array([[np.inf, -np.inf]] * _PARTS)

    def take(self, block: _Block) -> None:
        part = np.zeros(len(block.rows), np.int64)
        for place, limit in enumerate(self._limits):
            tied = block.snr == limit
            number = self._tied[place] + np.cumsum(tied)
            part += (block.snr > limit) | (tied & (number > self._before[place]))
            self._tied[place] += int(tied.sum())
        mine = (part[:, None] == np.arange(_PARTS)) & ~np.isnan(block.snr)[:, None]
        rmse = np.broadcast_to(block.rmse[:, None].astype(np.float64), mine.shape)
        self._moments += Moments.of(rmse, mine)
        snr = block.snr[:, None].astype(np.float64)
        low, high = np.where(mine, snr, np.inf).min(axis=0), np.where(mine, snr, -np.inf).max(axis=0)
        self._span = np.stack([np.minimum(self._span[:, 0], low), np.maximum(self._span[:, 1], high)], axis=1)

    def told(self) -> list[dict[str, float]]:
        """Give the parts that hold a spectrum, from the lowest S/N, in plain values."""
        columns = zip(self._moments.weight.tolist(), self._moments.mean.tolist(), self._span.tolist(), strict=True)
        return [
            {"from": span[0], "to": span[1], "spectra": int(count), "rmse": rmse}
            for count, rmse, span in columns
            if count
        ]
