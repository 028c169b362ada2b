"""Where a change makes a spectrum odd: pixels of windows, of a change's heaviest part, of a companion's features."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64
from scipy.ndimage import gaussian_filter1d

from distspec.spectra import WaveGrid

__all__ = ["HEAVY", "contrast", "heavy", "smooth", "windows"]

HEAVY = 0.2
"""A pixel belongs to a region from this part of the largest change on: a Gaussian line's out to 1.8 σ."""

Pixels = Float64[np.ndarray, "n pixels"]

Mask = Bool[np.ndarray, "n pixels"]

Values = Float64[np.ndarray, "n"]


def windows(grid: WaveGrid, pairs: Sequence[tuple[float, float]], stretch: Values) -> Mask:
    """Mark pixels that overlap a window (Å), at `stretch` times its wavelengths."""
    found = np.zeros((len(stretch), grid.pixels), dtype=bool)
    for low, high in pairs:
        found |= (grid.edges[1:] > (low * stretch)[:, None]) & (grid.edges[:-1] < (high * stretch)[:, None])
    return found


def heavy(change: Pixels, good: Mask) -> Mask:
    """Mark the good pixels with much of the change; none where nothing changes."""
    size = gaussian_filter1d(np.where(good, np.abs(change), 0.0), 1.0, axis=1, mode="constant")
    most = np.where(good, size, 0.0).max(axis=1, keepdims=True, initial=0.0)
    return np.asarray(good & (size >= HEAVY * most) & (most > 0))


def contrast(light: Pixels, variance: Pixels, good: Mask, grid: WaveGrid) -> Mask:
    """Mark features of a companion: what stands out from its continuum by much, and by four of its errors."""
    pixel = np.log(grid.wave[-1] / grid.wave[0]) / grid.pixels
    contrast = np.where(good, np.abs(smooth(light, good, 1.0) - smooth(light, good, max(0.01 / pixel, 4.0))), 0.0)
    # A Gaussian of one pixel averages noise down to 1 / sqrt(2 sqrt(π)) of it.
    error = np.sqrt(variance / (2.0 * np.sqrt(np.pi)))
    clear = good & (contrast >= 4.0 * error)
    most = np.where(clear, contrast, 0.0).max(axis=1, keepdims=True, initial=0.0)
    ratio = contrast / np.where(error > 0, error, 1.0)
    best = good & (ratio == ratio.max(axis=1, keepdims=True, initial=0.0)) & ~clear.any(axis=1)[:, None]
    return np.asarray((clear & (contrast >= HEAVY * most)) | best)


def smooth(values: Pixels, good: Mask, sigma: float) -> Pixels:
    """Average over good pixels with a Gaussian of `sigma` pixels; 0 where none is near."""
    total, weight = (gaussian_filter1d(part * good, sigma, axis=1, mode="constant") for part in (values, 1.0))
    return np.asarray(np.divide(total, weight, out=np.zeros_like(total), where=weight > 1e-6))
