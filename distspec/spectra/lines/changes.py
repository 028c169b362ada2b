"""What grows and what fades between two spectra, as lines and regions with names."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy.ndimage import median_filter

from distspec.spectra import LIGHT_SPEED, WaveGrid
from distspec.spectra.lines.wavelengths import nearest_line
from distspec.spectra.segments import run_around

__all__ = ["Change", "changes"]

_LISTED: Final = 3
"""Changes of each sign that are named."""

_SHARE: Final = 0.25
"""Of the strongest change; weaker ones are not named."""

_BROAD: Final = 30_000.0
"""km/s; what varies more slowly is continuum. Broad lines of quasars are a third of it."""

_EDGE: Final = 0.2
"""Of its peak; there a line ends."""


@dataclass(frozen=True)
class Change:
    """A line or region whose flux changes along a way.

    Arguments:
        low, high: where it begins and ends, Å on the store's axis.
        peak: where it is strongest, Å.
        amount: change of flux at the peak, of a line less that of the continuum; positive where it grows.
        line: the line nearest to the peak, if any is near; None for a region of the continuum, too.
        broad: whether it is a region of the continuum.
        seen: whether the spectrum has a good pixel there.
    """

    low: float
    high: float
    peak: float
    amount: float
    line: str | None = None
    broad: bool = False
    seen: bool = True

    @property
    def label(self) -> str:
        """Where it is, in words."""
        place = f"{self.low:.0f}–{self.high:.0f} Å" if self.broad else f"{self.peak:.0f} Å"
        return f"{self.line} ({place})" if self.line else place


def changes(
    growth: Float32[np.ndarray, "pixels"],
    grid: WaveGrid,
    redshift: float | None = None,
    good: Bool[np.ndarray, "pixels"] | None = None,
) -> list[Change]:
    """Name the lines and regions that change most, strongest first.

    What varies slowly along wavelength (a running median over 30,000 km/s) is continuum: of it the part around the
    strongest growth and that around the strongest fading count as a region each. What is left are lines.

    Arguments:
        growth: of flux.
        grid: wavelengths.
        redshift: of lines on this grid; None for the rest frame.
        good: pixels where the spectrum has data; none takes all.
    """
    change = growth.astype(np.float64)
    strongest = float(np.abs(change).max())
    if not 0 < strongest < np.inf:
        return []
    middle = grid.pixels // 2
    pixel = LIGHT_SPEED * (grid.edges[middle + 1] / grid.edges[middle] - 1)
    continuum = median_filter(change, size=min(grid.pixels, 2 * int(_BROAD / pixel / 2) + 1), mode="nearest")
    seen = np.ones(grid.pixels, bool) if good is None else good
    found = []
    for sign in (1.0, -1.0):
        found += _region(sign * continuum, strongest, sign, grid, seen)
        found += _lines(sign * (change - continuum), change, strongest, sign, grid, redshift, seen)
    return sorted(found, key=lambda one: -abs(one.amount))


def _region(
    level: Float64[np.ndarray, "pixels"],
    strongest: float,
    sign: float,
    grid: WaveGrid,
    seen: Bool[np.ndarray, "pixels"],
) -> list[Change]:
    """Find the run of the continuum around its largest value in which it is above half of this."""
    peak = int(level.argmax())
    if level[peak] < _SHARE * strongest:
        return []
    start, stop = run_around(level > 0.5 * level[peak], peak)
    low, high, top = float(grid.edges[start]), float(grid.edges[stop]), float(grid.wave[peak])
    return [Change(low, high, top, sign * float(level[peak]), broad=True, seen=bool(seen[start:stop].any()))]


def _lines(
    detail: Float64[np.ndarray, "pixels"],
    change: Float64[np.ndarray, "pixels"],
    strongest: float,
    sign: float,
    grid: WaveGrid,
    redshift: float | None,
    seen: Bool[np.ndarray, "pixels"],
) -> list[Change]:
    """Find the peaks over the continuum that change in its own direction, strongest first; each ends where it has
    fallen to a fifth.
    """
    found: list[Change] = []
    left = np.where(sign * change > 0, detail, 0.0)
    for _ in range(_LISTED):
        peak = int(left.argmax())
        if left[peak] < _SHARE * strongest:
            break
        start, stop = run_around(detail > _EDGE * detail[peak], peak)
        wave = float(grid.wave[peak])
        ends = float(grid.edges[start]), float(grid.edges[stop])
        amount = sign * float(detail[peak])
        found.append(Change(*ends, wave, amount, nearest_line(wave, redshift), seen=bool(seen[start:stop].any())))
        left[start:stop] = 0.0
    return found
