"""What only the whole sample can tell: wavelengths to drop, a mean, values for masked pixels, an S/N threshold.

`compute` takes these statistics once over the usable spectra of a store; they are then frozen, and `Statistics` applies
them to every spectrum read from it, those added later included. Usable means status 0 by the recipe, before the S/N
threshold that is found here. What is computed does not depend, in any bit, on how the store is cut.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from distspec.config import Mean, Median, Prepare
from distspec.errors import ConfigError
from distspec.spectra import Columns, Spectra
from distspec.statistics.summaries import Batch, Selection, Sums, quantile, quantile_ranks
from distspec.store.frozen import BLOCK, FLOAT32, Again, Statistics, factor_of

__all__ = ["Block", "Table", "check", "compute"]

Block = Callable[[], tuple[Spectra, Columns]]
"""Gives some prepared spectra with at least their columns `status` and `snr`; picklable where workers are processes."""

Table = Callable[[], Columns]
"""Gives the columns `status` and `snr` of some spectra."""

ROWS_MIN = 10
"""Fewest usable spectra from which masked pixels may be filled: from fewer there is no 16-84 % range to speak of."""

MEAN_MIN = 1e-4
"""A pixel is masked where the mean spectrum is below this share of its median: dividing by it would show noise only."""

RANGE = (0.16, 0.5, 0.84)
"""Quantiles at each wavelength: the outer ones give the scatter, the middle one the imputed value."""


def check(prepare: Prepare) -> None:
    """Refuse settings of `prepare.sample` that have no meaning together; cheap, to be called before any work.

    Raises:
        ConfigError: names the settings.
    """
    sample = prepare.sample
    if sample.snr_quantile > 0 and sample.snr_highest is not None:
        raise ConfigError("prepare.sample has both snr_quantile and snr_highest; give one threshold")
    if sample.missing_max == 0:
        raise ConfigError("prepare.sample.missing_max = 0 drops every wavelength; give a share above 0")
    if sample.missing_max is not None and prepare.flux_factor and isinstance(prepare.normalize, Median | Mean):
        raise ConfigError("prepare.sample.missing_max normalizes again, which undoes prepare.flux_factor; unset one")


def compute(
    blocks: Sequence[Block],
    prepare: Prepare,
    *,
    tables: Sequence[Table] | None = None,
    scheduler: Any = None,
    parallel: int = 0,
) -> Statistics:
    """Compute the statistics that `prepare.sample` asks for, with as many passes over the spectra as they need.

    One pass counts masked pixels (`missing_max`), one adds up the mean (`divide_by_mean`), three find quantiles
    (`impute`, the first together with the mean); three passes over the columns alone find the S/N threshold. Each
    holds `parallel` blocks and as many summaries of some 25 kB a pixel (50 at worst), whatever the number of spectra.

    Arguments:
        blocks: give the spectra, in any cut; each is called once a pass.
        prepare: the recipe of the spectra.
        tables: give the columns alone, in any cut; none takes them from the blocks, which reads the spectra too.
        scheduler: of dask; none takes threads on this machine.
        parallel: blocks in work at a time; 0 takes one for each core of this machine.

    Raises:
        ConfigError: no spectrum is usable, too few are for `impute`, no wavelength is left, or see `check`.
    """
    check(prepare)
    sample = prepare.sample
    identity = Statistics.identity(prepare.grid.pixels)
    thresholds = sample.snr_quantile > 0 or sample.snr_highest is not None
    if not (thresholds or sample.missing_max is not None or sample.impute or sample.divide_by_mean):
        return identity
    fold = partial(_fold, scheduler=scheduler, parallel=parallel or os.cpu_count() or 1)
    rows, snr_min = 0, -np.inf
    if thresholds:
        own = tables if tables is not None else [partial(_columns_of, block) for block in blocks]
        rows, snr_min = _threshold(fold, own, prepare)
    keep, renormalize = identity.keep, identity.renormalize
    if sample.missing_max is not None:
        rows, keep = _common(fold, blocks, sample.missing_max, len(keep))
        renormalize = prepare.normalize.kind if isinstance(prepare.normalize, Median | Mean) else "none"
    mean, middle, scatter = identity.mean, identity.median, identity.scatter
    if sample.impute or sample.divide_by_mean:
        state = _Values(keep, renormalize, sample.impute, sample.divide_by_mean)
        rows, mean, middle, scatter = _distribution(fold, blocks, state)
    return Statistics(rows, keep, mean, middle, scatter, snr_min, renormalize)


Fold = Callable[[Callable[[Any], Any], Sequence[Any]], Any]
"""Applies work to every block and adds the summaries up."""


def _fold(work: Callable[[Any], Any], blocks: Sequence[Any], scheduler: Any, parallel: int) -> Any:
    """Build the graph: some chains, each adding block after block to one summary, and the tree that merges them.

    A tree over all blocks would let finished blocks wait for one another, each with a summary in memory; a chain has
    only one.
    """
    import dask

    if not blocks:
        raise ConfigError("no spectra to take the statistics of prepare.sample from")
    start, extend, merge = (dask.delayed(step, traverse=False) for step in (work, _extend, _merge))
    ends = []
    for chain in (blocks[i::parallel] for i in range(min(parallel, len(blocks)))):
        total = start(chain[0])
        for block in chain[1:]:
            total = extend(total, work, block)
        ends.append(total)
    while len(ends) > 1:
        odd = ends[len(ends) // 2 * 2 :]
        ends = [merge(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False)] + odd
    (result,) = dask.compute(ends[0], scheduler=scheduler or "threads", num_workers=parallel)
    return result


def _extend(total: tuple[Any, ...], work: Callable[[Any], tuple[Any, ...]], block: Any) -> tuple[Any, ...]:
    return _merge(total, work(block))


def _merge(first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))


def _columns_of(block: Block) -> Columns:
    return block()[1]


def _require_rows(rows: int, least: int, what: str) -> None:
    if rows < least:
        raise ConfigError(f"prepare.sample.{what} needs {least} usable spectra or more; there are {rows}")


def _count_snr(table: Table, selection: Selection) -> tuple[Selection]:
    columns = table()
    snr = columns["snr"][columns["status"] == 0].astype(np.float32)[:, None]
    return (selection.count([(snr, np.isfinite(snr))]),)


def _threshold(fold: Fold, tables: Sequence[Table], prepare: Prepare) -> tuple[int, float]:
    """Give the number of usable spectra and the snr of the last one that is used."""
    sample, selection = prepare.sample, Selection.start(1)
    while not selection.done:
        (counted,) = fold(partial(_count_snr, selection=selection), tables)
        ranks = None
        if selection.level == 0:
            rows = int(counted.total[0])
            _require_rows(rows, 1, "snr_quantile" if sample.snr_highest is None else "snr_highest")
            if sample.snr_highest is not None:
                first = rows - sample.snr_highest
            else:
                # Rounded up, N spectra in four bins leave floor(N / 4) in the highest, as in Ortiz & Boquien.
                first = int(np.ceil(round(sample.snr_quantile * rows, 6)))  # 0.7 * 10 is 7.000000000000001
            if first < 0:
                return rows, -np.inf
            ranks = np.full((1, 1), min(first, rows - 1), np.int64)
        selection = counted.narrow(ranks)
    return rows, float(selection.values[0, 0])


def _count_good(block: Block, pixels: int) -> tuple[int, Int64[np.ndarray, "pixels"]]:
    spectra, columns = block()
    usable = np.flatnonzero(columns["status"] == 0)
    count = np.zeros(pixels, np.int64)
    for start in range(0, len(usable), BLOCK):
        count += (spectra.ivar[usable[start : start + BLOCK]] > 0).sum(axis=0)
    return len(usable), count


def _common(fold: Fold, blocks: Sequence[Block], missing_max: float, pixels: int) -> tuple[int, Bool[np.ndarray, "p"]]:
    """Give the number of usable spectra, and which pixels are masked in less than `missing_max` of them."""
    rows, good = fold(partial(_count_good, pixels=pixels), blocks)
    _require_rows(rows, 1, "missing_max")
    keep = rows - good < missing_max * rows
    if not keep.any():
        least = (rows - good.max()) / rows
        raise ConfigError(
            f"prepare.sample.missing_max = {missing_max:g} leaves no wavelength: every one is masked in {least:.3g} of "
            "the spectra or more; raise it, or narrow prepare.grid"
        )
    return rows, keep


@dataclass(frozen=True, eq=False)
class _Values:
    """Work of the passes over flux: counts for the quantiles, and in the first pass the sums for the mean."""

    keep: Bool[np.ndarray, "pixels"]
    renormalize: Again
    impute: bool
    divide: bool
    selection: Selection | None = None

    def __call__(self, block: Block) -> tuple[Any, ...]:
        spectra, columns = block()
        usable = np.flatnonzero(columns["status"] == 0)
        parts: list[Any] = [len(usable)]
        if self.divide:
            parts.append(Sums.of(len(self.keep), self._batches(spectra, usable)))
        if self.selection is not None:
            parts.append(self.selection.count(self._batches(spectra, usable)))
        return tuple(parts)

    def _batches(self, spectra: Spectra, usable: Int64[np.ndarray, "m"]) -> Iterator[Batch]:
        for start in range(0, len(usable), BLOCK):
            rows = usable[start : start + BLOCK]
            flux, good = spectra.flux[rows], (spectra.ivar[rows] > 0) & self.keep
            if self.renormalize != "none":
                factor = factor_of(flux, good, self.renormalize)
                good &= np.isfinite(factor)[:, None]
                flux = flux * np.nan_to_num(factor)[:, None]
                good &= np.isfinite(flux)
            yield flux, good


def _distribution(
    fold: Fold, blocks: Sequence[Block], work: _Values
) -> tuple[int, Float32[np.ndarray, "p"], Float32[np.ndarray, "p"], Float32[np.ndarray, "p"]]:
    """Give the number of usable spectra, and what divides, fills, and weighs what is filled."""
    identity = Statistics.identity(len(work.keep))
    mean, middle, scatter = identity.mean, identity.median, identity.scatter
    selection = Selection.start(len(mean)) if work.impute else None
    divide = work.divide
    while True:
        found = fold(_Values(work.keep, work.renormalize, work.impute, divide, selection), blocks)
        rows = found[0]
        _require_rows(rows, ROWS_MIN if work.impute else 1, "impute" if work.impute else "divide_by_mean")
        if divide:
            mean, divide = _divisor(found[1].mean), False
        if selection is None:
            break
        counted = found[-1]
        selection = counted.narrow(quantile_ranks(counted.total, RANGE) if selection.level == 0 else None)
        if selection.done:
            low, middle, high = quantile(selection, RANGE)
            scatter = (high - low) / 2
            break
    return rows, mean, middle, scatter


def _divisor(mean: Shaped[np.ndarray, "pixels"]) -> Float32[np.ndarray, "pixels"]:
    """Give the mean spectrum, with 0 where it cannot divide."""
    known = mean[np.isfinite(mean)]
    # Against the median over wavelengths, so that one spike raises no limit for all others.
    limit = max(MEAN_MIN * float(np.median(known)), float(FLOAT32.tiny)) if len(known) else np.inf
    divisor = np.where((mean >= limit) & (mean <= FLOAT32.max), mean, 0.0).astype(np.float32)
    if not divisor.any():
        raise ConfigError("prepare.sample.divide_by_mean: the mean spectrum is positive at no wavelength; unset it")
    return divisor
