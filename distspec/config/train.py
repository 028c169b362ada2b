"""Settings of `train`: which network, how it is fitted, and on what machines."""

from typing import Annotated, Literal

from pydantic import Field

from distspec.config.base import Count, Off, Positive
from distspec.config.models import AnyDensity, Architecture, Dense, Fit

__all__ = ["Second", "Train"]


class Second(Fit):
    """Second network, trained on what the first one makes of the spectra: denoised, and inpainted (Böhm et al.)."""

    batch: Count = 512
    """Rows in a step, over all workers together."""
    learning_rate: Positive = 1e-4
    """Learning rate at the start; of `one_cycle` the largest."""


class Train(Fit):
    """Store -> checkpoint and registered model."""

    model: Architecture = Dense()
    """The autoencoder."""
    loss: Literal["chi2", "mse"] = "chi2"
    """Residuals in units of σ, or as they are; means over good pixels. The redshifted kind has a loss of its own."""
    second: Annotated[Second | None, Off] = None
    """Train a second network of the same kind, from the weights of the first, on the first one's reconstructions."""
    density: Annotated[AnyDensity | None, Off] = None
    """Fit the density of the latents, which gives the score `density`; a table that names no kind is of kind sliced."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the spectra kept for validation, drawn by row."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the first weights, the order of the spectra and the flow; none takes the experiment's. The validation set
    is drawn by the experiment's seed alone."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Ray Train workers; 0 trains in the driver's own process, which saves their start on one machine."""
    gpu: bool = False
    """Train on GPUs: one for each worker, or the one of the driver's own process."""
    cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """Spectra that fit in this much memory, on the GPU if there is one, are read once; others are read again in every
    epoch. The order is the same."""
