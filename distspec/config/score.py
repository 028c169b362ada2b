"""Settings of `score`: which model, and how scores are made of residuals."""

from typing import Annotated, Literal

from pydantic import Field

from distspec.config.base import Count, Location, Positive, Settings

__all__ = ["Score"]


class Score(Settings):
    """Store and checkpoint -> latents and scores."""

    checkpoint: Location | None = None
    """Folder of a finished checkpoint to use in place of the experiment's own; nothing is trained then."""
    filter_velocity: Positive = 250.0
    """Half-width of the windows that filtered scores leave out around emission lines, km/s."""
    trim_percentage: Annotated[float, Field(gt=0, le=100)] = 97.0
    """Trimmed scores keep this percentage of the smallest residuals."""
    epsilon: Positive = 1e-3
    """Added to the flux that the weighted scores divide by."""
    metrics: tuple[Literal["mad", "lp"], ...] = ()
    """Further exponents of the residuals, each with eight scores: `mad` 1, `lp` 0.33; that of `mse` is 2."""
    top: Count = 1_000
    """Length of the top lists that the summary keeps."""
    batch: Count = 1_024
    """Spectra in one pass through the model."""
