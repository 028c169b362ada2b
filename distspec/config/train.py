"""Settings of `train`: which network, how it is fitted, and on what machines."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from distspec.config.base import NUMBER, TABLE, Count, Either, Off, Positive, Span
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
    workers: Annotated[
        Annotated[int, Field(ge=0), Tag(NUMBER)] | Annotated[Span, Tag(TABLE)],
        Either,
    ] = 0
    """Ray Train workers; 0 trains in the driver's own process, which saves their start on one machine. `{ min = 1,
    max = 4 }` takes as many as the cluster has room for when it begins or has lost one, within these: batches are cut
    into `max` shares, whose gradients are added up in their order, so that the weights are the same for any number of
    workers; the density is then fitted by one of them."""
    gpu: bool = False
    """Train on GPUs: one for each worker, or the one of the driver's own process."""
    cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """A worker's own part of the spectra is read once where it fits in this much memory, on the GPU if there is one;
    else it is read again in every epoch. The order is the same."""
    readers: Count = 2
    """Threads of a worker that read spectra ahead of the training, where these are not held in memory; with `workers =
    { min, max }` those of each of its shares. More than the worker has cores bring little. Batches are the same for
    any number."""

    @property
    def fewest(self) -> int:
        """Fewest workers that are wanted; 0 trains in the driver's process."""
        return self.workers.min if isinstance(self.workers, Span) else self.workers

    @property
    def most(self) -> int:
        """Most workers that are wanted."""
        return self.workers.max if isinstance(self.workers, Span) else self.workers

    @property
    def shares(self) -> int:
        """Shares that batches are cut into, however many workers there are; 0 gives each worker a batch of its own."""
        return self.workers.max if isinstance(self.workers, Span) else 0
