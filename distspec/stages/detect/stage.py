"""`distspec detect`: store -> classical detectors fitted, and a layer of scores for each.

Classical detectors need no trained network. As many as you like, also several of one kind under names of their own:

    [[detect.detectors]]
    kind = "pca"         # residuals of principal components, region by
                         # region; keeps the region that decides

    [[detect.detectors]]
    kind = "forest"      # unsupervised random forest
    synthetic = "chunks" # or "marginal", "uniform"

    [[detect.detectors]]
    kind = "isolation"   # isolation forest on the ranks of fluxes
    name = "isolation_200"

    [[detect.detectors]]
    kind = "fisher"      # Fisher vectors on a Gaussian mixture; also the
                         # mixture's own -log p, as fisher_mixture

A detector's name is that of its score, which may be named in `report.score`, `explain.scores` and `compare.scores`.
Higher = odder; NaN where a spectrum is set aside.

Trees and mixtures are fitted on `detect.sample` spectra; moments, distributions and leaf counts add up over the whole
survey, so that a forest gives the similarity to all spectra in time that grows with their number only. Nothing is
fitted on the validation set.

A detector that is fitted is not fitted again; it lies in `detectors/<name>-<digest>` of the output. After a store has
grown it stays as it is, and only new spectra are scored. Other settings of a detector, another `detect.sample` or
another `train.validation` fit another one beside it.

In the code: first every detector is grown on the sample, its parts side by side in Ray actors (`workers.py`). Then
come the looks over the survey, each one pass for all detectors that ask for one, whose summaries add up; an
interrupted fit goes on after its last whole look. Then one more pass scores with all of them. Each detector is a file
in `detectors/classical/`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Bool

from distspec.addresses import Place
from distspec.config import AnyDetector, Experiment
from distspec.detectors import classical
from distspec.detectors.classical.saved import copy_detector, load_detector, require_detector, save_detector
from distspec.errors import ConfigError
from distspec.files import remove
from distspec.results.layout import detect_layer, detector_folder
from distspec.runtime.passes import folding, runs_of
from distspec.runtime.threads import one_thread
from distspec.runtime.workers import Cut, map_items
from distspec.stages.detect.workers import DetectorScorer, Grower, Learner, Piece, ScoreMoments, Summarizer, look_file
from distspec.stages.stage import Job, Products, Stage, State, stage_run
from distspec.statistics.holdout import held_out, limited
from distspec.statistics.summaries import Moments
from distspec.store import Layer, SpectraStore

__all__ = ["DetectStage", "detect", "detections_of"]

_EXAMPLE: Final = '[{ kind = "pca" }, { kind = "forest" }]'

_UNFINISHED: Final = ".unfinished"
"""Ending of the folder of a detector that still asks for looks."""

_LOOK_RUNS: Final = 64
"""Most runs of shards whose sums are kept on disk: with 7,781 pixels each takes 0.5 GB."""

_FEW_PIXELS: Final = 2_000
"""So few are a small matter for this process: 32 MB for a matrix of their pairs."""

_SMALL_SAMPLE: Final = 1 << 25
"""Pixels of all spectra of a sample that this process reads: 256 MB of flux and ivar."""


class DetectStage(Stage):
    """Store -> classical detectors fitted, and their scores of every spectrum."""

    name, uses = "detect", ("ingest",)

    def off(self, experiment: Experiment) -> str:
        """Nothing is fitted where the settings name no detector."""
        return "" if experiment.detect.detectors else "detect.detectors names none"

    def state(self, job: Job) -> State:
        """Count the shards that are scored, of all detectors together."""
        wanted, store = job.experiment.detect.detectors, job.store
        layers = detections_of(job.experiment, store)
        done = sum(layer.shards - len(layer.pending()) for layer in layers.values())
        unfitted = [one.name for one in wanted if one.name not in layers]
        why = f"not fitted: {', '.join(unfitted)}" if unfitted else "not all shards are scored"
        total = len(wanted) * store.shards
        return State(done, total, "shards", "" if done == total else why)

    def find(self, job: Job) -> Products:
        """Open the layers of the detectors that the settings name."""
        return job.having(detected=detections_of(job.experiment, job.store))

    def make(self, job: Job) -> Products:
        """Fit and score, or finish doing so."""
        if not job.experiment.detect.detectors:
            raise ConfigError(f"no detector to fit: name some, as in detect.detectors='{_EXAMPLE}'")
        return job.having(detected=detect(job.experiment, job.store))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the layer of each detector."""
        if made.store is not None:
            for layer in made.detected.values():
                yield "scores", f"{made.store.path}/layers/{layer.name}"


@one_thread()
def detect(experiment: Experiment, store: SpectraStore) -> dict[str, Layer]:
    """Fit the detectors that the settings name and score the store with them, or finish doing so.

    Returns:
        For each detector, by its name, the layer of its score and of what led to it.

    Raises:
        ConfigError: there are too few spectra to fit on, or a detector cannot be fitted to them.
        ShardError: a spectrum that is not set aside has no finite score.
    """
    wanted = experiment.detect.detectors
    folders = {one.name: detector_folder(experiment, one, store.digest) for one in wanted}
    names = {one.name: detect_layer(experiment, one, store.digest) for one in wanted}
    fitted = all(map(_is_there, folders.values()))
    there = detections_of(experiment, store)
    # A store that has grown has rows that the layers do not know yet.
    if fitted and all(name in there and there[name].rows == store.rows and not there[name].pending() for name in names):
        return {name: there[name] for name in names}
    key = "-".join(folder.name.rpartition("-")[2][:6] for folder in folders.values())
    lineage = {"store": store.digest, "recipe": store.recipe}
    with stage_run(experiment, store, "detect", key, lineage, workers=True) as run:
        training = _training(experiment, store)
        _fit(experiment, store, [one for one in wanted if not _is_there(folders[one.name])], training)
        layers, facts = {}, {}
        for one in wanted:
            detector, sha256 = load_detector(folders[one.name])
            require_detector(folders[one.name], store.grid, store.recipe)
            scores = [name for name in (one.name, f"{one.name}_mixture") if name in detector.fields]
            attributes = {"scores": scores, "detector": sha256, "kind": one.kind, **detector.facts}
            layers[one.name] = store.create_layer(names[one.name], dict(detector.fields), attributes)
            facts[one.name] = {"kind": one.kind, "sha256": sha256, **detector.facts}
        moments = _score(experiment, store, layers, folders)
        run.metrics({f"{name}_mean": float(found.mean[0]) for name, found in moments.items()})
        run.summary(facts, "detectors.json")
    return layers


def detections_of(experiment: Experiment, store: SpectraStore) -> dict[str, Layer]:
    """Open the layers of the detectors that the settings name, as far as there are any."""
    names = {one.name: detect_layer(experiment, one, store.digest) for one in experiment.detect.detectors}
    there = set(store.layers())
    return {name: store.layer(layer) for name, layer in names.items() if layer in there}


def _is_there(folder: Place) -> bool:
    return (folder / "detector.json").is_file()


def _training(experiment: Experiment, store: SpectraStore) -> Bool[np.ndarray, "rows"]:
    """Mark the spectra that detectors may be fitted on: those that networks are trained on."""
    usable = store.column("status") == 0
    training: Bool[np.ndarray, "rows"] = usable & ~held_out(usable, experiment.train.validation, experiment.seed)
    if training.sum() < 2:
        raise ConfigError(
            f"only {int(usable.sum())} of {store.rows} spectra can be used; detectors need two to fit on, and one for "
            "validation: loosen ingest.prepare.cuts or give more spectra"
        )
    return training


# --- fitting ---------------------------------------------------------------------------------------------------------


def _fit(
    experiment: Experiment, store: SpectraStore, wanted: Sequence[AnyDetector], training: Bool[np.ndarray, "rows"]
) -> None:
    """Fit detectors and keep each in its folder; an interrupted fit goes on after its last whole look."""
    finished = {one.name: detector_folder(experiment, one, store.digest) for one in wanted}
    folders = {name: folder.with_name(folder.name + _UNFINISHED) for name, folder in finished.items()}
    _grow(experiment, store, [one for one in wanted if not _is_there(folders[one.name])], folders, training)
    items = [
        (shard, training[slice(*store.base.bounds(shard))])
        for shard in range(store.shards)
        if training[slice(*store.base.bounds(shard))].any()
    ]
    while True:
        looking = [name for name, folder in folders.items() if load_detector(folder)[0].looking]
        if not looking:
            break
        _look(experiment, store, [folders[name].resolve() for name in looking], items)
    for name, folder in folders.items():
        # Last: a folder without the ending is a detector that can score.
        copy_detector(folder, finished[name])
        remove(folder)


def _look(experiment: Experiment, store: SpectraStore, folders: Sequence[Place], items: Sequence[Any]) -> None:
    """Let detectors look at all training spectra and learn from it; runs that an interrupted look has left stay."""

    def there(folder: Place, number: int) -> bool:
        return (folder / look_file(store.rows, number)).is_file()

    runs = list(enumerate(runs_of(items, _LOOK_RUNS)))
    missing = [(n, run) for n, run in runs if not all(there(folder, n) for folder in folders)]
    settings, needs = experiment.runtime, experiment.runtime.needs("detect")
    for _ in map_items(Summarizer, (store.address, folders), missing, settings, "look", needs=needs):
        pass
    # What takes gigabytes with long spectra is no work for this process, which may be anywhere.
    here = store.grid.pixels <= _FEW_PIXELS
    states = [(folder, load_detector(folder)[1]) for folder in folders]
    arguments = (store.rows, len(runs), store.recipe)
    for _ in map_items(Learner, arguments, states, settings, "learn", needs=needs, here=here):
        pass


def _grow(
    experiment: Experiment,
    store: SpectraStore,
    wanted: Sequence[AnyDetector],
    folders: dict[str, Place],
    training: Bool[np.ndarray, "rows"],
) -> None:
    """Grow detectors on the sample, all their parts side by side."""
    if not wanted:
        return
    kept = limited(training, ~training, experiment.detect.sample, store.chunk_rows, experiment.seed)
    items = [Piece(one, part) for one in wanted for part in range(classical.class_of(one).parts(one))]
    rows = np.flatnonzero(kept & training)
    arguments = (store.address, rows, experiment.seed)
    # Nor is a sample of long spectra for this process, not even for a single piece.
    here = None if len(rows) * store.grid.pixels <= _SMALL_SAMPLE else False
    grown, needs = {}, experiment.runtime.needs("detect")
    for piece, arrays in map_items(Grower, arguments, items, experiment.runtime, "fit", needs=needs, here=here):
        grown[piece] = arrays
    for one in wanted:
        parts = [grown[piece] for piece in items if piece.detector == one]
        save_detector(classical.build(one, store.grid, parts), folders[one.name], store.recipe)


# --- scoring ---------------------------------------------------------------------------------------------------------


def _score(
    experiment: Experiment, store: SpectraStore, layers: dict[str, Layer], folders: dict[str, Place]
) -> dict[str, Moments]:
    """Score what is left of each layer, every shard read once for all of them; give the scores' moments."""
    pending = {name: set(layer.pending()) for name, layer in layers.items()}
    items = [
        (shard, tuple(name for name in layers if shard in pending[name]))
        for shard in sorted(set().union(*pending.values()))
    ]
    places = {name: (folders[name], layer.name) for name, layer in layers.items()}

    def rows(item: tuple[int, tuple[str, ...]]) -> tuple[int, int]:
        return store.base.bounds(item[0])

    needs = experiment.runtime.needs("detect")
    arguments = (store.address, places)
    for _ in map_items(DetectorScorer, arguments, items, experiment.runtime, "detect", needs=needs, cut=Cut(rows)):
        pass
    fold = folding(experiment.runtime, "detect")
    return {name: fold(ScoreMoments, (layer, name), range(layer.shards)) for name, layer in layers.items()}
