"""The stages in their order: the one list from which `distspec run`, single verbs, `distspec plan` and the page follow.

A new stage is a folder beside this file, and a line here.
"""

from distspec.stages.cluster.stage import ClusterStage
from distspec.stages.compare.stage import CompareStage
from distspec.stages.detect.stage import DetectStage
from distspec.stages.evaluate.stage import EvaluateStage
from distspec.stages.explain.stage import ExplainStage
from distspec.stages.export.stage import ExportStage
from distspec.stages.ingest.stage import IngestStage
from distspec.stages.report.stage import ReportStage
from distspec.stages.score.stage import ScoreStage
from distspec.stages.stage import Stage
from distspec.stages.train.stage import TrainStage
from distspec.stages.tune.stage import TuneStage

__all__ = ["STAGES"]

STAGES: tuple[Stage, ...] = (
    IngestStage(),
    TuneStage(),
    TrainStage(),
    ScoreStage(),
    DetectStage(),
    CompareStage(),
    ExplainStage(),
    ClusterStage(),
    EvaluateStage(),
    ReportStage(),
    ExportStage(),
)
