"""All settings of one experiment, and what must hold between those of different stages."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from distspec.addresses import address_of
from distspec.config.base import ENSEMBLES, RECONSTRUCTION, Location, Settings, metric_scores
from distspec.config.cluster import Cluster
from distspec.config.compare import Compare
from distspec.config.detect import Detect
from distspec.config.evaluate import Evaluate
from distspec.config.explain import Explain
from distspec.config.export import Export
from distspec.config.ingest import Ingest
from distspec.config.report import Report
from distspec.config.runtime import Runtime, Tracking
from distspec.config.score import Score
from distspec.config.train import Train
from distspec.config.tune import Tune
from distspec.errors import ConfigError

__all__ = ["Experiment"]


class Experiment(Settings):
    """All settings of one experiment."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    """Name of the experiment and of its runs in MLflow: letters, digits, dots, dashes and underscores."""
    output: Location = "distspec-output"
    """Folder that receives everything, or an address in a bucket (`s3://bucket/run`), with `tracking.uri`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything that is drawn at random."""
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

    @field_validator("output")
    @classmethod
    def _place(cls, output: str) -> str:
        try:
            address_of(output)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return output

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
