"""Explainers: which wavelengths make a spectrum odd. They know a callable score, never a model."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from distspec.spectra import Spectra

__all__ = ["Explanation", "ScoreFunction"]

ScoreFunction = Callable[[Spectra], Float32[np.ndarray, "n"]]
"""Gives one number per spectrum, higher = odder."""


@dataclass(frozen=True)
class Explanation:
    """Weights per segment of each spectrum.

    Arguments:
        rows: of the spectra in the store.
        weights: positive where the original segment raises the score relative to its perturbed version.
        segment_of: segment that each pixel belongs to.
        intercept: of the local linear model.
        r2: weighted coefficient of determination of the local model, 1 = the weights tell all.
        prediction: of the local model at the unperturbed spectrum.
    """

    rows: Int64[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n segments"]
    segment_of: Int64[np.ndarray, "pixels"]
    intercept: Float32[np.ndarray, "n"]
    r2: Float32[np.ndarray, "n"]
    prediction: Float32[np.ndarray, "n"]

    @property
    def pixel_weights(self) -> Float32[np.ndarray, "n pixels"]:
        """Each pixel's segment weight."""
        return self.weights[:, self.segment_of]
