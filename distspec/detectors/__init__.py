"""Detectors: one number per spectrum, higher = odder. Thresholds and top lists are functions of scores (`reduce`)."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from distspec.spectra import Spectra

__all__ = ["Detector"]


@runtime_checkable
class Detector(Protocol):
    """What every detector can do."""

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra; higher = odder. A pixel with ivar = 0 has no influence."""
        ...
