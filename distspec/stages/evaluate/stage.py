"""`distspec evaluate`: known anomalies planted into held-out spectra -> how good each detector and explainer is.

Spectra of the validation set, on which nothing was fitted, are read as they stand before the statistics of the sample,
changed, brought to what detectors see, and scored. All kinds and strengths take the same hosts. What they are compared
with is the whole validation set as it is, whose scores the layers hold. The store is only read.

A few hosts and one kind are one unit of work; its result is kept as a file until the evaluation is whole.
"""

import io
import json
import os
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Int64

from distspec.config import ENSEMBLES, Experiment
from distspec.detectors.classical.saved import require_detector
from distspec.detectors.neural.scores import names_of
from distspec.errors import CheckpointError, ConfigError, LayoutError, StoreError
from distspec.models.checkpoint import Checkpoint, read_json
from distspec.results.layout import detector_folder, evaluation_folder, score_layer
from distspec.results.scores import Scores, joined_scores, score_names
from distspec.runtime.tracking import Run
from distspec.runtime.workers import connect, map_actors
from distspec.stages.evaluate.injection import GRADED, KINDS, MOVED, describe
from distspec.stages.evaluate.section import SCHEMA, picture
from distspec.stages.evaluate.workers import Injector, Job, Part, Plan
from distspec.statistics.ensembles import Survivors, rank_mean, rank_union
from distspec.statistics.holdout import held_out
from distspec.statistics.recall import (
    ARTEFACTS,
    CONFIDENCE,
    Trials,
    as_csv,
    pointed,
    resampled,
    stratified,
    summarize,
    tracked,
)
from distspec.store import Layer, SpectraStore

__all__ = ["Evaluated", "evaluate", "evaluated_of"]

_CHUNK: Final = 64
"""Hosts in one unit of work. A constant: how a batch is cut may change the last digit of a score."""

_EXPLAINED: Final = 4
"""Hosts whose explanation is one unit of work."""

_AWAY: Final = (0.05, 0.2)
"""How far a blend's companion stands from its host in redshift, as shares of the validation set: not one that is alike,
nor one so far that the two share no wavelengths."""

_FEW: Final = 100
"""Of a smaller background it is said how little it can tell."""


@dataclass(frozen=True)
class Evaluated:
    """What planting told.

    Arguments:
        folder: of evaluation.json and evaluation.csv.
        facts: content of the former; `distspec.stages.evaluate.section` says what it holds.
    """

    folder: Path
    facts: dict[str, Any]


def evaluate(
    experiment: Experiment,
    store: SpectraStore,
    checkpoint: Checkpoint | None,
    scores: Layer | None,
    detected: Mapping[str, Layer],
) -> Evaluated:
    """Plant anomalies and measure all detectors and explainers, or finish doing so.

    Arguments:
        experiment: with the evaluate and explain settings.
        store: the spectra; nothing is written to it.
        checkpoint: the model, if there is one.
        scores: layer of its scores.
        detected: layers of the classical detectors, by name.

    Raises:
        ConfigError: there is no detector, no host, no kind that can be planted, or one of no known name.
        CheckpointError: model or detectors belong to other spectra.
        StoreError: scores are not finished, or a file cannot be written.
    """
    layers = _layers(experiment, store, checkpoint, scores, detected)
    folder = evaluation_folder(experiment, store.digest, layers)
    there = _finished(folder)
    if there is not None:
        return there
    plan = _plan(experiment, store)
    table = Scores(layers)
    connect(experiment.runtime, experiment.train.workers)
    lineage = {"store": store.digest, "scores": " ".join(table.key)}
    lineage |= {} if checkpoint is None else {"model": checkpoint.sha256}
    with Run(experiment, "evaluate", folder.name, lineage) as run:
        run.reads(experiment.name, store.digest, store.path)
        places = _places(experiment, store, detected)
        arguments = (store.path, plan, experiment, None if checkpoint is None else checkpoint.folder, places)
        parts = _work(experiment, plan, folder, arguments)
        background = np.stack([table.take(name, plan.background) for name in table.names], axis=1)
        joined = joined_scores(experiment.compare.scores, table)
        facts = _facts(experiment, store, plan, tuple(table.names), joined, background, parts)
        facts |= {"store": store.digest, "model": None if checkpoint is None else checkpoint.sha256}
        _write(folder / "evaluation.csv", as_csv(facts))
        # Last: what there is of it is whole.
        _write(folder / "evaluation.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")
        run.metrics(tracked(facts))
        run.summary(facts, "evaluation.json")
        run.figure(picture(facts), "evaluation.png")
    for part in folder.glob("part-*.npz"):
        part.unlink(missing_ok=True)
    return Evaluated(folder, facts)


def _places(
    experiment: Experiment, store: SpectraStore, detected: Mapping[str, Layer]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Give the folder of each classical detector and the names of its scores."""
    return {
        one.name: (str(detector_folder(experiment, one, store.digest)), tuple(score_names(detected[one.name])))
        for one in experiment.detect.detectors
        if one.name in detected
    }


def evaluated_of(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint | None, detected: Mapping[str, Layer]
) -> Evaluated | None:
    """Open the evaluation of these detectors, if there is one.

    Raises:
        CheckpointError: its file is damaged.
    """
    layers = list(detected.values())
    if checkpoint is not None:
        name = score_layer(experiment, checkpoint.sha256)
        layers = [*([store.layer(name)] if name in store.layers() else []), *layers]
    return _finished(evaluation_folder(experiment, store.digest, layers)) if layers else None


def _finished(folder: Path) -> Evaluated | None:
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    facts = read_json(path)
    if facts.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {facts.get('schema')}, expected {SCHEMA}; remove it and evaluate again"
        )
    return Evaluated(folder, facts)


def _layers(
    experiment: Experiment,
    store: SpectraStore,
    checkpoint: Checkpoint | None,
    scores: Layer | None,
    detected: Mapping[str, Layer],
) -> list[Layer]:
    """Give the layers whose scores are measured, the model's first; refuse what does not belong together."""
    if checkpoint is not None:
        if scores is None:
            raise ConfigError("the model has no scores to compare planted spectra with; run `distspec score` first")
        checkpoint.require(store.grid, store.recipe)
        if scores.attributes.get("model") != checkpoint.sha256:
            raise CheckpointError(f"{scores.name} is not of model {checkpoint.sha256[:12]}; score with this model")
        if score_names(scores) != list(names_of(checkpoint, experiment.score)):
            raise LayoutError(f"{scores.name} holds other scores than the settings ask for; run `distspec score` again")
    layers = [*([] if checkpoint is None or scores is None else [scores]), *detected.values()]
    if not layers:
        raise ConfigError(
            "no detector to evaluate: neither a trained model nor fitted detectors; run `distspec train` and "
            "`distspec score`, or name detectors in [[detect.detectors]] and run `distspec detect`"
        )
    for one in experiment.detect.detectors:
        if one.name in detected:
            require_detector(detector_folder(experiment, one, store.digest), store.grid, store.recipe)
    for layer in layers:
        if layer.pending():
            raise StoreError(
                f"{layer.name} lacks {len(layer.pending())} of {layer.shards} shards; run `distspec score` and "
                "`distspec detect` to finish them"
            )
    return layers


# --- what is planted in what ------------------------------------------------------------------------------------------


def _plan(experiment: Experiment, store: SpectraStore) -> Plan:
    settings = experiment.evaluate
    usable = store.column("status") == 0
    validation = np.flatnonzero(usable & held_out(usable, experiment.train.validation, experiment.seed))
    if not len(validation):
        raise ConfigError(
            f"none of {int(usable.sum())} usable spectra is in the validation set, so that nothing can be planted; "
            "raise train.validation or give more spectra"
        )
    unknown = [kind for kind in settings.kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"evaluate.kinds has {unknown[0]!r}; expected one of {', '.join(KINDS)}")
    kinds = tuple(dict.fromkeys(settings.kinds or KINDS))
    if len(validation) < 2:
        kinds = tuple(kind for kind in kinds if kind != "blend")
    z = store.column("z", validation).astype(np.float64)
    rng = np.random.default_rng([experiment.seed, len(validation)])
    drawn = rng.permutation(len(validation))
    # In the rest frame only spectra of nearly the same redshift share most of their wavelengths.
    order = np.argsort(z, kind="stable") if store.frame == "rest" else rng.permutation(len(validation))
    others = _others(order, rng)[drawn]
    hosts = drawn[: settings.hosts]
    strengths = tuple(sorted(set(settings.strengths)))
    reference = int(np.abs(np.log(strengths)).argmin())
    others = others[: settings.hosts]
    return Plan(validation, validation[hosts], z[hosts], validation[others], z[others], kinds, strengths, reference)


def _others(order: Int64[np.ndarray, "n"], rng: np.random.Generator) -> Int64[np.ndarray, "n"]:
    """Give each spectrum another one that stands some places away in an order; itself if there is no other."""
    count = len(order)
    least = min(max(1, int(_AWAY[0] * count)), count - 1)
    most = max(least, min(int(_AWAY[1] * count), count - 1))
    place, steps, up = np.arange(count), rng.integers(least, most + 1, count), rng.random(count) < 0.5
    # Less than half of all places away, so that one side is always open.
    goes_up = ((place + steps < count) & up) | (place - steps < 0)
    others = np.empty(count, np.int64)
    others[order] = order[np.where(goes_up, place + steps, place - steps)]
    return others


# --- work -------------------------------------------------------------------------------------------------------------


def _jobs(plan: Plan, explained: int) -> list[Job]:
    """List the jobs, the long ones first."""
    found = []
    for size, hosts, pointing in (
        (_EXPLAINED, min(explained, len(plan.hosts)), True),
        (_CHUNK, len(plan.hosts), False),
    ):
        for start in range(0, hosts, size):
            found += [Job(kind, start, min(start + size, hosts), pointing) for kind in plan.kinds]
    return found


def _work(experiment: Experiment, plan: Plan, folder: Path, arguments: tuple[Any, ...]) -> dict[Job, Part]:
    """Do all jobs; those whose files an interrupted run has left are not done again."""
    parts = {}
    jobs = _jobs(plan, experiment.evaluate.explained)
    for job in jobs:
        part = _read_part(folder / job.name)
        if part is not None:
            parts[job] = part
    missing = [job for job in jobs if job not in parts]
    for job, part in map_actors(Injector, arguments, missing, experiment.runtime, "evaluate"):
        _write_part(folder / job.name, part)
        parts[job] = part
    return parts


def _write_part(path: Path, part: Part) -> None:
    stream = io.BytesIO()
    np.savez(stream, **part)  # type: ignore[arg-type]
    _write(path, stream.getvalue())


def _read_part(path: Path) -> Part | None:
    """Read a file that an interrupted run has left; one that is damaged counts as absent and is made again."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


# --- what it tells ----------------------------------------------------------------------------------------------------


def _facts(
    experiment: Experiment,
    store: SpectraStore,
    plan: Plan,
    detectors: tuple[str, ...],
    joined: Sequence[str],
    background: Float32[np.ndarray, "n detectors"],
    parts: Mapping[Job, Part],
) -> dict[str, Any]:
    """Measure; only kinds that are possible in some host are measured."""
    settings = experiment.evaluate
    hosts, strengths = len(plan.hosts), len(plan.strengths)
    scores = np.zeros((len(plan.kinds), hosts, strengths, len(detectors)), np.float32)
    possible = np.zeros((len(plan.kinds), hosts, strengths), bool)
    for job, part in parts.items():
        if not job.explained:
            where = plan.kinds.index(job.kind), slice(job.start, job.stop)
            scores[where], possible[where] = part["scores"], part["possible"]
    numbers = possible.sum(axis=1)
    kept = np.flatnonzero(numbers[:, plan.reference])
    kinds = tuple(plan.kinds[index] for index in kept)
    if not kinds:
        raise ConfigError(
            f"none of {', '.join(plan.kinds)} leaves a trace in {hosts} hosts on {store.grid}; choose other "
            "evaluate.kinds, or raise train.validation"
        )
    trials = Trials(kinds, detectors, plan.strengths, plan.reference, scores[kept], possible[kept], background)
    trials = _with_ensembles(trials, joined)
    counts = resampled(hosts, settings.bootstrap, experiment.seed)
    groups = _groups(kinds)
    found = summarize(trials, groups, settings.levels, counts)
    there: list[str] = [name for name in ("snr", "z") if name in store.column_names]
    properties = {name: store.column(name, plan.hosts).astype(np.float64) for name in there}
    return {
        "schema": SCHEMA,
        "hosts": hosts,
        "background": len(plan.background),
        "detectors": list(trials.detectors),
        "joined": list(joined) if len(joined) > 1 else [],
        "kinds": {
            kind: {
                "about": describe(kind),
                "graded": GRADED[kind],
                "possible": numbers[plan.kinds.index(kind)].tolist(),
            }
            for kind in kinds
        },
        "impossible": [kind for kind in plan.kinds if kind not in kinds],
        "groups": groups,
        "strengths": list(plan.strengths),
        "strength": plan.strengths[plan.reference],
        "levels": sorted(settings.levels),
        "confidence": CONFIDENCE,
        "bootstrap": settings.bootstrap,
        "notes": _notes(experiment, store, plan, trials),
        **found,
        "strata": stratified(trials, groups, found["level"], counts, properties, settings.strata),
        "pointing": _pointing(experiment, plan, kinds, groups, parts),
    }


def _with_ensembles(trials: Trials, joined: Sequence[str]) -> Trials:
    """Add the ensembles of `distspec compare`: ranks are those among the background, which stands for the survey."""
    if len(joined) < 2:
        return trials
    shares = []
    for name in joined:
        place = trials.detectors.index(name)
        own = trials.background[:, place]
        survivors = Survivors.count(np.unique(own), own)
        # What cannot be planted has no rank by any detector.
        planted = np.where(trials.possible, trials.scores[..., place], np.float32(np.nan))
        shares.append([survivors.shares(values.ravel()) for values in (planted, own)])
    scores, background = (np.stack(each, axis=1) for each in zip(*shares, strict=True))
    shape = trials.possible.shape
    more = [function(scores).reshape(shape) for function in (rank_mean, rank_union)]
    besides = [function(background) for function in (rank_mean, rank_union)]
    return replace(
        trials,
        detectors=(*trials.detectors, *ENSEMBLES),
        scores=np.concatenate([trials.scores, np.stack(more, axis=-1)], axis=-1),
        background=np.concatenate([trials.background, np.stack(besides, axis=1)], axis=1),
    )


def _groups(kinds: Sequence[str]) -> dict[str, list[str]]:
    """Group the kinds; a wrong redshift is neither an odd object nor an artefact of the spectrum."""
    groups = {
        "all": list(kinds),
        "objects": [kind for kind in kinds if kind not in (*ARTEFACTS, *MOVED)],
        "artefacts": [kind for kind in kinds if kind in ARTEFACTS],
    }
    return {name: members for name, members in groups.items() if members}


def _notes(experiment: Experiment, store: SpectraStore, plan: Plan, trials: Trials) -> list[str]:
    """Say what a reader should know before trusting the numbers."""
    told = []
    if experiment.score.checkpoint is not None and any(name not in _classical(experiment) for name in trials.detectors):
        told.append(
            "The model was named by score.checkpoint: it may have been trained on hosts and background, which flatters "
            "it."
        )
    if len(plan.background) < _FEW:
        told.append(
            f"The background is {len(plan.background)} spectra of the validation set; so few say little of how rare a "
            "score is. A larger train.validation gives more."
        )
    odd = int((~np.isfinite(trials.scores) & trials.possible[..., None]).sum())
    if odd:
        told.append(f"{odd} scores of planted spectra are not finite; NaN counts as not found.")
    if store.frame == "observed" and any(kind in MOVED for kind in trials.kinds):
        told.append(
            "Spectra are in the observed frame: a wrong redshift changes no flux, so that only detectors that are told "
            "redshifts can find it."
        )
    return told


def _classical(experiment: Experiment) -> tuple[str, ...]:
    names = [one.name for one in experiment.detect.detectors]
    return (*names, *(f"{name}_mixture" for name in names))


def _pointing(
    experiment: Experiment, plan: Plan, kinds: Sequence[str], groups: dict[str, list[str]], parts: Mapping[Job, Part]
) -> list[dict[str, Any]]:
    """Measure every explainer."""
    jobs = [job for job in parts if job.explained]
    if not jobs or not len(parts[jobs[0]]["names"]):
        return []
    names, regions = parts[jobs[0]]["names"].tolist(), parts[jobs[0]]["regions"].tolist()
    hosts = max(job.stop for job in jobs)
    hits = np.zeros((len(names), len(kinds), hosts), bool)
    chance, known = np.zeros(hits.shape), np.zeros(hits.shape[1:], bool)
    for job in jobs:
        if job.kind in kinds:
            place, rows = kinds.index(job.kind), slice(job.start, job.stop)
            hits[:, place, rows], chance[:, place, rows] = parts[job]["hits"], parts[job]["chance"]
            known[place, rows] = parts[job]["known"]
    counts = resampled(hosts, experiment.evaluate.bootstrap, experiment.seed)
    return [
        {
            "name": name,
            "regions": regions[index],
            "results": pointed(kinds, groups, hits[index], chance[index], known, counts),
        }
        for index, name in enumerate(names)
    ]


def _write(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole: under another name first, then renamed over the old one."""
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}; choose another output") from error
    finally:
        partial.unlink(missing_ok=True)
