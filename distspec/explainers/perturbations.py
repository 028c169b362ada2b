"""What stands in a spectrum where a segment is switched off ("fudge" in the public code of Ortiz & Boquien)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.ndimage import gaussian_filter1d

from distspec.config import (
    AnyPerturbation,
    Flat,
    Gaussians,
    Reconstructed,
    SameShape,
    Scale,
    SegmentMean,
    Unchanged,
)
from distspec.spectra import Spectra

__all__ = ["perturb"]

Values = Float64[np.ndarray, "n pixels"]


def perturb(
    spectra: Spectra,
    segment_of: Int64[np.ndarray, "pixels"],
    perturbation: AnyPerturbation,
    smoothing: float,
    seed: int = 0,
    reconstruct: Callable[[Spectra], Float32[np.ndarray, "n pixels"]] | None = None,
) -> Float32[np.ndarray, "n pixels"]:
    """Make the version of each spectrum that shows where a segment is switched off.

    A spectrum is parted into shape (a Gaussian smoothing that ignores masked pixels) and noise (the rest). White noise
    is drawn by seed and row, so that it does not depend on what else is explained.

    References:
        vae_scores_lime §4.4 (the public code's `fudge.py`).

    Arguments:
        spectra: n of them.
        segment_of: segment of each pixel.
        perturbation: what takes its place.
        smoothing: standard deviation of the Gaussian, pixels.
        seed: of white noise.
        reconstruct: gives the model's reconstruction.

    Returns:
        Perturbed flux; masked pixels are left as they are, and have no influence on the others.
    """
    good = spectra.good
    flux = np.where(good, spectra.flux, 0.0).astype(np.float64)
    shape = _shape(flux, good, smoothing)
    noise = flux - shape

    def white(sigma: float) -> Values:
        draws = [np.random.default_rng([seed, int(row)]).normal(size=flux.shape[1]) for row in spectra.rows]
        return sigma * np.array(draws).reshape(flux.shape)

    match perturbation:
        case Scale(factor=factor, same_noise=same):
            about = shape if same else flux
            median = np.nanmedian(np.where(good, about, np.nan), axis=1, keepdims=True)
            changed = (about - median) * factor + median + (noise if same else 0.0)
        case Flat(level=level, same_noise=same, sigma=sigma):
            changed = level + (noise if same else white(sigma))
        case SegmentMean(same_noise=same, sigma=sigma):
            changed = _segment_means(flux, good, segment_of) + (noise if same else white(sigma))
        case SameShape(sigma=sigma):
            changed = shape + white(sigma)
        case Gaussians(amplitude=amplitude, same_noise=same, sigma=sigma):
            changed = (flux if same else shape + white(sigma)) + amplitude * _bumps(segment_of)
        case Reconstructed(same_noise=same):
            if reconstruct is None:
                raise ValueError("perturbation 'reconstruction' without a model")
            changed = reconstruct(spectra) + (noise if same else 0.0)
        case Unchanged():
            changed = flux
    return np.where(good, changed, spectra.flux).astype(np.float32)


def _shape(flux: Values, good: Bool[np.ndarray, "n pixels"], smoothing: float) -> Values:
    # 'nearest' continues the edge pixel outward, and 4 sigma makes 25 taps at sigma = 3, as in the reference.
    blurred = [
        gaussian_filter1d(part, smoothing, axis=1, mode="nearest", truncate=4.0)
        for part in (flux, good.astype(np.float64))
    ]
    return np.asarray(np.divide(blurred[0], blurred[1], out=np.zeros_like(flux), where=good))


def _segment_means(flux: Values, good: Bool[np.ndarray, "n pixels"], segment_of: Int64[np.ndarray, "pixels"]) -> Values:
    """Give each pixel the mean of the good pixels of its segment."""
    members = (segment_of[:, None] == np.arange(segment_of[-1] + 1)).astype(np.float64)
    count = good @ members
    means = np.divide((flux * good) @ members, count, out=np.zeros_like(count), where=count > 0)
    return np.asarray(means[:, segment_of])


def _bumps(segment_of: Int64[np.ndarray, "pixels"]) -> Float64[np.ndarray, "pixels"]:
    """Put a Gaussian of height 1 on the middle of each segment, σ an eighth of its width.

    As in the public code the last one is left out where its segment is less than half as wide as the one before.
    (There its centre, of a segment of another width, is misplaced; not so here.)
    """
    starts = np.flatnonzero(np.diff(segment_of, prepend=-1))
    widths = np.diff(np.append(starts, segment_of.size))
    heights = np.ones(widths.size)
    if widths.size > 1 and widths[-1] < 0.5 * widths[-2]:
        heights[-1] = 0.0
    number = np.repeat(np.arange(widths.size), widths)
    centre, sigma = (starts + 0.5 * (widths - 1))[number], (widths / 8.0)[number]
    return np.asarray(heights[number] * np.exp(-0.5 * ((np.arange(segment_of.size) - centre) / sigma) ** 2))
