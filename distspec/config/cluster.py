"""Settings of the clusters of explanations."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distspec.config.base import Count, Off, ScoreName, Settings

__all__ = ["Cluster"]

AtLeastTwo = Annotated[int, Field(ge=2)]


class Cluster(Settings):
    """Explanations of one method -> groups of spectra that are odd for the same reason.

    The defaults are those of Ortiz & Boquien: k-means of absolute weights, each vector divided by its length.
    """

    method: str | None = None
    """Name of the explaining method whose weights are clustered; none takes the first of `explain.methods`."""
    score: ScoreName | None = None
    """Score whose explanations are clustered; none takes the first of `explain.scores`."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the explained spectra that is clustered, those of highest score."""
    algorithm: Literal["kmeans", "hdbscan"] = "kmeans"
    """k-means of `k` clusters, or HDBSCAN, which finds their number and leaves spectra over."""
    k: Annotated[Count | None, Off] = None
    """Number of clusters of k-means; none takes that of `scan` with the largest mean silhouette."""
    scan: tuple[AtLeastTwo, AtLeastTwo] = (2, 23)
    """Least and largest k that are tried."""
    normalize: Literal["l2", "max", "none"] = "l2"
    """What the weights of a spectrum are divided by: their Euclidean length, the largest |weight|, or nothing."""
    signed: bool = False
    """Keep the signs of weights; the paper takes absolute values."""
    min_size: AtLeastTwo = 5
    """Least members of a cluster of HDBSCAN."""
    nearest: Count = 5
    """Members nearest to the centre of a cluster that are shown."""

    @model_validator(mode="after")
    def _ordered(self) -> "Cluster":
        if self.scan[0] > self.scan[1]:
            raise ValueError(f"scan goes from its least to its largest k, got {list(self.scan)}")
        return self
