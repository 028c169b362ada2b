"""Settings of the machines that work is done on, and of its tracking; none of them changes a result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Tag

from distspec.config.base import NUMBER, TABLE, Either, Positive, Settings, Span

__all__ = ["Needs", "Runtime", "Tracking"]

Share = Annotated[float, Field(ge=0)]
Working = Literal["ingest", "train", "score", "detect", "compare", "explain", "evaluate", "report", "export"]
"""Stages with workers of their own."""
Computing = Literal["score", "explain", "evaluate"]
"""Stages whose workers compute with a network, on GPUs if they get some."""


@dataclass(frozen=True)
class Needs:
    """What a worker takes of the cluster."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    """Reserved; 0 reserves nothing."""

    @property
    def device(self) -> str:
        """Where torch computes."""
        return "cuda" if self.gpus else "cpu"

    def times(self, workers: int) -> "Needs":
        """Give what so many workers take together."""
        return Needs(self.cpus * workers, self.gpus * workers, self.memory_gb * workers)

    def __str__(self) -> str:
        parts = (self.cpus, "CPU"), (self.gpus, "GPU")
        told = [f"{number:g} {name}{'' if number == 1 else 's'}" for number, name in parts]
        return " and ".join([*told, *([f"{self.memory_gb:.3g} GB"] if self.memory_gb else [])])


class Runtime(Settings):
    """Where the work runs; nothing here changes a result."""

    address: str | None = None
    """Ray cluster to join; none starts Ray on this machine, or takes RAY_ADDRESS."""
    workers: Annotated[
        Annotated[int, Field(ge=0), Tag(NUMBER)] | Annotated[Span, Tag(TABLE)],
        Either,
    ] = 0
    """Workers of a stage; `{ min = 4, max = 64 }` takes what the cluster has room for, within these, and follows it
    when it grows or shrinks; 0 does so without limits: one worker for each core or, where they compute on GPUs, GPU."""
    cpus_per_worker: Annotated[
        Annotated[float, Field(gt=0), Tag(NUMBER)] | Annotated[dict[Working, Positive], Tag(TABLE)],
        Either,
    ] = 1.0
    """CPUs of a worker, of all stages or by stage: `{ ingest = 2 }`. More of them leave room; work is done by one."""
    gpus_per_worker: Annotated[
        Annotated[float, Field(ge=0), Tag(NUMBER)] | Annotated[dict[Computing, Share], Tag(TABLE)],
        Either,
    ] = 0.0
    """GPUs of a worker that scores, explains or evaluates, a share of one included; 0 lets them compute on CPUs. By
    stage: `{ score = 1, explain = 0.25 }`."""
    memory_gb_per_worker: Annotated[
        Annotated[float, Field(ge=0), Tag(NUMBER)] | Annotated[dict[Working, Share], Tag(TABLE)],
        Either,
    ] = 0.0
    """Memory that a worker reserves of its node, so that no more of them are started there than it holds; by stage:
    `{ detect = 6 }`. 0 reserves none."""
    item_seconds: Positive = 3600.0
    """Time in which a worker has to do an item, such as a shard or an epoch of training, s; then it is ended and the
    item tried again."""
    env_vars: tuple[str, ...] = ()
    """Names of environment variables, such as AWS_SECRET_ACCESS_KEY, that workers on other nodes get from this process;
    their values are printed and logged nowhere. Without a cluster, workers have those of object stores anyway."""
    ship: bool = True
    """Send this installation's distspec to the nodes of a cluster that is joined; else it must be installed there."""

    def needs(self, stage: str) -> Needs:
        """Give what a worker of a stage takes."""

        def of(setting: float | Mapping[Any, float], default: float) -> float:
            return setting if isinstance(setting, float) else setting.get(stage, default)

        gpus = of(self.gpus_per_worker, 0.0) if stage in get_args(Computing) else 0.0
        return Needs(of(self.cpus_per_worker, 1.0), gpus, of(self.memory_gb_per_worker, 0.0))

    @property
    def most(self) -> int:
        """Most workers that are wanted; 0 for as many as there is room for."""
        return self.workers.max if isinstance(self.workers, Span) else self.workers

    @property
    def fewest(self) -> int:
        """Fewest workers that are wanted."""
        return self.workers.min if isinstance(self.workers, Span) else max(self.workers, 1)


class Tracking(Settings):
    """MLflow; nothing here changes a result."""

    uri: str | None = None
    """Tracking server or database; none takes MLFLOW_TRACKING_URI, else a SQLite file in the output folder."""
    model: str | None = None
    """Name in the model registry; none takes the experiment's name."""
