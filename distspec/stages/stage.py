"""What every stage is: the interface that `distspec run`, single verbs, resume, `distspec plan` and the page rest on.

A stage finds what there is, makes what is missing, and says how far it is. It never imports another stage: what it
needs of them is in the `Job`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from distspec.addresses import Place
from distspec.config import Experiment
from distspec.errors import StoreNotFoundError
from distspec.models.checkpoint import Checkpoint
from distspec.results.facts import Facts
from distspec.results.layout import model_folder, score_layer
from distspec.results.scores import Fold, Scores, distributions
from distspec.runtime.cluster import connect
from distspec.runtime.passes import folding
from distspec.runtime.tracking import Run
from distspec.statistics.summaries import Histogram
from distspec.store import Layer, SpectraStore

__all__ = ["Comparison", "Exported", "Job", "Products", "Section", "Stage", "State", "Tuned", "stage_run"]

_NO_LAYERS: Mapping[str, Layer] = MappingProxyType({})


@dataclass(frozen=True)
class Comparison:
    """What comparing scores left.

    Arguments:
        folder: with comparison.json, overlaps.csv, errors.csv and groups.csv.
        content: of the JSON.
        ensembles: layer with the scores `rank_mean` and `rank_union`; None where it is not finished.
    """

    folder: Place
    content: dict[str, Any]
    ensembles: Layer | None


@dataclass(frozen=True)
class Tuned:
    """What a search for settings has found.

    Arguments:
        path: of the settings file.
        trial: number of the best trial.
        loss: smallest validation loss of that trial.
        trials: how many have ended.
        failed: how many of these came to no finite loss.
        table: of all of them, CSV.
    """

    path: Place
    trial: int
    loss: float
    trials: int
    failed: int
    table: Place


@dataclass(frozen=True)
class Exported:
    """What was written for other programs.

    Arguments:
        path: file, or folder of a HATS catalogue.
        rows: number of rows, those without a position included.
        columns: their names.
    """

    path: Place
    rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Products:
    """What the stages made or found, as far as they went.

    Arguments:
        store: of ingest; finished.
        checkpoint: of train, or the one that `score.checkpoint` names.
        scores: of score.
        detected: of detect: the layer of each classical detector, by its name.
        comparison: of compare, with the ensembles.
        explanations: of explain: the layer of each method, by its name.
        lines, ascents: of explain.
        clusters: of cluster.
        evaluation: of evaluate.
        report, table: of report.
        tuned: of tune.
        exported: of export.
    """

    store: SpectraStore | None = None
    checkpoint: Checkpoint | None = None
    scores: Layer | None = None
    detected: Mapping[str, Layer] = field(default_factory=lambda: _NO_LAYERS)
    comparison: Comparison | None = None
    explanations: Mapping[str, Layer] = field(default_factory=lambda: _NO_LAYERS)
    lines: Layer | None = None
    ascents: Layer | None = None
    clusters: Facts | None = None
    evaluation: Facts | None = None
    report: Place | None = None
    table: Place | None = None
    tuned: Tuned | None = None
    exported: Exported | None = None


@dataclass(frozen=True)
class Job:
    """What a stage is asked to work on.

    Arguments:
        experiment: the settings.
        have: what earlier stages made or left.
        stages: all of them; the report asks each for its part of the page.
    """

    experiment: Experiment
    have: Products = field(default_factory=Products)
    stages: tuple["Stage", ...] = ()

    def having(self, **products: Any) -> Products:
        """Give what there is, with more products."""
        return replace(self.have, **products)

    @property
    def store(self) -> SpectraStore:
        """The finished store.

        Raises:
            StoreNotFoundError: nothing was ingested.
        """
        if self.have.store is None:
            raise StoreNotFoundError("no store; run `distspec ingest` first")
        return self.have.store

    @property
    def checkpoint(self) -> Checkpoint:
        """The model.

        Raises:
            CheckpointError: nothing was trained.
        """
        if self.have.checkpoint is None:
            return Checkpoint.load(model_folder(self.experiment, self.store.digest))  # says what is missing
        return self.have.checkpoint

    @property
    def scores(self) -> Layer:
        """The scores of the model.

        Raises:
            CheckpointError: nothing was trained.
            StoreNotFoundError: nothing was scored.
        """
        if self.have.scores is None:
            return self.store.layer(score_layer(self.experiment, self.checkpoint.sha256))  # says what is missing
        return self.have.scores

    @cached_property
    def table(self) -> Scores:
        """The scores of the model, if there is one, and of the classical detectors, side by side.

        Raises:
            CheckpointError: there is neither model nor detector.
            StoreNotFoundError: there is a model and it has not scored.
        """
        alone = self.have.checkpoint is None and bool(self.experiment.detect.detectors)
        return Scores([*([] if alone else [self.scores]), *self.have.detected.values()])

    @cached_property
    def all_scores(self) -> Scores:
        """The same with the ensembles."""
        ensembles = self.have.comparison.ensembles if self.have.comparison is not None else None
        return Scores([*self.table.layers, *([] if ensembles is None else [ensembles])])

    @cached_property
    def distributions(self) -> dict[str, Histogram]:
        """How each of all scores is distributed; one pass, whoever asks."""
        return distributions(self.all_scores, self.fold("report"))

    def fold(self, stage: str) -> Fold:
        """Give what adds up over shards, in workers as a stage has them."""
        return folding(self.experiment.runtime, stage)

    @property
    def scored(self) -> int:
        """Number of spectra that are scored."""
        return int(self.distributions[self.experiment.report.score].counts.sum())


@dataclass(frozen=True)
class State:
    """How far a stage is.

    Arguments:
        done, total: of its units of work.
        unit: what is counted, in the plural.
        why: it is not done.
        again: it is made anew by every run, in seconds, done or not.
    """

    done: int
    total: int
    unit: str
    why: str = ""
    again: bool = False

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.done == self.total


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Arguments:
        anchor: sections of one anchor stand together, where the first of them is.
        title: in the page's contents.
        template: of Jinja, by its path below `stages/`.
        content: what it shows; `places` holds the places of its figures by their keys.
        figures: Bokeh models; every key is unique on the page.
    """

    anchor: str
    title: str
    template: str
    content: Mapping[str, Any]
    figures: Mapping[str, Any] = field(default_factory=dict)


class Stage(Protocol):
    """One verb: what it makes, finds and shows. Stages inherit from this what most of them have in common.

    Arguments:
        name: of the verb, its folder, its settings, its tests.
        uses: stages whose products it opens, if they are there.
        in_run: whether `distspec run` makes it; False: by name only.
    """

    name: ClassVar[str]
    uses: ClassVar[tuple[str, ...]]
    in_run: ClassVar[bool] = True

    def off(self, experiment: Experiment) -> str:
        """Say why a run leaves it out; nothing where it does not."""
        return ""

    def state(self, job: Job) -> State:
        """Say how far it is: looks, computes nothing, writes nothing."""
        ...

    def find(self, job: Job) -> Products:
        """Add what it left to what there is; nothing where it has not run, or where no stage opens it.

        Raises:
            DistspecError: what there is is damaged, or belongs to other settings.
        """
        return job.have

    def make(self, job: Job) -> Products:
        """Make its products, or finish them; what is done is not done again.

        Raises:
            DistspecError: what it needs is missing or refused; the message says what to do.
        """
        ...

    def told(self, made: Products) -> Iterable[tuple[str, str]]:
        """Name what it left, for the terminal: label and text."""
        return ()

    def sections(self, job: Job) -> Iterable[Section]:
        """Give its part of the page; nothing where it has none."""
        return ()


def stage_run(
    experiment: Experiment,
    store: SpectraStore,
    stage: str,
    key: str,
    lineage: Mapping[str, str],
    *,
    workers: bool = False,
) -> Run:
    """Begin or go on with the run of a stage in MLflow, with the store as its dataset.

    Arguments:
        experiment: the settings.
        store: what the stage reads.
        stage: its name.
        key: digest of what it makes.
        lineage: what else it reads, such as the model's digest.
        workers: whether the stage needs Ray, which is started or joined first.

    Raises:
        ConfigError: no cluster answers, or runs cannot be tracked.
    """
    if workers:
        connect(experiment.runtime)
    run = Run(experiment, stage, key, lineage)
    run.reads(experiment.name, store.digest, store.path)
    return run
