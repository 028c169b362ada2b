"""What only the whole sample can tell: wavelengths to drop, a mean, values for masked pixels, an S/N threshold.

`compute` takes these statistics once over the usable spectra of a store; they are then frozen, and `Statistics` applies
them to every spectrum read from it, those added later included. Usable means status 0 by the recipe, before the S/N
threshold that is found here. What is computed does not depend, in any bit, on how the store is cut.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped

from distspec.config import Mean, Median, Prepare
from distspec.errors import ConfigError
from distspec.reduce import Batch, Selection, Sums, quantile, quantile_ranks, row_mean, row_median
from distspec.spectra import Columns, Spectra, Status

__all__ = ["Block", "Statistics", "Table", "check", "compute"]

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

BLOCK = 512
"""Spectra whose temporaries are held at once."""

FLOAT32 = np.finfo(np.float32)
Again = Literal["none", "median", "mean"]
RENORMALIZE: tuple[Again, ...] = ("none", "median", "mean")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Frozen statistics of a sample, and what they do to a spectrum.

    The order is that of Ortiz & Boquien 2025 (public code, `imputing.py`), with the division of Böhm, Kim & Juneau 2023
    (section 2) behind it: drop wavelengths; normalize each spectrum again over those kept; fill masked pixels; divide
    by the mean spectrum. All statistics are of renormalized and not yet divided spectra. Filling before or after the
    division comes to the same, since the filled value is divided too.

    Arguments:
        rows: number of usable spectra behind the statistics; 0 where none were needed.
        keep: False at wavelengths that are masked in every spectrum.
        mean: what spectra are divided by; 1 without division, 0 where the mean spectrum cannot divide (pixel masked).
        median: value of a filled pixel; NaN where masked pixels stay masked.
        scatter: its error, half the 16-84 % range of the sample at that wavelength: an imputed value is known as well
            as the sample scatters.
        snr_min: smallest `snr` of a spectrum that is used.
        renormalize: what of the kept pixels of a spectrum becomes 1.
    """

    rows: int
    keep: Bool[np.ndarray, "pixels"]
    mean: Float32[np.ndarray, "pixels"]
    median: Float32[np.ndarray, "pixels"]
    scatter: Float32[np.ndarray, "pixels"]
    snr_min: float = -np.inf
    renormalize: Again = "none"

    @classmethod
    def identity(cls, pixels: int) -> "Statistics":
        """Give the statistics that leave every spectrum as it is."""
        one, unknown = np.ones(pixels, np.float32), np.full(pixels, np.nan, np.float32)
        return cls(0, np.ones(pixels, bool), one, unknown, unknown)

    @cached_property
    def is_identity(self) -> bool:
        """Whether `apply` changes nothing."""
        return bool(self.keep.all() and self.renormalize == "none" and not self._divides and not self._fills.any())

    @cached_property
    def _divides(self) -> bool:
        return bool((self.mean != 1).any())

    @cached_property
    def _kept(self) -> Bool[np.ndarray, "pixels"]:
        return self.keep & (self.mean > 0)

    @cached_property
    def _filling(self) -> Float32[np.ndarray, "2 pixels"]:
        """Flux and ivar of a filled pixel, in the unit of the result; both 0 where there is none."""
        known = self._kept & np.isfinite(self.median) & (self.scatter > 0)
        mean, scatter = self.mean.astype(np.float64), np.where(known, self.scatter, 1.0)
        flux = np.where(known, self.median, 0.0) / np.where(known, mean, 1.0)
        ivar = np.where(known, (mean / scatter) ** 2, 0.0)
        sound = (np.abs(flux) <= FLOAT32.max) & (ivar >= FLOAT32.tiny) & (ivar <= FLOAT32.max)
        return np.asarray(np.where(sound, [flux, ivar], 0.0), np.float32)

    @cached_property
    def _fills(self) -> Bool[np.ndarray, "pixels"]:
        return np.asarray(self._filling[1] > 0)

    def factor(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Give what normalizes each spectrum again over the kept wavelengths: 1 / its median (or mean) there.

        It takes a sort of every spectrum, so it is made once and stored. NaN where there is no positive scale; 1 where
        no wavelength was dropped, or the recipe normalizes otherwise.
        """
        self._check(spectra)
        factor = np.ones(len(spectra), np.float32)
        if self.renormalize == "none":
            return factor
        for start in range(0, len(spectra), BLOCK):
            rows = slice(start, start + BLOCK)
            factor[rows] = _factor(spectra.flux[rows], (spectra.ivar[rows] > 0) & self.keep, self.renormalize)
        return factor

    def apply(self, spectra: Spectra, factor: Float32[np.ndarray, "n"] | None = None) -> Spectra:
        """Bring prepared spectra to what a model sees.

        Arguments:
            spectra: as they stand in the store.
            factor: their `factor`, if it was stored; else it is computed.

        Returns:
            The spectra with dropped wavelengths masked (flux and ivar 0), renormalized, divided, and filled. A spectrum
            without any good pixel, or whose factor is NaN, is masked as a whole and never filled.

        Raises:
            ValueError: the spectra are on a grid of another length.
        """
        self._check(spectra)
        if self.is_identity:
            return spectra
        good = (spectra.ivar > 0) & self._kept
        flux, ivar = np.where(good, spectra.flux, 0), np.where(good, spectra.ivar, 0)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if self.renormalize != "none":
                scale = (self.factor(spectra) if factor is None else factor).astype(np.float64)
                flux *= scale.astype(np.float32)[:, None]
                ivar *= (scale**-2).astype(np.float32)[:, None]
            if self._divides:
                divisor = np.where(self._kept, self.mean, np.float32(1))
                flux /= divisor
                ivar *= divisor * divisor
            # Also False for the NaN of a spectrum without a factor, and where float32 overflowed.
            good &= (np.abs(flux) <= FLOAT32.max) & (ivar >= FLOAT32.tiny) & (ivar <= FLOAT32.max)
        flux[~good] = 0
        ivar[~good] = 0
        if self._fills.any():
            empty = ~good & self._fills & good.any(axis=1)[:, None]
            flux, ivar = np.where(empty, self._filling[0], flux), np.where(empty, self._filling[1], ivar)
        return Spectra(spectra.rows, flux, ivar, spectra.grid, spectra.redshift)

    def status(
        self,
        snr: Float32[np.ndarray, "n"],
        status: Int32[np.ndarray, "n"],
        factor: Float32[np.ndarray, "n"] | None = None,
    ) -> Int32[np.ndarray, "n"]:
        """Add LOW_SNR below the threshold (a tie passes), and NO_SCALE where the `factor` is NaN.

        Spectra that the recipe left with too few pixels, or none, get neither.
        """
        judged = status & int(Status.UNUSABLE | Status.LOW_COVERAGE) == 0
        added = np.where(judged & (snr < np.float32(self.snr_min)), int(Status.LOW_SNR), 0)
        if factor is not None:
            added |= np.where(judged & np.isnan(factor), int(Status.NO_SCALE), 0)
        return np.asarray(status | added, np.int32)

    def _check(self, spectra: Spectra) -> None:
        if spectra.grid.pixels != len(self.keep):
            raise ValueError(f"spectra of {spectra.grid.pixels} pixels; these statistics are of {len(self.keep)}")

    def to_arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Give plain arrays that `from_arrays` turns back into equal statistics."""
        arrays = {name: getattr(self, name) for name in ("keep", "mean", "median", "scatter")}
        return arrays | {
            "rows": np.array([self.rows], np.int64),
            "snr_min": np.array([self.snr_min], np.float32),
            "renormalize": np.array([RENORMALIZE.index(self.renormalize)], np.int8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, Shaped[np.ndarray, "..."]]) -> "Statistics":
        """Take what `to_arrays` gave.

        Raises:
            ValueError: an array is missing, or its shape or a value is impossible.
        """
        wanted = {field.name for field in fields(cls)}
        if wanted - set(arrays):
            raise ValueError(f"statistics without {', '.join(sorted(wanted - set(arrays)))}")
        pixels = arrays["keep"].shape
        if len(pixels) != 1 or any(arrays[name].shape != pixels for name in ("mean", "median", "scatter")):
            raise ValueError(f"statistics of shapes { {name: array.shape for name, array in arrays.items()} }")
        kind = int(arrays["renormalize"].ravel()[0])
        if not 0 <= kind < len(RENORMALIZE):
            raise ValueError(f"statistics with renormalize = {kind}; expected 0, 1 or 2")
        mean, median, scatter = (arrays[name].astype(np.float32) for name in ("mean", "median", "scatter"))
        rows, snr_min = int(arrays["rows"].ravel()[0]), float(arrays["snr_min"].ravel()[0])
        return cls(rows, arrays["keep"].astype(bool), mean, median, scatter, snr_min, RENORMALIZE[kind])

    @cached_property
    def digest(self) -> str:
        """Name these statistics: 12 hexadecimal digits of the SHA-256 of their arrays."""
        sha = hashlib.sha256()
        for name, array in sorted(self.to_arrays().items()):
            sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()[:12]

    def __repr__(self) -> str:
        parts = [f"{self.rows} spectra", f"{int(self._kept.sum())} of {len(self.keep)} pixels kept"]
        parts += [f"{self.renormalize} again"] * (self.renormalize != "none")
        parts += ["divided by mean"] * self._divides + ["filled"] * bool(self._fills.any())
        parts += [f"snr >= {self.snr_min:g}"] * bool(np.isfinite(self.snr_min))
        return f"Statistics({', '.join(parts)})"


def _factor(
    flux: Float32[np.ndarray, "n pixels"], good: Bool[np.ndarray, "n pixels"], kind: Again
) -> Float32[np.ndarray, "n"]:
    scale = row_median(flux, good) if kind == "median" else row_mean(flux, good)
    sound = (scale > FLOAT32.tiny) & (scale <= FLOAT32.max)
    return np.where(sound, 1.0 / np.where(sound, scale, 1.0), np.nan).astype(np.float32)


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
                factor = _factor(flux, good, self.renormalize)
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
