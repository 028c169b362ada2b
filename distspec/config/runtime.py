"""Settings of the machines that work is done on, and of its tracking; none of them changes a result."""

from typing import Annotated

from pydantic import Field

from distspec.config.base import Settings

__all__ = ["Runtime", "Tracking"]


class Runtime(Settings):
    """Where the work runs; nothing here changes a result."""

    address: str | None = None
    """Ray cluster to join; none starts Ray on this machine, or takes RAY_ADDRESS."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Workers that ingest, score and explain; 0 takes one for each core or, where they compute on GPUs, each GPU."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of a worker that scores, explains or evaluates, a share of one included; 0 lets them compute on CPUs."""
    item_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Time in which a worker has to do an item, such as a shard, s; then it is ended and the item tried again."""


class Tracking(Settings):
    """MLflow; nothing here changes a result."""

    uri: str | None = None
    """Tracking server or database; none takes MLFLOW_TRACKING_URI, else a SQLite file in the output folder."""
    model: str | None = None
    """Name in the model registry; none takes the experiment's name."""
