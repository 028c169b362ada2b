"""`distspec evaluate`: known anomalies planted into held-out spectra -> how good each detector and explainer is.

What is a detector good at, on your spectra? Sixteen kinds of known anomalies, from faint to strong, are planted in
copies of spectra of the validation set, on which nothing was fitted. Of every detector and kind it tells the recall
among the top 0.1, 1 and 5 %, the area under the curve and the strength at which half are found, by S/N and redshift,
with bootstrap intervals; and how often explanations point at what was planted. The store is not changed.

    [evaluate]
    hosts = 400          # spectra that each kind is planted in; 0 leaves the
                         # evaluation out of `distspec run`
    strengths = [0.1, 0.25, 0.5, 1.0, 2.0]   # 1 is a clear case
    levels = [0.001, 0.01, 0.05]             # shares that are looked at
    explained = 20       # hosts whose planted spectra are explained
    kinds = ["sn-ia", "cosmic-ray"]          # none takes all:

    e+a, double-peaked, wrong-redshift, two-galaxies, m-star-overlap, sn-ia,
    featureless-blue, extreme-lines, blueshifted-na-d, arm-step,
    sky-residual, cosmic-ray, red-runaway, blend, redshift-error,
    calibration-step

The folder that is printed holds `evaluation.json` and `evaluation.csv`. Other detectors, other settings or a store
that has grown are measured anew, in another folder.

In the code: all kinds and strengths take the same hosts. They are read as they stand before the statistics of the
sample, changed (`injection.py`), brought to what detectors see, and scored (`workers.py`). What they are compared
with is the whole validation set as it is, whose scores the layers hold. A few hosts and one kind are one unit of
work; its result is kept as a file until the evaluation is whole. `statistics/recall.py` makes numbers of them.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Int64

from distspec.addresses import Place, address_of
from distspec.config import ENSEMBLES, Experiment
from distspec.detectors.classical.saved import require_detector
from distspec.detectors.neural.scores import names_of
from distspec.errors import BucketError, CheckpointError, ConfigError, LayoutError
from distspec.files import csv_text, write_file
from distspec.models.checkpoint import Checkpoint
from distspec.results import facts as on_disk
from distspec.results.facts import Facts
from distspec.results.layout import detector_folder, evaluation_folder, score_layer
from distspec.results.scores import Scores, joined_scores, score_names
from distspec.results.truth import has_truth
from distspec.runtime.threads import one_thread
from distspec.runtime.workers import Cut, map_items
from distspec.stages.evaluate.injection import GRADED, KINDS, MOVED, describe
from distspec.stages.evaluate.section import SCHEMA, content, figures, picture, truth_section
from distspec.stages.evaluate.workers import InjectionJob, Injector, Part, Plan
from distspec.stages.stage import Job, Products, Section, Stage, State, stage_run
from distspec.statistics.ensembles import SurvivalFunction, rank_mean, rank_union
from distspec.statistics.holdout import held_out
from distspec.statistics.recall import (
    ARTEFACTS,
    CONFIDENCE,
    TABLE,
    Trials,
    pointed,
    resampled,
    stratified,
    summarize,
    table_rows,
    tracked,
)
from distspec.store import Layer, SpectraStore

__all__ = ["EvaluateStage", "evaluate", "evaluated_of"]

_CHUNK: Final = 64
"""Hosts in one unit of work. A constant: how a batch is cut may change the last digit of a score."""

_EXPLAINED: Final = 4
"""Hosts whose explanation is one unit of work."""

_AWAY: Final = (0.05, 0.2)
"""How far a blend's companion stands from its host in redshift, as shares of the validation set: not one that is alike,
nor one so far that the two share no wavelengths."""

_FEW: Final = 100
"""Of a smaller background it is said how little it can tell."""


class EvaluateStage(Stage):
    """Known anomalies planted in your own spectra -> what each detector finds, and where explanations point."""

    name, uses = "evaluate", ("ingest", "train", "score", "detect")

    def off(self, experiment: Experiment) -> str:
        """Nothing is planted in no hosts."""
        return "" if experiment.evaluate.hosts else "evaluate.hosts is 0"

    def state(self, job: Job) -> State:
        """Look for the measurement of these detectors."""
        whole = self.find(job).evaluation is not None
        return State(int(whole), 1, "measurements", "" if whole else "these detectors are not measured")

    def find(self, job: Job) -> Products:
        """Open the measurement of these detectors."""
        return job.having(evaluation=evaluated_of(job.experiment, job.store, job.have.checkpoint, job.have.detected))

    def make(self, job: Job) -> Products:
        """Plant and measure, or finish doing so."""
        if not job.experiment.evaluate.hosts:
            raise ConfigError("evaluate.hosts is 0, so nothing is planted; set it to some hundreds")
        alone = job.have.checkpoint is None and bool(job.experiment.detect.detectors)
        checkpoint, scores = (None, None) if alone else (job.checkpoint, job.scores)
        found = evaluate(job.experiment, job.store, checkpoint, scores, job.have.detected)
        return job.having(evaluation=found)

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the folder."""
        if made.evaluation is not None:
            yield "measured", str(made.evaluation.folder)

    def sections(self, job: Job) -> Iterator[Section]:
        """Show which planted anomalies of a simulated survey were found, and what planting in one's own tells."""
        if has_truth(job.store):
            yield truth_section(job)
        if job.have.evaluation is not None:
            facts = job.have.evaluation.content
            yield Section(
                "evaluation", "Measured", "evaluate/section.html.jinja", {"evaluated": content(facts)}, figures(facts)
            )


@one_thread()
def evaluate(
    experiment: Experiment,
    store: SpectraStore,
    checkpoint: Checkpoint | None,
    scores: Layer | None,
    detected: Mapping[str, Layer],
) -> Facts:
    """Plant anomalies and measure all detectors and explainers, or finish doing so.

    Arguments:
        experiment: with the evaluate and explain settings.
        store: the spectra; nothing is written to it.
        checkpoint: the model, if there is one.
        scores: layer of its scores.
        detected: layers of the classical detectors, by name.

    Raises:
        ConfigError: there is no detector, no host, or no kind that can be planted.
        CheckpointError: model or detectors belong to other spectra.
        StoreError: scores are not finished, or a file cannot be written.
    """
    layers = _layers(experiment, store, checkpoint, scores, detected)
    folder = evaluation_folder(experiment, store.digest, layers)
    there = on_disk.find(folder, "evaluation.json", SCHEMA, "evaluate")
    if there is not None:
        return there
    plan = _plan(experiment, store)
    table = Scores(layers)
    lineage = {"store": store.digest, "scores": " ".join(table.key)}
    lineage |= {} if checkpoint is None else {"model": checkpoint.sha256}
    with stage_run(experiment, store, "evaluate", folder.name, lineage, workers=True) as run:
        places = _places(experiment, store, detected)
        # Who plants need not know all that it is measured against: megabytes for each worker.
        sent = replace(plan, background=plan.background[:0])
        arguments = (
            store.address,
            sent,
            experiment,
            None if checkpoint is None else address_of(checkpoint.folder),
            places,
        )
        parts = _work(experiment, plan, folder, arguments)
        background = np.stack([table.take(name, plan.background) for name in table.names], axis=1)
        joined = joined_scores(experiment.compare.scores, table)
        facts = _facts(experiment, store, plan, tuple(table.names), joined, background, parts)
        lost = {str(plan.hosts[host]): str(part["why"]) for part in parts.values() for host in part.get("lost", ())}
        if lost:
            facts["given_up"] = lost
            facts["notes"].append(f"{len(lost)} hosts ended the workers that planted in them, and count as impossible.")
        facts |= {"store": store.digest, "model": None if checkpoint is None else checkpoint.sha256}
        table_text = csv_text(TABLE, table_rows(facts), quoted=False)
        written = on_disk.write(folder, "evaluation.json", facts, {"evaluation.csv": table_text})
        run.metrics(tracked(facts))
        run.summary(facts, "evaluation.json")
        run.figure(picture(facts), "evaluation.png")
    for part in folder.glob("part-*.npz"):
        part.unlink(missing_ok=True)
    return written


def _places(
    experiment: Experiment, store: SpectraStore, detected: Mapping[str, Layer]
) -> dict[str, tuple[Place, tuple[str, ...]]]:
    """Give the folder of each classical detector and the names of its scores."""
    return {
        one.name: (detector_folder(experiment, one, store.digest), tuple(score_names(detected[one.name])))
        for one in experiment.detect.detectors
        if one.name in detected
    }


def evaluated_of(
    experiment: Experiment, store: SpectraStore, checkpoint: Checkpoint | None, detected: Mapping[str, Layer]
) -> Facts | None:
    """Open the evaluation of these detectors, if there is one.

    Raises:
        CheckpointError: its file is damaged.
    """
    layers = list(detected.values())
    if checkpoint is not None:
        name = score_layer(experiment, checkpoint.sha256)
        layers = [*([store.layer(name)] if name in store.layers() else []), *layers]
    if not layers:
        return None
    folder = evaluation_folder(experiment, store.digest, layers)
    return on_disk.find(folder, "evaluation.json", SCHEMA, "evaluate")


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
        layer.require_finished("run `distspec score` and `distspec detect` to finish them")
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


def _jobs(plan: Plan, explained: int) -> list[InjectionJob]:
    """List the jobs, the long ones first."""
    found = []
    for size, hosts, pointing in (
        (_EXPLAINED, min(explained, len(plan.hosts)), True),
        (_CHUNK, len(plan.hosts), False),
    ):
        for start in range(0, hosts, size):
            found += [InjectionJob(kind, start, min(start + size, hosts), pointing) for kind in plan.kinds]
    return found


def _work(experiment: Experiment, plan: Plan, folder: Place, arguments: tuple[Any, ...]) -> dict[InjectionJob, Part]:
    """Do all jobs; those whose files an interrupted run has left are not done again."""
    parts = {}
    jobs = _jobs(plan, experiment.evaluate.explained)
    for job in jobs:
        part = _read_part(folder / job.name)
        if part is not None:
            parts[job] = part
    missing = [job for job in jobs if job not in parts]
    needs = experiment.runtime.needs("evaluate")
    cut = Cut(lambda job: (job.start, job.stop), lambda job, place: int(plan.hosts[place]))
    for job, part in map_items(Injector, arguments, missing, experiment.runtime, "evaluate", needs=needs, cut=cut):
        _write_part(folder / job.name, part)
        parts[job] = part
    return parts


def _write_part(path: Place, part: Part) -> None:
    stream = io.BytesIO()
    np.savez(stream, **part)  # type: ignore[arg-type]
    write_file(path, stream.getvalue())


def _read_part(path: Place) -> Part | None:
    """Read a file that an interrupted run has left; one that is damaged counts as absent and is made again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except BucketError:
        raise
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
    parts: Mapping[InjectionJob, Part],
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
        survivors = SurvivalFunction.count(np.unique(own), own)
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
    experiment: Experiment,
    plan: Plan,
    kinds: Sequence[str],
    groups: dict[str, list[str]],
    parts: Mapping[InjectionJob, Part],
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
