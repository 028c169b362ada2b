"""From one wavelength grid to another, shifted by a redshift: three ways, each with its errors.

`conserve` keeps Σ f Δλ and propagates all errors; the other two are what papers did, for comparability with them. All
treat a whole batch with one redshift a row, and none lets a masked pixel change a bit of the result.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from distspec.spectra import WaveGrid

__all__ = ["BLOCK", "Method", "rebin"]

BLOCK = 32
"""Spectra treated at once: their temporaries then stay in a core's cache."""

Method = Literal["conserve", "average", "linear"]

Pixels = Float[np.ndarray, "n pixels"]

Bins = Float[np.ndarray, "n bins"]

Edges = Shaped[np.ndarray, "n edges"]

Places = Float64[np.ndarray, "n places"]

Values = Float[np.ndarray, "n"]

ON_CENTER = 1e-9
"""Part of a pixel within which a wavelength counts as a pixel's own: rounding of a grid's decimals is smaller."""


def rebin(
    flux: Pixels, ivar: Pixels, source: WaveGrid, target: WaveGrid, redshift: Values, method: Method = "conserve"
) -> tuple[Bins, Bins]:
    """Bring each spectrum to the target grid, placed at (1 + z) times its wavelengths.

    `conserve`: with w_ij the overlap in Å of source pixel i and target bin j, over good pixels only,

        f_j = Σ_i w_ij f_i / Σ_i w_ij        ivar_j = (Σ_i w_ij)² / Σ_i w_ij² σ_i²

    so Σ f Δλ is conserved. A bin is masked when good pixels cover less than half of it. `average`: the plain mean of
    the n good pixels whose center lies in the bin (lower edge included), and ivar = n² / Σ σ²; an empty bin is masked.
    `linear`: flux and variance each interpolated linearly between the two pixel centers around the bin's center; masked
    where either is masked, or outside the outermost centers. As in the paper the interpolated variance is not that of
    the interpolated flux, which would be smaller: errors of neighbors are taken as one.

    Rebinned pixels that share a source pixel are correlated; the inverse variance is the diagonal only. No running sum
    over the spectrum is taken: its differences would spread the rounding of one bright pixel over all redder bins.
    Without a redshift, a spectrum on the target's own grid comes back as it is, in every bit.

    References:
        `conserve`: Carnall 2017, SpectRes, eqs. 2-4, https://arxiv.org/abs/1705.05165. `average`: Böhm, Kim & Juneau
        2023, section 2. `linear`: Ortiz & Boquien 2025, public code, `interpolate.py`.

    Arguments:
        flux: flux density on the source grid, finite where ivar > 0.
        ivar: inverse variance, 0 where masked.
        source: observed-frame grid of the input.
        target: grid of the result, in the frame that the redshift leads to.
        redshift: z for each spectrum, 0 to stay in the observed frame. Where it is not finite or not above -1, the
            row comes back masked.
        method: see above.

    Returns:
        Flux density per observed Å and its inverse variance on the target grid; both 0 in a masked bin.
    """
    known = np.isfinite(redshift) & (redshift > -1)
    own = known & (redshift == 0) & (source == target)
    if (own | ~known).all() and source == target:
        good = (ivar > 0) & own[:, None]
        return np.where(good, flux, 0.0), np.where(good, ivar, 0.0)
    one = {"conserve": _conserve, "average": _average, "linear": _linear}[method]
    stretch = np.where(known, 1.0 + redshift, 1.0)[:, None]
    out_flux, out_ivar = np.empty((2, len(flux), target.pixels))
    for start in range(0, len(flux), BLOCK):
        rows = slice(start, start + BLOCK)
        new_flux, new_ivar = one(flux[rows], ivar[rows], source, target, stretch[rows])
        usable = (new_ivar > 0) & known[rows, None]
        out_flux[rows], out_ivar[rows] = np.where(usable, new_flux, 0.0), np.where(usable, new_ivar, 0.0)
    if own.any():
        # The sums above would change the last bit, and then a row would depend on its batch.
        good = ivar[own] > 0
        out_flux[own], out_ivar[own] = np.where(good, flux[own], 0.0), np.where(good, ivar[own], 0.0)
    return out_flux, out_ivar


def _conserve(
    flux: Pixels, ivar: Pixels, source: WaveGrid, target: WaveGrid, stretch: Float64[np.ndarray, "n 1"]
) -> tuple[Bins, Bins]:
    """Rebin a few rows by overlap.

    The edges of the bins fall into certain source pixels, which are shared out by fraction. All other pixels lie whole
    in one bin, so these are runs of neighbors in memory, which `np.add.reduceat` adds up in one call.
    """
    cell, fraction = _locate(source, target, stretch)
    same = cell[:, 1:] == cell[:, :-1]
    first = np.where(same, fraction[:, 1:], 1.0) - fraction[:, :-1]
    last = np.where(same, 0.0, fraction[:, 1:])
    index = (cell + np.arange(len(flux))[:, None] * source.pixels).ravel()

    def gather(values: Pixels, first: Bins, last: Bins) -> Bins:
        flat = values.ravel()
        shared = flat[index].reshape(cell.shape)
        flat[index] = 0.0
        whole: Edges = np.add.reduceat(flat, index).reshape(cell.shape)
        return np.asarray(whole[:, :-1] + first * shared[:, :-1] + last * shared[:, 1:])

    width, good = np.diff(source.edges), ivar > 0
    covered = gather(width * good, first, last)
    # Dividing by 1 where masked, times `good`, is faster than numpy's `where=`.
    variance = gather(width * width * good / np.where(good, ivar, 1.0), first * first, last * last)
    usable = covered >= 0.5 * np.diff(target.edges) * stretch
    total = gather(width * np.where(good, flux, 0.0), first, last)
    rebinned = np.divide(total, covered, out=np.zeros_like(total), where=usable)
    return rebinned, np.divide(covered * covered, variance, out=np.zeros_like(total), where=usable)


def _locate(source: WaveGrid, target: WaveGrid, stretch: Float64[np.ndarray, "n 1"]) -> tuple[Edges, Edges]:
    """Find the source pixel that holds each edge of the stretched target bins, and the share of it bluer than the edge.

    Edges beyond the source end at its border, where the share is 0 or 1.
    """
    edges = target.edges * stretch
    position = _position(source, target.edges, stretch)
    cell = np.clip(position + 0.5, 0, source.pixels - 1).astype(np.intp)
    fraction = (edges - source.edges[cell]) / np.diff(source.edges)[cell]
    # Where edges coincide, rounding leaves a share of about 1e-12, by which a saturated pixel would reach its neighbor.
    fraction[fraction < ON_CENTER] = 0.0
    fraction[fraction > 1.0 - ON_CENTER] = 1.0
    return cell, fraction


def _position(
    source: WaveGrid, wave: Float64[np.ndarray, "places"], stretch: Float64[np.ndarray, "n 1"]
) -> Float64[np.ndarray, "n places"]:
    """Give the fractional source pixel of each stretched wavelength; 0 is the first pixel's center."""
    if source.scale == "log":
        # The same as source.position(wave * stretch), with one logarithm for each spectrum instead of each wavelength.
        return np.asarray(source.position(wave) + np.log10(stretch) / source.step)
    return source.position(wave * stretch)


def _average(
    flux: Pixels, ivar: Pixels, source: WaveGrid, target: WaveGrid, stretch: Float64[np.ndarray, "n 1"]
) -> tuple[Bins, Bins]:
    """Average the pixels whose center lies in a bin, for a few rows.

    Bins follow one another without gap, so the pixels of bin j run from the first center at or beyond edge j to the
    last one before edge j + 1.
    """
    position = np.clip(_position(source, target.edges, stretch), 0.0, source.pixels)
    # A center that is an edge but for rounding belongs to the redder bin.
    begin: Int64[np.ndarray, "n edges"] = np.ceil(position - ON_CENTER).astype(np.int64)
    n, width = len(flux), source.pixels + 1
    index = (begin + np.arange(n)[:, None] * width).ravel()
    empty = begin[:, 1:] == begin[:, :-1]
    good = ivar > 0

    def gather(values: Pixels) -> Bins:
        # The column of zeros lets an edge lie behind the last pixel.
        padded = np.zeros((n, width))
        padded[:, :-1] = values
        sums: Edges = np.add.reduceat(padded.ravel(), index).reshape(begin.shape)
        return np.where(empty, 0.0, sums[:, :-1])  # of an empty run reduceat gives its first element, not 0

    count = gather(good)
    total = gather(np.where(good, flux, 0.0))
    variance = gather(good / np.where(good, ivar, 1.0))
    usable = count > 0
    mean = np.divide(total, count, out=np.zeros_like(total), where=usable)
    return mean, np.divide(count * count, variance, out=np.zeros_like(total), where=usable)


def _linear(
    flux: Pixels, ivar: Pixels, source: WaveGrid, target: WaveGrid, stretch: Float64[np.ndarray, "n 1"]
) -> tuple[Bins, Bins]:
    """Interpolate flux and variance at the bins' centers, for a few rows."""
    last = source.pixels - 1
    position = _position(source, target.wave, stretch)
    whole = np.rint(position)
    between = np.abs(position - whole) >= ON_CENTER
    # On a center, the pixel's neighbor must not matter, masked or not: both ends are then the pixel itself.
    left = np.where(between, np.minimum(np.floor(position), last - 1), whole)
    left = np.clip(left, 0, last).astype(np.int64)
    # Linear in Å, as np.interp is: on a log grid the share of the position would be another.
    share = (target.wave * stretch - source.wave.take(left)) * (1.0 / np.diff(source.edges)).take(left)
    if source.scale == "log":
        # From one center to the next is as far as between the edges, but for the factor of half a pixel.
        share *= 10.0 ** (-0.5 * source.step)
    share *= between
    good = ivar > 0
    # A masked pixel hands its NaN on to all that it touches.
    variance = np.where(good, 1.0 / np.where(good, ivar, 1.0), np.nan).ravel()
    values = np.where(good, flux, 0.0).ravel()
    left += np.arange(len(flux))[:, None] * source.pixels
    right = left + (between & (position < last))
    spread = variance.take(left)
    spread += share * (variance.take(right) - spread)
    new = values.take(left)
    new += share * (values.take(right) - new)
    usable = (position > -ON_CENTER) & (position < last + ON_CENTER) & (spread > 0)
    return new, np.where(usable, 1.0 / np.where(usable, spread, 1.0), 0.0)
