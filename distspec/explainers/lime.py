"""LIME for spectra: switch segments of a spectrum off at random, score, and fit a local linear model.

The random masks, their kernel weights and the ridge system do not depend on the spectrum. The whole surrogate fit is
therefore one constant matrix, made once, and fitting any number of spectra is one matrix product. With equal masks the
result equals that of the `lime` package (to rounding).

References:
    Ribeiro, Singh & Guestrin 2016, arXiv 1602.04938; Ortiz & Boquien 2025, arXiv 2510.05235, and its public code.
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.ndimage import gaussian_filter1d

from distspec.config import Explain
from distspec.explainers import Explanation, ScoreFunction
from distspec.spectra import Spectra

__all__ = ["Lime", "Surrogate", "perturb", "uniform_segments"]


def uniform_segments(pixels: int, segments: int) -> Int64[np.ndarray, "pixels"]:
    """Cut a spectrum into segments of equal width in pixels; what remains forms one more segment.

    Example:
        >>> uniform_segments(7, 3)
        array([0, 0, 1, 1, 2, 2, 3])

    Raises:
        ValueError: there are more segments than pixels.
    """
    if not 1 <= segments <= pixels:
        raise ValueError(f"{segments} segments of {pixels} pixels; expected between 1 and {pixels}")
    return np.minimum(np.arange(pixels, dtype=np.int64) // (pixels // segments), segments)


class Surrogate:
    """The local linear model of LIME as one constant matrix.

    With masks Z (first row all ones), d = 1 - sqrt(share of ones) the cosine distance to it, kernel weights
    w = exp(-d²/κ²)^½ and W = diag(w), the ridge coefficients are (XᵀWX + αI)⁻¹XᵀW y with X = Z - weighted mean; the
    intercept is not penalized.

    Arguments:
        segments: m, number of segments.
        samples: n, number of masks.
        seed: of the masks (numpy's legacy generator, as in the `lime` package).
        kernel_width: κ.
        ridge: α.
    """

    def __init__(self, segments: int, samples: int, seed: int, kernel_width: float, ridge: float) -> None:
        masks = np.random.RandomState(seed).randint(0, 2, (samples, segments))
        masks[0] = 1
        self.masks: Bool[np.ndarray, "samples segments"] = masks.astype(bool)
        distance = 1.0 - np.sqrt(masks.mean(axis=1))
        self.kernel: Float64[np.ndarray, "samples"] = np.sqrt(np.exp(-(distance**2) / kernel_width**2))
        self._share = self.kernel / self.kernel.sum()
        self._mean = self._share @ masks
        centered = masks - self._mean
        weighted = centered.T * self.kernel
        system = weighted @ centered + ridge * np.eye(segments)
        self.operator: Float64[np.ndarray, "segments samples"] = np.linalg.solve(system, weighted)

    def fit(
        self, labels: Float64[np.ndarray, "n samples"]
    ) -> tuple[
        Float64[np.ndarray, "n segments"],
        Float64[np.ndarray, "n"],
        Float64[np.ndarray, "n"],
        Float64[np.ndarray, "n"],
    ]:
        """Fit the scores of the masked neighbours of many spectra at once.

        Returns:
            coefficients, intercept, weighted R² (1 where the score does not vary), prediction at the spectrum itself.
        """
        coefficients = labels @ self.operator.T
        mean = labels @ self._share
        intercept = mean - coefficients @ self._mean
        fitted = coefficients @ self.masks.T.astype(np.float64) + intercept[:, None]
        left = ((labels - fitted) ** 2) @ self._share
        total = ((labels - mean[:, None]) ** 2) @ self._share
        # Of equal labels both sums are rounding errors, whose ratio means nothing.
        r2 = 1.0 - np.divide(left, total, out=np.zeros_like(left), where=np.ptp(labels, axis=1) > 0)
        return coefficients, intercept, r2, coefficients.sum(axis=1) + intercept


def perturb(
    spectra: Spectra, segment_of: Int64[np.ndarray, "pixels"], settings: Explain
) -> Float32[np.ndarray, "n pixels"]:
    """Make the version of each spectrum that shows where a segment is switched off.

    A spectrum is parted into shape (a Gaussian smoothing that ignores masked pixels) and noise (the rest), and the
    noise is kept: `scale` draws the shape towards its median, (shape - median) a + median + noise; `flat` puts the
    level a in its place; `with_mean` the mean of each segment.

    Returns:
        Perturbed flux; masked pixels are left as they are, and have no influence on the others.
    """
    good = spectra.good
    flux = np.where(good, spectra.flux, 0.0).astype(np.float64)
    # 'nearest' continues the edge pixel outward, and 4 sigma makes 25 taps at sigma = 3, as in the reference.
    blurred = [
        gaussian_filter1d(part, settings.smoothing, axis=1, mode="nearest", truncate=4.0)
        for part in (flux, good.astype(np.float64))
    ]
    shape = np.divide(blurred[0], blurred[1], out=np.zeros_like(flux), where=good)
    noise = flux - shape
    match settings.perturbation:
        case "scale":
            median = np.nanmedian(np.where(good, flux, np.nan), axis=1, keepdims=True)
            changed = (shape - median) * settings.factor + median + noise
        case "flat":
            changed = settings.factor + noise
        case "with_mean":
            changed = _segment_means(flux, good, segment_of) + noise
    return np.where(good, changed, spectra.flux).astype(np.float32)


def _segment_means(
    flux: Float64[np.ndarray, "n pixels"], good: Bool[np.ndarray, "n pixels"], segment_of: Int64[np.ndarray, "pixels"]
) -> Float64[np.ndarray, "n pixels"]:
    """Give each pixel the mean of the good pixels of its segment."""
    members = (segment_of[:, None] == np.arange(segment_of[-1] + 1)).astype(np.float64)
    count = good @ members
    means = np.divide((flux * good) @ members, count, out=np.zeros_like(count), where=count > 0)
    return np.asarray(means[:, segment_of])


class Lime:
    """LIME for batches of spectra on one grid.

    Arguments:
        settings: segments, samples, perturbation, kernel and ridge.
        pixels: length of a spectrum.
        seed: of the masks.
    """

    def __init__(self, settings: Explain, pixels: int, seed: int) -> None:
        self.settings = settings
        self.segment_of = uniform_segments(pixels, min(settings.segments, pixels))
        self.segments = int(self.segment_of[-1]) + 1
        self.surrogate = Surrogate(self.segments, settings.samples, seed, settings.kernel_width, settings.ridge)

    def explain(self, score: ScoreFunction, spectra: Spectra) -> Explanation:
        """Explain why a score is high.

        Arguments:
            score: gives one number per spectrum.
            spectra: n spectra with at least one good pixel each.

        Returns:
            Weights per segment, intercept, R² and local prediction of each spectrum.
        """
        keep = self.surrogate.masks[:, self.segment_of]
        fudged = perturb(spectra, self.segment_of, self.settings)
        labels = np.empty((len(spectra), self.settings.samples))
        # One spectrum's neighbours are a whole batch already; more at once would only take memory.
        for index in range(len(spectra)):
            neighbours = np.where(keep, spectra.flux[index], fudged[index])
            ivar = np.broadcast_to(spectra.ivar[index], neighbours.shape)
            repeated = np.full(len(neighbours), index)
            redshift = None if spectra.redshift is None else spectra.redshift[repeated]
            labels[index] = score(Spectra(spectra.rows[repeated], neighbours, ivar, spectra.grid, redshift))
        coefficients, intercept, r2, prediction = self.surrogate.fit(labels)
        return Explanation(
            spectra.rows,
            coefficients.astype(np.float32),
            self.segment_of,
            intercept.astype(np.float32),
            r2.astype(np.float32),
            prediction.astype(np.float32),
        )
