"""Spectra that come with their wavelengths: the uniform grid these lie on, and each pixel's place on it.

Pixels are placed by their wavelengths, in whatever order they come, and never resampled. Surveys round wavelengths to
float32 or to a few decimals; the grid that is recognized is the one that was meant.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from distspec.sources.conventions import GRID_TOLERANCE
from distspec.spectra import WaveGrid

__all__ = ["grid_between", "on_grid", "place_pixels", "uniform_grid"]

_DRIFT = 1e-3
"""Share of a pixel by which a grid's parameters may be rounded, over its whole length."""


def uniform_grid(wave: Float64[np.ndarray, "m"]) -> WaveGrid | None:
    """Recognize the grid of one spectrum's wavelengths, which may have gaps, run backwards and be rounded.

    Arguments:
        wave: Å vacuum; what is not finite or not positive is padding.

    Returns:
        The grid from the least to the greatest wavelength; None where none is uniform, wavelengths repeat, or there
        are so few that a linear and a logarithmic grid fit alike.
    """
    known = np.sort(wave[np.isfinite(wave) & (wave > 0)])
    if len(known) < 3 or (np.diff(known) <= 0).any():
        return None
    scales: tuple[Literal["log", "linear"], ...] = ("log", "linear")
    fits = [grid for grid in (_fit(known, scale) for scale in scales) if grid is not None]
    return fits[0] if len(fits) == 1 else None


def _fit(wave: Float64[np.ndarray, "m"], scale: Literal["log", "linear"]) -> WaveGrid | None:
    values = np.log10(wave) if scale == "log" else wave
    steps = np.diff(values)
    # Single steps are rounded; their mean over runs without a gap is not, for the roundings cancel.
    regular = np.abs(steps / np.median(steps) - 1) < 0.05
    if not regular.any():
        return None
    number = np.rint((values - values[0]) / steps[regular].mean())
    pixels = int(number[-1]) + 1
    step, first = np.polyfit(number, values, 1)
    # Rounded to the fewest decimals that leave every pixel where it is.
    step = _round(step, _DRIFT * step / pixels)
    first = _round(first, _DRIFT * step)
    if np.abs(values - (first + step * number)).max() > GRID_TOLERANCE * step:
        return None
    return WaveGrid(scale, float(10.0**first if scale == "log" else first), float(step), pixels)


def _round(value: float, slack: float) -> float:
    return next((near for near in (round(value, digits) for digits in range(16)) if abs(near - value) <= slack), value)


def grid_between(grid: WaveGrid, first: float, last: float) -> WaveGrid:
    """Give the grid with the same pixels that spans `first` to `last` (Å)."""
    low, high = (int(np.rint(grid.position(np.asarray(end)))) for end in (first, last))
    if grid.scale == "log":
        # By its decimals, which the sum of rounded steps would blur.
        start = 10.0 ** _round(float(np.log10(grid.first) + low * grid.step), _DRIFT * grid.step)
    else:
        start = _round(grid.first + low * grid.step, _DRIFT * grid.step)
    return WaveGrid(grid.scale, float(start), grid.step, high - low + 1)


def on_grid(
    grid: WaveGrid, wave: Float64[np.ndarray, "m"]
) -> tuple[Int64[np.ndarray, "m"], Bool[np.ndarray, "m"], Bool[np.ndarray, "m"]]:
    """Give each wavelength's pixel number, whether it is at a pixel's center, and whether that is on the grid."""
    with np.errstate(divide="ignore", invalid="ignore"):
        position = grid.position(wave)
    known = np.isfinite(position) & (np.abs(position) < 1e9)
    number = np.rint(np.where(known, position, -1)).astype(np.int64)
    center = known & (np.abs(position - number) <= GRID_TOLERANCE)
    return number, center, (number >= 0) & (number < grid.pixels)


def place_pixels(
    grid: WaveGrid,
    lengths: Int64[np.ndarray, "n"],
    wave: Float64[np.ndarray, "m"],
    flux: Float32[np.ndarray, "m"],
    ivar: Float32[np.ndarray, "m"],
) -> tuple[Float32[np.ndarray, "n pixels"], Float32[np.ndarray, "n pixels"], list[str]]:
    """Place the pixels of several spectra, which lie one behind the other, on the grid.

    Only good pixels (ivar positive and finite, flux finite) must be on it; padding may hold anything.

    Arguments:
        grid: where they should lie.
        lengths: pixels of each spectrum.
        wave: Å vacuum.
        flux: flux density.
        ivar: its inverse variance.

    Returns:
        Flux, inverse variance, and for each spectrum why it cannot be placed, empty if it can. One that cannot is 0.
    """
    count = len(lengths)
    row = np.repeat(np.arange(count), lengths)
    finite = np.isfinite(flux)
    good = finite & (ivar > 0) & np.isfinite(ivar)
    number, center, inside = on_grid(grid, wave)
    target = row * grid.pixels + number
    seen = np.bincount(target[good & center & inside], minlength=count * grid.pixels).reshape(count, grid.pixels)
    faults = {
        "good pixels without a wavelength": _rows_with(good & ~(np.isfinite(wave) & (wave > 0)), row, count),
        f"wavelengths off the pixel centers of {grid}": _rows_with(good & ~center, row, count),
        f"good pixels outside {grid}": _rows_with(good & ~inside, row, count),
        "a repeated wavelength": (seen > 1).any(axis=1),
    }
    reasons = [""] * count
    for reason, rows in reversed(faults.items()):
        for index in np.flatnonzero(rows):
            reasons[index] = reason
    fits = np.array([not reason for reason in reasons], bool)
    out_flux, out_ivar = np.zeros((2, count * grid.pixels), np.float32)
    placed = center & inside & fits[row]
    masked, usable = placed & finite & ~good, placed & good
    out_flux[target[masked]] = flux[masked]
    out_flux[target[usable]], out_ivar[target[usable]] = flux[usable], ivar[usable]
    return out_flux.reshape(count, -1), out_ivar.reshape(count, -1), reasons


def _rows_with(condition: Bool[np.ndarray, "m"], row: Int64[np.ndarray, "m"], count: int) -> Bool[np.ndarray, "n"]:
    return np.asarray(np.bincount(row[condition], minlength=count) > 0)
