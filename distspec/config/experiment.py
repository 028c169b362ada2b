"""Settings of the stages, of the machines that they run on and of their tracking."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distspec.config.base import (
    ENSEMBLES,
    RECONSTRUCTION,
    Count,
    Off,
    Positive,
    ScoreName,
    Settings,
    metric_scores,
)
from distspec.config.cluster import Cluster
from distspec.config.detect import Compare, Detect, Evaluate
from distspec.config.explain import Explain
from distspec.config.models import AnyDensity, Architecture, Dense, Fit
from distspec.config.prepare import Prepare
from distspec.config.sources import Simulate, Source

__all__ = [
    "Experiment",
    "Export",
    "Ingest",
    "Report",
    "Runtime",
    "Score",
    "Second",
    "Tracking",
    "Train",
    "Tune",
    "Values",
]


class Values(Settings):
    """A table of further facts about the same objects: line fluxes, stellar parameters, visual classes."""

    path: str
    """Parquet, FITS, VOTable, ECSV or CSV file."""
    id: str = "id"
    """Its column of ids, integer or text as in the store; every value once."""
    columns: tuple[str, ...] = ()
    """Columns to take; empty takes all but the ids."""
    prefix: str = ""
    """Put before the names of the columns, to keep them apart from those of the survey."""


class Ingest(Settings):
    """Survey files -> store (stages/ingest.py)."""

    source: Source = Simulate()
    prepare: Prepare = Prepare()
    store: str | None = None
    """Folder or URL (`s3://bucket/survey.zarr`) of the store; none takes `store.zarr` in the output."""
    values: tuple[Values, ...] = ()
    """Value-added tables whose columns are joined to the store by id."""
    shard_rows: Count = 16_384
    """Spectra in a shard, the unit of distributed work."""
    chunk_rows: Count = 1_024
    """Spectra in a compressed chunk inside a shard; must divide shard_rows."""

    @model_validator(mode="after")
    def _chunks(self) -> "Ingest":
        if self.shard_rows % self.chunk_rows:
            raise ValueError("chunk_rows must divide shard_rows")
        if self.source.kind != "simulate" and "dust" not in self.prepare.model_fields_set:
            raise ValueError("say how to correct Galactic extinction: prepare.dust.kind = 'column', 'sfd' or 'none'")
        return self


class Second(Fit):
    """Second network, trained on what the first one makes of the spectra: denoised, and inpainted (Böhm et al.)."""

    batch: Count = 512
    learning_rate: Positive = 1e-4


class Train(Fit):
    """Store -> checkpoint and registered model (stages/train.py)."""

    model: Architecture = Dense()
    loss: Literal["chi2", "mse"] = "chi2"
    """Residuals in units of σ, or as they are; means over good pixels. The redshifted kind has a loss of its own."""
    second: Annotated[Second | None, Off] = None
    """Train a second network of the same kind, from the weights of the first, on the first one's reconstructions."""
    density: Annotated[AnyDensity | None, Off] = None
    """Fit the density of the latents, which gives the score `density`."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the spectra kept for validation, drawn by row."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of the first weights, the order of the spectra and the flow; none takes the experiment's. The validation set is
    drawn by the experiment's seed alone."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Ray Train workers; 0 trains in the driver's own process, which saves their start on one machine."""
    gpu: bool = False
    cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """Spectra that fit in this much memory, on the GPU if there is one, are read once; others are read again in every
    epoch. The order is the same."""


Counts = tuple[Count, Count]
Rates = tuple[Positive, Positive]


class Tune(Settings):
    """Store -> settings for training that give a small validation loss (stages/tune.py).

    The ranges are those of Böhm, Kim & Juneau (PAE): (least, largest), or the least where the largest follows from what
    else is drawn. Equal ends fix a value; none leaves that of `train`.
    """

    trials: Count = 50
    """The paper took about 1,500."""
    epochs: Count = 10
    """Of a trial, at most."""
    concurrent: Annotated[int, Field(ge=0)] = 0
    """Trials at a time, each on a core (and a GPU with `train.gpu`); 0 takes one for each."""
    spectra: Annotated[Count | None, Off] = 40_000
    """Largest number of training spectra in a trial, in chunks drawn from the whole store; none takes all."""
    grace_epochs: Count = 2
    """Epochs that every trial gets."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """After the grace, and whenever its epochs have grown by this factor, a trial goes on if it is among the best
    1/reduction of all that have come so far (successive halving)."""
    depth: Annotated[Counts | None, Off] = (2, 5)
    """Hidden layers, or convolutions."""
    units: Annotated[Count | None, Off] = None
    """Widest layer; none takes the number of pixels. Every layer has from `latents` to the units of the one before."""
    latents: Annotated[Counts | None, Off] = (2, 14)
    channels: Annotated[Counts | None, Off] = (2, 64)
    """Of convolutions, the first at most the largest and every other at most those of the one before."""
    dropout: Annotated[Rates | None, Off] = (1e-3, 0.5)
    """Of the dense kind; logarithmic."""
    learning_rate: Annotated[Rates | None, Off] = (1e-4, 2e-3)
    final_learning_rate: Annotated[Positive | None, Off] = 5e-6
    """Least; the largest is `learning_rate`. Logarithmic."""
    decay_steps: Annotated[Count | None, Off] = 2_000
    """Least; the largest is all steps of a trial. Logarithmic; for the `polynomial` schedule."""
    optimizer: Annotated[tuple[Literal["adam", "rmsprop", "sgd"], ...] | None, Off] = ("adam", "rmsprop", "sgd")
    batch: Annotated[Counts | None, Off] = (16, 256)

    @model_validator(mode="after")
    def _ordered(self) -> "Tune":
        for name in ("depth", "latents", "channels", "dropout", "learning_rate", "batch"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise ValueError(f"{name} goes from its least to its largest value, got {list(ends)}")
        if self.dropout is not None and self.dropout[1] >= 1:
            raise ValueError(f"dropout must be below 1, got {self.dropout[1]:g}")
        if self.optimizer == ():
            raise ValueError("optimizer names none; set it to false to keep that of train")
        return self


class Score(Settings):
    """Store and checkpoint -> latents and scores (stages/score.py)."""

    checkpoint: str | None = None
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


class Report(Settings):
    """Everything -> one HTML page (stages/report.py)."""

    score: ScoreName = "mse"
    """The score that ranks the spectra shown."""
    spectra: Count = 12
    """Top spectra shown with figures."""
    table: Count = 100
    """Rows of the ranked table."""


class Export(Settings):
    """Store -> one table for other programs (stages/export.py)."""

    format: Literal["parquet", "votable", "hats"] = "parquet"
    to: str | None = None
    """File, or folder for HATS; none takes `catalog.parquet`, `catalog.vot` or `catalog-hats` in the output."""
    columns: tuple[str, ...] = ()
    """Columns to write, in this order; empty takes all. HATS adds `ra` and `dec`."""
    layers: tuple[str, ...] = ()
    """Layers that give columns; empty takes the value-added tables and the scores of the experiment's own model."""
    scored_only: bool = False
    """Leave out the spectra that are set aside."""
    spectra: bool = False
    """Add the prepared spectra, as a struct of the lists flux, ivar and lambda (Multimodal Universe)."""
    partition_rows: Count = 1_000_000
    """HATS: rows in a partition, at most; fewer where they are long."""

    @model_validator(mode="after")
    def _lists(self) -> "Export":
        if self.spectra and self.format == "votable":
            raise ValueError("a VOTable cannot hold export.spectra; use format 'parquet' or 'hats'")
        return self


class Runtime(Settings):
    """Where the work runs; nothing here changes a result."""

    address: str | None = None
    """Ray cluster to join; none starts Ray on this machine, or takes RAY_ADDRESS."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Actors that ingest, score and explain; 0 takes one for each core."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0


class Tracking(Settings):
    """MLflow; nothing here changes a result."""

    uri: str | None = None
    """Tracking server or database; none takes MLFLOW_TRACKING_URI, else a SQLite file in the output folder."""
    model: str | None = None
    """Name in the model registry; none takes the experiment's name."""


class Experiment(Settings):
    """All settings of one experiment."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    output: str = "distspec-output"
    """Folder that receives everything."""
    seed: Annotated[int, Field(ge=0)] = 0
    ingest: Ingest = Ingest()
    train: Train = Train()
    tune: Tune = Tune()
    score: Score = Score()
    detect: Detect = Detect()
    compare: Compare = Compare()
    explain: Explain = Explain()
    cluster: Cluster = Cluster()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()
    export: Export = Export()
    runtime: Runtime = Runtime()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _known_scores(self) -> "Experiment":
        known = {*RECONSTRUCTION, *(name for metric in self.score.metrics for name in metric_scores(metric))}
        detectors = set(self.detect.scores)
        taken = sorted(detectors & {*known, *ENSEMBLES, "density"})
        if taken:
            raise ValueError(f"a detector cannot be named {taken[0]!r}, which is another score; set its name")
        known |= detectors | ({"density"} if self.train.density or self.score.checkpoint else set())
        # An ensemble ranks the whole survey and says nothing of one changed spectrum, so it cannot be explained.
        for method in self.explain.methods:
            blind = sorted(detectors & set(self.explain.scores)) if "gradient" in method.kind else []
            if blind:
                raise ValueError(
                    f"explain.methods has {method.name!r}, but score {blind[0]!r} is that of a classical detector and "
                    "has no gradient; explain it by lime or imo"
                )
        methods = [method.name for method in self.explain.methods]
        if self.cluster.method is not None and self.cluster.method not in methods:
            there = ", ".join(methods)
            raise ValueError(f"cluster.method is {self.cluster.method!r}; explain.methods has {there}")
        if self.cluster.score is not None and self.cluster.score not in self.explain.scores:
            there = ", ".join(self.explain.scores)
            raise ValueError(f"cluster.score is {self.cluster.score!r}; explain.scores has {there}")
        for setting, scores, more in (
            ("explain.scores", self.explain.scores, ()),
            ("compare.scores", self.compare.scores, ()),
            ("report.score", (self.report.score,), ENSEMBLES),
        ):
            for name in scores:
                if name == "density" and name not in known:
                    raise ValueError(
                        f"{setting} names 'density', which needs train.density: set train.density.kind = 'sliced'"
                    )
                if name not in known and name not in more:
                    there = ", ".join(sorted({*known, *more}))
                    raise ValueError(f"{setting} names {name!r}, which is no score here; there are {there}")
        return self
