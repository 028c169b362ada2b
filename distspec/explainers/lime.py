"""LIME for spectra: switch segments of a spectrum off at random, score, and fit a local linear model.

The random masks, their kernel weights and the ridge system do not depend on the spectrum. The whole surrogate fit is
therefore one constant matrix, made once, and fitting any number of spectra is one matrix product. With equal masks the
result equals that of the `lime` package (to rounding).

References:
    Ribeiro, Singh & Guestrin 2016, arXiv 1602.04938; Ortiz & Boquien 2025, arXiv 2510.05235, and its public code.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from distspec.config import Lime
from distspec.errors import ConfigError
from distspec.explainers import Explanation, Fields, Scores
from distspec.explainers.perturbations import perturb
from distspec.explainers.segmentation import common_segments, segments_of
from distspec.spectra import Spectra, WaveGrid
from distspec.spectra.perturbed import PerturbedSpectra

__all__ = ["Fit", "LimeExplainer", "Surrogate"]

_FLOOR: Final = 64
"""Copies of a spectrum whose scores tell how much the score itself varies."""

_STEPS: Final = 16
"""A spectrum whose weights may settle begins with so small a part of the samples, and doubles them."""


class Fit(NamedTuple):
    """Local linear models of n spectra.

    Arguments:
        coefficients: weight of each segment.
        error: their standard errors over masks, robust against unequal residuals (HC1); NaN where there are no more
            samples than segments.
        intercept: of the models.
        r2: weighted coefficient of determination, 1 = the weights tell all, and where the score does not vary.
        prediction: at the spectrum itself.
    """

    coefficients: Float64[np.ndarray, "n segments"]
    error: Float64[np.ndarray, "n segments"]
    intercept: Float64[np.ndarray, "n"]
    r2: Float64[np.ndarray, "n"]
    prediction: Float64[np.ndarray, "n"]


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

    Raises:
        ConfigError: without a ridge, so few masks leave the coefficients open.
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
        if ridge == 0 and np.linalg.matrix_rank(system, hermitian=True) < segments:
            raise ConfigError(
                f"LIME cannot tell {segments} segments apart by {samples} samples; "
                "raise samples or ridge in explain.methods"
            )
        self.operator: Float64[np.ndarray, "segments samples"] = np.linalg.solve(system, weighted)
        self._squares = self.operator**2
        self._ones = masks.T.astype(np.float64)

    @property
    def length(self) -> float:
        """Root mean square over segments of a weight's standard deviation when every score has one of 1."""
        return float(np.sqrt(self._squares.sum(axis=1).mean()))

    def fit(self, labels: Float64[np.ndarray, "n samples"]) -> "Fit":
        """Fit the scores of the masked neighbours of many spectra at once."""
        coefficients = labels @ self.operator.T
        mean = labels @ self._share
        intercept = mean - coefficients @ self._mean
        square = (labels - (coefficients @ self._ones + intercept[:, None])) ** 2
        left = square @ self._share
        total = ((labels - mean[:, None]) ** 2) @ self._share
        # Of equal labels both sums are rounding errors, whose ratio means nothing.
        varied = np.ptp(labels, axis=1) > 0
        r2 = 1.0 - np.divide(left, total, out=np.zeros_like(left), where=varied)
        samples, segments = labels.shape[1], len(self.operator)
        free = samples - segments - 1
        spread = square * (samples / free) if free > 0 else np.full_like(square, np.nan)
        error = np.sqrt(spread @ self._squares.T)
        return Fit(coefficients, error, intercept, r2, coefficients.sum(axis=1) + intercept)


class LimeExplainer:
    """LIME for batches of spectra on one grid.

    Besides weights it tells their standard errors, R², and `floor`: what a weight is made of where nothing is changed
    (the null perturbation), which is the noise of the score itself; 0 for a score that gives equal spectra equal
    numbers.

    Arguments:
        settings: segments, samples, perturbation, kernel and ridge.
        grid: of the spectra.
        seed: of the masks.
        rest: whether the grid is at rest, so that all spectra have their lines in the same place.
    """

    def __init__(self, settings: Lime, grid: WaveGrid, seed: int, *, rest: bool = True) -> None:
        self.settings, self.grid, self._seed = settings, grid, seed
        common = common_segments(settings.segments, grid, rest=rest)
        self._common = common
        self.segment_of: Int64[np.ndarray, "pixels"] = np.arange(grid.pixels) if common is None else common
        # Only so many are kept: superpixels of many spectra are of many numbers.
        self._surrogate = lru_cache(maxsize=16)(self._make_surrogate)

    @property
    def regions(self) -> int:
        """How many weights a score of a spectrum has."""
        return int(self.segment_of[-1]) + 1

    def fields(self, scores: int) -> Fields:
        """Name what is kept: `weights`, their `error`, `intercept`, `r2`, `prediction`, `floor`, `samples` taken."""
        weights = dict.fromkeys(("weights", "error"), ("f4", (scores, self.regions)))
        single = dict.fromkeys(("intercept", "r2", "prediction", "floor"), ("f4", (scores,)))
        return {**weights, **single, "samples": ("i8", ())}

    def explain(self, scores: Scores, spectra: Spectra, baselines: Sequence[Spectra] = ()) -> Explanation:
        """Explain why scores are high."""
        fields = self.fields(len(scores.names))
        found = {name: np.zeros((len(spectra), *shape), dtype) for name, (dtype, shape) in fields.items()}
        for index in range(len(spectra)):
            for name, values in self._one(scores, spectra[index : index + 1]).items():
                found[name][index] = values
        return Explanation(spectra.rows, found.pop("weights"), self.segment_of, found)

    def _one(self, scores: Scores, spectrum: Spectra) -> dict[str, np.ndarray]:
        settings = self.settings
        own = segments_of(settings.segments, spectrum, 0) if self._common is None else self._common
        other = perturb(spectrum, own, settings.perturbation, settings.smoothing, self._seed, scores.reconstruct)[0]
        segments = int(own[-1]) + 1
        surrogate = self._surrogate(segments, settings.samples)
        # A mask's 1 keeps the spectrum; a mixture's switch brings the other flux. The last versions switch nothing.
        same = np.zeros((_FLOOR, segments), bool)
        score = scores.versions(PerturbedSpectra(spectrum, other, own[None], np.concatenate([~surrogate.masks, same])))
        taken, fit = self._fit(segments, lambda start, stop: score(start, stop)[0].astype(np.float64))
        null = score(settings.samples, settings.samples + _FLOOR)[0].astype(np.float64)
        floor = null.std(axis=0, ddof=1) * self._surrogate(segments, taken).length
        told = {"weights": fit.coefficients, "error": fit.error}
        if self._common is None:
            # Told pixel by pixel: those of a segment share its weight, so that they add up to it.
            told = {name: (values / np.bincount(own))[:, own] for name, values in told.items()}
        told |= {"intercept": fit.intercept, "r2": fit.r2, "prediction": fit.prediction, "floor": floor}
        return {**told, "samples": np.array(taken)}

    def _fit(self, segments: int, score: Callable[[int, int], Float64[np.ndarray, "part k"]]) -> tuple[int, Fit]:
        """Score masks and fit, with ever more of them until the weights have settled or all are taken."""
        most, limit = self.settings.samples, self.settings.settle
        # Fewer than twice the segments say little of errors.
        taken = most if limit is None else min(most, max(2 * segments, most // _STEPS))
        labels = score(0, taken)
        while True:
            fit = self._surrogate(segments, taken).fit(labels.T)
            heaviest = np.abs(fit.coefficients).max(axis=1)
            if taken == most or (limit is not None and (fit.error.max(axis=1) <= limit * heaviest).all()):
                return taken, fit
            further = min(most, 2 * taken)
            labels = np.concatenate([labels, score(taken, further)])
            taken = further

    def _make_surrogate(self, segments: int, samples: int) -> Surrogate:
        settings = self.settings
        return Surrogate(segments, samples, self._seed, settings.kernel_width, settings.ridge)
