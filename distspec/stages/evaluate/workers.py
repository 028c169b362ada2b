"""What a worker of `distspec evaluate` does: it injects anomalies into hosts and scores or explains what comes of it.

An explainer is a `Pointer`: regions of the spectrum, and which of them it holds to be odd. A further one is a further
entry of the list that `Injector` makes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from distspec import explainers
from distspec.config import Ablation, AnyMethod, Experiment, Lime, Occlusion, Reconstructed
from distspec.detectors.classical.pca import PcaDetector
from distspec.detectors.classical.saved import load_detector
from distspec.detectors.explainable import Explainable
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import ShardError
from distspec.explainers import Explainer
from distspec.explainers.baselines import Baselines
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra
from distspec.spectra.segments import fold
from distspec.stages.evaluate.injection import GRADED, Injected, inject
from distspec.store import SpectraStore

__all__ = ["InjectionJob", "Injector", "Part", "Plan", "Pointer"]

Part = dict[str, Shaped[np.ndarray, "..."]]
"""Result of a job as named arrays."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Hosts, in the order drawn, and what is planted in them.

    Arguments:
        background: rows of the validation set.
        hosts: rows of the hosts, some of these.
        z: their redshifts.
        companions: for each host the row of a blend's other spectrum.
        companion_z: their redshifts.
        kinds: what is planted.
        strengths: from the smallest to the largest.
        reference: place of the strength nearest to 1.
    """

    background: Int64[np.ndarray, "n"]
    hosts: Int64[np.ndarray, "hosts"]
    z: Float64[np.ndarray, "hosts"]
    companions: Int64[np.ndarray, "hosts"]
    companion_z: Float64[np.ndarray, "hosts"]
    kinds: tuple[str, ...]
    strengths: tuple[float, ...]
    reference: int


@dataclass(frozen=True)
class InjectionJob:
    """One kind in some hosts: scored at every strength, or explained at the reference strength."""

    kind: str
    start: int
    stop: int
    explained: bool

    @property
    def name(self) -> str:
        """Of its file."""
        return f"part-{self.kind}-{self.start}-{self.stop}{'-explained' if self.explained else ''}.npz"


_HOST_AXIS: Final = {"scores": 0, "possible": 0, "hits": 1, "chance": 1, "known": 0}
"""Which axis of the arrays of a part counts its hosts."""


@dataclass(frozen=True, eq=False)
class Pointer:
    """An explainer: it points at one of its regions of a spectrum, for each of k scores.

    Arguments:
        names: of the explainer and score, for tables and metrics.
        covers: pixels of each region.
        point: gives the region that it holds to be odd in each spectrum, -1 where it names none.
    """

    names: tuple[str, ...]
    covers: Bool[np.ndarray, "regions pixels"]
    point: Callable[[Spectra], Int64[np.ndarray, "k n"]]

    def judge(
        self, spectra: Spectra, region: Bool[np.ndarray, "n pixels"]
    ) -> tuple[Bool[np.ndarray, "k n"], Float64[np.ndarray, "n"]]:
        """Tell where it points into the planted region, and what share of its regions would be right."""
        if not len(spectra):
            return np.zeros((len(self.names), 0), bool), np.zeros(0)
        marked = region.astype(np.float32) @ self.covers.T.astype(np.float32) > 0
        chosen = self.point(spectra)
        return marked[np.arange(len(marked)), chosen] & (chosen >= 0), marked.mean(axis=1)


class Injector:
    """Injects and scores, or injects and explains; lives in a worker.

    Arguments:
        store: its path; it is only read.
        plan: what is planted in what.
        experiment: with the recipe, and the settings of scores and explainers.
        model: folder of the checkpoint, if there is one.
        detectors: folder of each classical detector, and the names of its scores.
    """

    def __init__(
        self,
        store: str,
        plan: Plan,
        experiment: Experiment,
        model: str | None,
        detectors: Mapping[str, tuple[str, tuple[str, ...]]],
    ) -> None:
        self._store = SpectraStore.open(store)
        self._plan, self._experiment = plan, experiment
        # Each changed spectrum is normalised again, so that all are read as they stand before the sample's statistics.
        self._hosts = self._store.take(plan.hosts, frozen=False)
        self._companions = self._store.take(plan.companions, frozen=False)
        device = experiment.runtime.needs("evaluate").device
        self._model = None if model is None else ModelScores(Checkpoint.load(model), experiment.score, device)
        self._detectors = {name: (load_detector(folder)[0], scores) for name, (folder, scores) in detectors.items()}
        self._pointers: list[Pointer] | None = None

    def __call__(self, job: InjectionJob) -> tuple[InjectionJob, Part]:
        return job, self._explained(job) if job.explained else self._scored(job)

    def attempt(self, job: InjectionJob, start: int, stop: int) -> None:
        """Do some hosts of a job and keep nothing."""
        self(replace(job, start=start, stop=stop))

    def without(self, job: InjectionJob, lost: Sequence[int], why: str) -> tuple[InjectionJob, Part]:
        """Do a job without some hosts: in these its kind counts as impossible, and nothing is known of them."""
        starts, stops = [job.start, *(host + 1 for host in lost)], [*lost, job.stop]
        parts = [
            (slice(start - job.start, stop - job.start), self(replace(job, start=start, stop=stop))[1])
            for start, stop in zip(starts, stops, strict=True)
            if start < stop
        ]
        if not parts:
            raise ShardError(f"every host of {job.name} {why}")
        whole: Part = {}
        for name, first in parts[0][1].items():
            axis = _HOST_AXIS.get(name)
            if axis is None:
                whole[name] = first
                continue
            shape = [job.stop - job.start if place == axis else length for place, length in enumerate(first.shape)]
            whole[name] = np.full(shape, np.nan if first.dtype.kind == "f" else 0, first.dtype)
            for rows, part in parts:
                whole[name][(slice(None),) * axis + (rows,)] = part[name]
        return job, whole | {"lost": np.array(lost, np.int64), "why": np.array(why)}

    def _scored(self, job: InjectionJob) -> Part:
        scores, possible = [], []
        graded = GRADED[job.kind]
        for strength in self._plan.strengths if graded else [self._plan.strengths[self._plan.reference]]:
            seen, planted = self._injected(job, strength)
            scores.append(self._score(seen))
            # What is left without a pixel would be set aside, and no detector would see it.
            possible.append(planted.possible & seen.good.any(axis=1))
        # A kind of one grade is the same at every strength.
        times = 1 if graded else len(self._plan.strengths)
        stacked = np.repeat(np.stack(scores, axis=1), times, axis=1)
        return {"scores": stacked, "possible": np.repeat(np.stack(possible, axis=1), times, axis=1)}

    def _injected(self, job: InjectionJob, strength: float) -> tuple[Spectra, Injected]:
        """Inject one kind into some hosts; give what detectors see, and where it was injected."""
        plan, rows = self._plan, slice(job.start, job.stop)
        planted = inject(
            job.kind,
            self._hosts[rows],
            plan.z[rows],
            strength,
            self._experiment.seed,
            self._experiment.ingest.prepare,
            self._companions[rows],
            plan.companion_z[rows],
        )
        statistics = self._store.statistics
        return (planted.spectra if statistics is None else statistics.apply(planted.spectra)), planted

    def _score(self, spectra: Spectra) -> Float32[np.ndarray, "n detectors"]:
        columns = [] if self._model is None else [self._model(spectra).scores]
        for detector, names in self._detectors.values():
            details = detector.details(spectra)
            columns.append(np.stack([details[name] for name in names], axis=1).astype(np.float32))
        return np.concatenate(columns, axis=1)

    def _explained(self, job: InjectionJob) -> Part:
        if self._pointers is None:
            self._pointers = self._make_pointers()
        seen, planted = self._injected(job, self._plan.strengths[self._plan.reference])
        region = planted.region & seen.good
        known = planted.possible & region.any(axis=1)
        names = [name for pointer in self._pointers for name in pointer.names]
        hits, chance = np.zeros((len(names), len(seen)), bool), np.zeros((len(names), len(seen)))
        first = 0
        for pointer in self._pointers:
            own = slice(first, first + len(pointer.names))
            hits[own, known], chance[own, known] = pointer.judge(seen[known], region[known])
            first = own.stop
        regions = np.array([len(one.covers) for one in self._pointers for _ in one.names], np.int64)
        return {"names": np.array(names), "regions": regions, "hits": hits, "chance": chance, "known": known}

    def _make_pointers(self) -> list["Pointer"]:
        """List the explainers: every method on the scores that the settings explain, and each PCA's deciding region."""
        experiment, store = self._experiment, self._store
        detectors = {name: detector for detector, names in self._detectors.values() for name in names}
        own = () if self._model is None else self._model.names
        names = [name for name in experiment.explain.scores if name in own or name in detectors]
        found = []
        for method in experiment.explain.methods if names else ():
            explainer = explainers.build(method, store.grid, experiment.seed, rest=store.frame == "rest")
            if self._model is not None or not _asks_a_model(method):
                found.append(self._asking(method, explainer, Explainable(names, self._model, detectors)))
        for name, (detector, _) in self._detectors.items():
            if isinstance(detector, PcaDetector):
                found.append(_deciding(name, detector))
        return found

    def _asking(self, method: AnyMethod, explainer: Explainer, scores: Explainable) -> Pointer:
        """Point at the region of largest |weight|; what is told pixel by pixel is added up over windows."""
        segments = fold(np.zeros(len(np.unique(explainer.segment_of))), explainer.segment_of)[1]
        ordinary = Baselines.of(self._store, self._plan.hosts, self._experiment.seed, [method])

        def heaviest(spectra: Spectra) -> Int64[np.ndarray, "k n"]:
            near = ordinary.near(self._store, spectra.rows, method)
            found = explainer.explain(scores, spectra, near)
            weights, _ = fold(found.weights, found.segment_of)
            return np.asarray(np.abs(weights).argmax(axis=2).T)

        covers = segments == np.arange(segments[-1] + 1)[:, None]
        return Pointer(tuple(f"{method.name}_{name}" for name in scores.names), covers, heaviest)


def _asks_a_model(method: AnyMethod) -> bool:
    """Tell whether a method needs what only a model makes: baselines, gradients, reconstructions."""
    match method:
        case Lime(perturbation=other):
            return isinstance(other, Reconstructed)
        case Ablation(baseline=other) | Occlusion(baseline=other):
            return other == "reconstruction"
        case _:
            return True


def _deciding(name: str, detector: PcaDetector) -> Pointer:
    """Point at the region that decided the score of principal components."""
    pixel, regions = np.arange(detector.grid.pixels), detector.regions

    def oddest(spectra: Spectra) -> Int64[np.ndarray, "1 n"]:
        return np.asarray(detector.details(spectra)["region"].astype(np.int64)[None])

    return Pointer((f"{name}_region",), (pixel >= regions.starts[:, None]) & (pixel < regions.stops[:, None]), oddest)
