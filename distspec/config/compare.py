"""Settings of `compare`: which scores, and how long the lists are that are compared."""

from typing import Annotated

from pydantic import Field

from distspec.config.base import Count, Off, Positive, Settings

__all__ = ["Compare", "Errors"]


class Errors(Settings):
    """Which spectra are listed for their reconstruction errors (Sharma et al., section 4)."""

    sigma: Positive = 3.0
    """Mean differences beyond so many standard deviations are listed."""
    rmse: Annotated[Positive | None, Off] = None
    """Root mean squared errors above this are listed; none lists those beyond `sigma` standard deviations."""


class Compare(Settings):
    """Scores -> how far detectors agree, and what they lean towards."""

    top: Count = 500
    """Length of the lists whose overlaps are counted, g."""
    sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (100, 200, 300, 500, 750, 1_000, 1_500, 2_000)
    """Lengths at which the number of anomalies is estimated again."""
    bias: Count = 100
    """Length of the lists that are tested for what they lean towards."""
    properties: tuple[str, ...] = ()
    """Catalogue columns of numbers to test; none takes those among snr, z, magnitudes, plate, fibre and exposure that
    the store has."""
    exposures: tuple[str, ...] = ()
    """Catalogue columns that together name an exposure; none takes those that the survey has."""
    scores: tuple[str, ...] = ()
    """Scores to compare; none takes chi2, mse, density and every classical detector that there is."""
    errors: Errors = Errors()
