"""Wavelength regions as runs of pixels, sums over each, and how rare a value is in each."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from distspec.config import Pca
from distspec.errors import ConfigError
from distspec.spectra import WaveGrid

__all__ = ["MENU", "Rarity", "Regions"]

MENU: Final[tuple[tuple[float, float], ...]] = (
    (3600.0, 4150.0),
    (4150.0, 4700.0),
    (4700.0, 5100.0),  # H beta, [O III]
    (5100.0, 5680.0),  # Mg
    (5680.0, 6120.0),  # Na I D, He I 5877
    (6120.0, 6400.0),  # [O I]
    (6400.0, 6700.0),  # H alpha, [N II]
    (6700.0, 7000.0),  # [S II]
)
"""Regions of the maps of Reis et al., rest-frame Å [low, high]."""

_FEWEST: Final = 5
"""Pixels of a region that nobody asked for by name."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Contiguous runs of pixels, which may overlap.

    Arguments:
        starts: first pixel of each region.
        stops: one past the last.
        pixels: of the grid.
    """

    starts: Int64[np.ndarray, "regions"]
    stops: Int64[np.ndarray, "regions"]
    pixels: int

    @classmethod
    def of(cls, settings: Pca, grid: WaveGrid, rest: bool) -> "Regions":
        """Choose the regions: those of the settings, or the menu of Reis et al.; then windows over the whole grid.

        The menu is of the rest frame: without redshift in the grid only windows are left. A pixel belongs where its
        centre lies. Windows slide by half their width and the last one ends with the grid. Regions of the menu and
        windows of fewer than 5 pixels are left out, and so is what is there already.

        Arguments:
            settings: `regions` and `window`.
            grid: of the spectra.
            rest: whether the grid is in the rest frame.

        Raises:
            ConfigError: a region of the settings holds no pixel, or there is no region.
        """
        runs: dict[tuple[int, int], None] = {}
        for low, high in settings.regions:
            start, stop = _run(grid, low, high)
            if stop <= start:
                raise ConfigError(
                    f"region {low:g} to {high:g} Å of detector {settings.name!r} holds no pixel of the grid "
                    f"{grid.wave[0]:.1f} to {grid.wave[-1]:.1f} Å; expected [low, high] on it; change `regions`"
                )
            runs[start, stop] = None
        spare = list(MENU) if rest and not settings.regions else []
        if settings.window is not None:
            spare += _windows(grid, settings.window)
        for low, high in spare:
            start, stop = _run(grid, low, high)
            if stop - start >= _FEWEST:
                runs.setdefault((start, stop))
        if not runs:
            raise ConfigError(
                f"detector {settings.name!r} has no region of {_FEWEST} pixels or more on {grid}; "
                f"expected one at least; widen `window` or set `regions`"
            )
        starts, stops = np.array(list(runs), np.int64).T
        return cls(starts, stops, grid.pixels)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def widths(self) -> Int64[np.ndarray, "regions"]:
        """Pixels of each region."""
        return np.asarray(self.stops - self.starts)

    def edges(self, grid: WaveGrid) -> list[list[float]]:
        """Give [low, high] of each region, from edge to edge of its pixels, Å."""
        low, high = grid.edges[self.starts], grid.edges[self.stops]
        return [[round(float(a), 3), round(float(b), 3)] for a, b in zip(low, high, strict=True)]

    def sums(self, values: Float[np.ndarray, "n pixels"]) -> Float64[np.ndarray, "n regions"]:
        """Add up non-negative values over each region.

        Each run of pixels between two borders is added once, and regions are sums of such runs: faster than a product
        with all pixels, and a huge value outside of a region costs it no digit, as differences of cumulative sums do.
        """
        runs = np.add.reduceat(values, self._borders, axis=1, dtype=np.float64)
        return np.asarray(runs @ self._members)

    @cached_property
    def _borders(self) -> Int64[np.ndarray, "runs"]:
        borders = np.unique(np.concatenate([[0], self.starts, self.stops]))
        return np.asarray(borders[borders < self.pixels])

    @cached_property
    def _members(self) -> Float64[np.ndarray, "runs regions"]:
        borders = self._borders[:, None]
        return ((borders >= self.starts) & (borders < self.stops)).astype(np.float64)


def _run(grid: WaveGrid, low: float, high: float) -> tuple[int, int]:
    """Find the pixels whose centres lie in [low, high)."""
    start, stop = np.searchsorted(grid.wave, [low, high])
    return int(start), int(stop)


def _windows(grid: WaveGrid, width: float) -> list[tuple[float, float]]:
    low, high = float(grid.edges[0]), float(grid.edges[-1])
    if width >= high - low:
        return [(low, high)]
    if width < (_FEWEST - 1) * np.diff(grid.edges).min():
        return []
    starts = np.append(np.arange(low, high - width, width / 2), high - width)
    return [(float(start), float(start + width)) for start in starts]


@dataclass(frozen=True, eq=False)
class Rarity:
    """How often values of each size occurred in each region: counts in logarithmic bins, which add up.

    Bins are 0.01 dex wide from 1e-18 to 1e18; values beyond fall in the outermost. NaN is not counted.
    """

    counts: Int64[np.ndarray, "regions bins"]

    LOW = -18.0
    HIGH = 18.0
    BINS = 3_600
    TAIL = 0.01
    """Share of the values, the largest, that the tail is fitted to, and no fewer than `FEWEST` if there are so many."""
    FEWEST = 50
    INDEX = (0.5, 4.0)
    """Bounds of the tail's index. A steeper one would let what components carry of a huge spike into quiet regions
    outweigh the spike itself."""

    @classmethod
    def zero(cls, regions: int) -> "Rarity":
        """Give the counts of no values."""
        return cls(np.zeros((regions, cls.BINS), np.int64))

    @classmethod
    def of(cls, values: Float64[np.ndarray, "n regions"]) -> "Rarity":
        """Count a batch of non-negative values."""
        regions = values.shape[1]
        bins = np.clip(np.floor(cls._place(values)), 0, cls.BINS - 1) + np.arange(regions) * cls.BINS
        counts = np.bincount(bins[~np.isnan(values)].astype(np.int64), minlength=regions * cls.BINS)
        return cls(counts.astype(np.int64).reshape(regions, cls.BINS))

    def __add__(self, other: "Rarity") -> "Rarity":
        return Rarity(self.counts + other.counts)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Give the counts by name."""
        return {"counts": self.counts}

    @classmethod
    def _place(cls, values: Float64[np.ndarray, "n regions"]) -> Float64[np.ndarray, "n regions"]:
        """Give the fractional bin of each value."""
        logs = np.log10(np.maximum(values, 1e-300))
        return np.asarray((logs - cls.LOW) * (cls.BINS / (cls.HIGH - cls.LOW)))

    def surprise(self, values: Shaped[np.ndarray, "n regions"]) -> Float64[np.ndarray, "n regions"]:
        """Give -log10 of the share of values that are as large: P = (count + 1) / (N + 1).

        Between the lower edges of bins that hold values, log P is linear in the logarithm of the value, and beyond the
        last of them it falls as a power law with Hill's index of the largest 1 %. From the first of these on, P is also
        no larger than that power law alone: an outlier far beyond all others is the rarer the farther it is, which
        counts, being one, do not tell. The result is continuous and does not fall with the value. NaN stays NaN; where
        nothing was counted nothing is rare.

        References:
            Hill 1975, Annals of Statistics 3, 1163.
        """
        curve, first, last, index = self._curves
        place = self._place(values.astype(np.float64))
        at = np.clip(np.nan_to_num(place), 0, last)
        left = np.minimum(at.astype(np.int64), self.BINS - 1)
        region = np.arange(len(curve))
        low, high = curve[region, left], curve[region, left + 1]
        counted = low + (high - low) * (at - left) + index * np.maximum(place - last, 0.0)
        tail = curve[region, first] + index * np.maximum(place - first, 0.0)
        return np.asarray(np.where(place > first, np.maximum(counted, tail), counted))

    @cached_property
    def _curves(
        self,
    ) -> tuple[
        Float64[np.ndarray, "regions edges"],
        Int64[np.ndarray, "regions"],
        Int64[np.ndarray, "regions"],
        Float64[np.ndarray, "regions"],
    ]:
        """Give the surprise at each edge of bins, the first and last bin of each tail, and its index per bin."""
        total = self.counts.sum(axis=1)
        above = self.counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        levels = np.log10((total[:, None] + 1) / (above + 1))
        curve = np.zeros((len(total), self.BINS + 1))
        for region in np.flatnonzero(total):
            held = np.flatnonzero(self.counts[region])
            curve[region] = np.interp(np.arange(self.BINS + 1), held, levels[region, held])
        enough = np.minimum(np.maximum(np.ceil(self.TAIL * total), self.FEWEST), total)
        first = np.where(total > 0, (above >= enough[:, None]).sum(axis=1) - 1, 0)
        last = np.where(total > 0, (above > 0).sum(axis=1) - 1, 0)
        # Each value is taken to lie in the middle of its bin, so that one bin of equal values has a tail, too.
        bins = np.maximum(np.arange(self.BINS) + 0.5 - first[:, None], 0.0)
        step = (self.HIGH - self.LOW) / self.BINS
        mean = (self.counts * bins).sum(axis=1) / np.maximum(above[np.arange(len(total)), first], 1)
        index = np.clip(1.0 / np.maximum(mean * step * np.log(10.0), 1e-9), *self.INDEX)
        return curve, first, last, np.where(total > 0, index * step, 0.0)
