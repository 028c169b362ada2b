"""The stages in their order. `distspec run` is this list; a single verb is one entry of it on what is there already."""

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distspec.audit import audit
from distspec.config import Experiment, dump
from distspec.errors import ConfigError
from distspec.layout import model_folder, score_layer, store_path
from distspec.models.checkpoint import Checkpoint
from distspec.runtime import connect, map_shards
from distspec.scores import Scores
from distspec.stages.cluster import Clustered, cluster, clustered_of
from distspec.stages.compare import Compared, compare, compared_of
from distspec.stages.detect import detect, detections_of
from distspec.stages.evaluate import Evaluated, evaluate, evaluated_of
from distspec.stages.explain import ascents_of, explain, explanations_of, follow, lines_of, measure_lines
from distspec.stages.export import Exported, export
from distspec.stages.ingest import ingest
from distspec.stages.report import report
from distspec.stages.score import score
from distspec.stages.train import train
from distspec.stages.tune import Tuned, tune
from distspec.store import Layer, SpectraStore

__all__ = ["EXTRA", "STAGES", "Products", "check", "run"]

STAGES = ("ingest", "train", "score", "detect", "compare", "explain", "cluster", "evaluate", "report")

EXTRA = ("tune", "export")
"""Stages that are run by name only; they work on whatever the others have left."""


_EXAMPLE = '[{ kind = "pca" }, { kind = "forest" }]'


@dataclass(frozen=True)
class Products:
    """What the stages made or found, as far as they went."""

    store: SpectraStore
    checkpoint: Checkpoint | None = None
    scores: Layer | None = None
    detected: dict[str, Layer] = field(default_factory=dict)
    compared: Compared | None = None
    explanations: dict[str, Layer] = field(default_factory=dict)
    lines: Layer | None = None
    ascents: Layer | None = None
    clustered: Clustered | None = None
    evaluated: Evaluated | None = None
    report: Path | None = None
    exported: Exported | None = None
    tuned: Tuned | None = None


def run(experiment: Experiment, only: str | None = None) -> Products:
    """Run all stages, or one of them on the products of the earlier ones.

    Whatever is finished is not done again.

    Arguments:
        experiment: the settings.
        only: one of `STAGES` or `EXTRA`, or None for all of `STAGES`.

    Raises:
        DistspecError: the input, the settings or the output are refused.
    """
    with _locked(experiment) as folder, _terminated_as_interrupt():
        made = _run(experiment, STAGES if only is None else (only,))
        # Only now: settings that were refused must not stand beside the results of others.
        partial = folder / f".experiment.{uuid.uuid4().hex}.partial"
        partial.write_text(dump(experiment), "utf-8")
        os.replace(partial, folder / "experiment.toml")
        return made


def _run(experiment: Experiment, wanted: tuple[str, ...]) -> Products:
    last = wanted[-1]
    store = ingest(experiment) if "ingest" in wanted else _finished_store(experiment)
    if last == "ingest":
        return Products(store)
    if last == "tune":
        return Products(store, tuned=tune(experiment, store))
    if last == "export":
        return Products(store, exported=export(experiment, store))
    if last == "detect":
        if not experiment.detect.detectors:
            raise ConfigError(f"no detector to fit: name some, as in detect.detectors='{_EXAMPLE}'")
        return Products(store, detected=detect(experiment, store))
    if last in ("compare", "evaluate") and experiment.detect.detectors and not _has_model(experiment, store):
        # Classical detectors need no network.
        detected = detections_of(experiment, store)
        if last == "compare":
            return Products(store, detected=detected, compared=compare(experiment, store, Scores(detected.values())))
        return Products(store, detected=detected, evaluated=evaluate(experiment, store, None, None, detected))
    checkpoint = _model(experiment, store, make="train" in wanted)
    if last == "train":
        return Products(store, checkpoint)
    whole = wanted == STAGES
    if "score" in wanted:
        scores = score(experiment, store, checkpoint)
    else:
        scores = store.layer(score_layer(experiment, checkpoint.sha256))
    if last == "score":
        return Products(store, checkpoint, scores)
    detected = detect(experiment, store) if whole else detections_of(experiment, store)
    table = Scores([scores, *detected.values()])
    compared = compare(experiment, store, table) if "compare" in wanted else compared_of(experiment, store, table)
    if last == "compare":
        return Products(store, checkpoint, scores, detected, compared)
    made = Products(store, checkpoint, scores, detected, compared)
    made = _explained(experiment, made, table, make="explain" in wanted)
    if last == "explain":
        return made
    made = replace(made, clustered=_clustered(experiment, made, make="cluster" in wanted))
    if last == "cluster":
        return made
    if last == "evaluate" and not experiment.evaluate.hosts:
        raise ConfigError("evaluate.hosts is 0, so nothing is planted; set it to some hundreds")
    if last == "evaluate" or (whole and experiment.evaluate.hosts):
        evaluated: Evaluated | None = evaluate(experiment, store, checkpoint, scores, detected)
    else:
        evaluated = evaluated_of(experiment, store, checkpoint, detected)
    if last == "evaluate":
        return replace(made, evaluated=evaluated)
    others = [*detected.values(), *([compared.ensembles] if compared is not None and compared.ensembles else [])]
    told = (compared.facts if compared is not None else None, evaluated.facts if evaluated is not None else None)
    found = made.clustered.facts if made.clustered is not None else None
    page = report(
        experiment, store, checkpoint, scores, made.explanations, made.ascents, others, *told, made.lines, found
    )
    return replace(made, evaluated=evaluated, report=page)


def _explained(experiment: Experiment, made: Products, table: Scores, *, make: bool) -> Products:
    """Add the explanations, the lines of what is explained and the ways up the density; make them or open them."""
    store, checkpoint, scores = made.store, made.checkpoint, made.scores
    assert checkpoint is not None and scores is not None
    if not make:
        explanations = explanations_of(experiment, store, table)
        lines, ascents = lines_of(experiment, store, table), ascents_of(experiment, store, scores)
    else:
        explanations = explain(experiment, store, checkpoint, table)
        lines = measure_lines(experiment, store, checkpoint, table, next(iter(explanations.values())))
        ascents = follow(experiment, store, checkpoint, scores)
    return replace(made, explanations=explanations, lines=lines, ascents=ascents)


def _clustered(experiment: Experiment, made: Products, *, make: bool) -> Clustered | None:
    """Cluster the explanations of the method that the settings name, or open the clusters that there are."""
    method = experiment.cluster.method or experiment.explain.methods[0].name
    layer = made.explanations.get(method)
    if layer is None:
        if make:
            raise ConfigError(f"no explanations by {method!r} to cluster; run `distspec explain` first")
        return None
    if make:
        return cluster(experiment, made.store, layer, made.lines)
    return clustered_of(experiment, made.store, layer)


def check(experiment: Experiment, *, mend: bool = False) -> list[str]:
    """Verify the store of an experiment: `distspec ingest --check`.

    Arguments:
        experiment: the settings.
        mend: take damaged shards out of the store, so that the next run of their stages writes them again.

    Returns:
        One line for each problem.

    Raises:
        StoreNotFoundError: there is no store.
    """
    with _locked(experiment):
        store = SpectraStore.open(store_path(experiment), write=mend)
        connect(experiment.runtime)
        return audit(store, partial(map_shards, settings=experiment.runtime, label="check"), mend=mend)


def _finished_store(experiment: Experiment) -> SpectraStore:
    store = SpectraStore.open(store_path(experiment), write=True)
    if not store.finished:
        raise ConfigError(
            f"{store.path} lacks {len(store.pending())} of {store.shards} shards, or the look over all of them; "
            "run `distspec ingest` to finish it"
        )
    return store


def _has_model(experiment: Experiment, store: SpectraStore) -> bool:
    return experiment.score.checkpoint is not None or model_folder(experiment, store.digest).is_dir()


def _model(experiment: Experiment, store: SpectraStore, *, make: bool) -> Checkpoint:
    """Give the model: a named checkpoint, else the experiment's own, trained if that is asked for."""
    if experiment.score.checkpoint is not None:
        checkpoint = Checkpoint.load(experiment.score.checkpoint)
    elif make:
        checkpoint = train(experiment, store)
    else:
        checkpoint = Checkpoint.load(model_folder(experiment, store.digest))
    checkpoint.require(store.grid, store.recipe)
    return checkpoint


@contextmanager
def _locked(experiment: Experiment) -> Iterator[Path]:
    """Make the output folder and keep a second run off it.

    Raises:
        ConfigError: the output cannot be written or another run uses it.
    """
    folder = Path(experiment.output)
    locks = [folder / ".lock"]
    # A store that lies elsewhere may be that of several outputs. (A bucket knows no lock.)
    if experiment.ingest.store and "://" not in experiment.ingest.store:
        locks.append(Path(f"{experiment.ingest.store}.lock"))
    with ExitStack() as held:
        for path in locks:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(path, timeout=0))
            except Timeout:
                place = path.parent if path.name == ".lock" else experiment.ingest.store
                raise ConfigError(f"another run is at work in {place}; wait for it or choose another") from None
            except OSError as error:
                what = "the output" if path.name == ".lock" else "the folder"
                raise ConfigError(f"cannot write to {what} {path.parent}: {error.strerror}; choose another") from error
        yield folder


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM (a batch system's warning) into KeyboardInterrupt, so that one path ends a run in order."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(signum)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
