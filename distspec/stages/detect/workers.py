"""What workers of `distspec detect` do: fit pieces on the sample, summarize shards for a look, score shards.

Pieces of a fit come together in the driver; what a look gives stays where the detector is, and is added up in a worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from distspec.addresses import Place
from distspec.config import AnyDetector
from distspec.detectors import Arrays
from distspec.detectors.classical import class_of
from distspec.detectors.classical.saved import load_detector, read_summary, save_detector, write_summary
from distspec.errors import ConfigError, ShardError
from distspec.statistics.summaries import Moments
from distspec.store import Layer, SpectraStore


@dataclass(frozen=True)
class Piece:
    """One piece of the fit of a detector on the sample."""

    detector: AnyDetector
    part: int


class Grower:
    """Fits pieces on the sample, which it reads once; lives in a worker."""

    def __init__(self, store: str, rows: Int64[np.ndarray, "n"], seed: int) -> None:
        self._sample = SpectraStore.open(store).take(rows)
        self._seed = seed

    def __call__(self, piece: Piece) -> tuple[Piece, Arrays]:
        grow = class_of(piece.detector).grow
        try:
            return piece, grow(piece.detector, self._sample, self._seed, piece.part)
        except ConfigError as error:
            raise ConfigError(f"detector {piece.detector.name!r} cannot be fitted: {error}") from error


Looked = tuple[int, tuple[tuple[int, Bool[np.ndarray, "n"]], ...]]
"""Number of a run of shards, and each of these with the rows to look at."""


class Summarizer:
    """Looks at one run of shards after the other, for the detectors that ask for it; lives in a worker.

    The sum over a run stays in the unfinished folder of its detector: a matrix of all pairs of pixels, as principal
    components need it, is too much to pass through the driver.
    """

    def __init__(self, store: str, folders: Sequence[Place]) -> None:
        self._store = SpectraStore.open(store)
        self._detectors = {folder: load_detector(folder)[0] for folder in folders}

    def __call__(self, run: Looked) -> int:
        number, shards = run
        total: dict[Place, Any] = {}
        for shard, training in shards:
            spectra = self._store.read(shard)[training]
            for folder, detector in self._detectors.items():
                found = detector.look(spectra)
                total[folder] = total[folder] + found if folder in total else found
        for folder, summary in total.items():
            write_summary(folder / look_file(self._store.rows, number), summary)
        return number


class Learner:
    """Adds up what a look found, in the order of the shards, and lets a detector learn from it; lives in a worker.

    One run after the other, so that two of their sums are in memory.
    """

    def __init__(self, rows: int, runs: int, recipe: str) -> None:
        self._rows, self._runs, self._recipe = rows, runs, recipe

    def __call__(self, item: tuple[Place, str]) -> None:
        """Learn, by the folder of a detector and its SHA-256 before."""
        folder, before = item
        detector, now = load_detector(folder)
        if now != before:
            return  # a worker that was lost since had learned already
        files = (folder / look_file(self._rows, number) for number in range(self._runs))
        total = reduce(add, (read_summary(file, detector) for file in files))
        # The folder is replaced, and with it go the files of the look.
        save_detector(detector.learn(total), folder, self._recipe)


def look_file(rows: int, number: int) -> str:
    """Name the file of what a run of shards gave; a store that has grown meanwhile has other runs."""
    return f"look-{rows}-{number}.npz"


class DetectorScorer:
    """Scores one shard after the other with several detectors; lives in a worker."""

    def __init__(self, store: str, places: dict[str, tuple[Place, str]]) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layers = {name: self._store.layer(layer) for name, (_, layer) in places.items()}
        self._detectors = {name: load_detector(folder)[0] for name, (folder, _) in places.items()}

    def __call__(self, item: tuple[int, tuple[str, ...]]) -> int:
        return self.without(item, (), "")

    def attempt(self, item: tuple[int, tuple[str, ...]], start: int, stop: int) -> None:
        """Score some rows of a shard and keep nothing."""
        first, _ = self._store.base.bounds(item[0])
        spectra = self._store.read(item[0])[start - first : stop - first]
        usable = self._store.status(start, stop) == 0
        if usable.any():
            for name in item[1]:
                self._detectors[name].details(spectra[usable])

    def without(self, item: tuple[int, tuple[str, ...]], lost: Sequence[int], why: str) -> int:
        """Score a shard without some rows; these have no scores, and the layers keep why."""
        shard, names = item
        start, stop = self._store.base.bounds(shard)
        spectra = self._store.read(shard)
        usable = (self._store.status(start, stop) == 0) & ~np.isin(spectra.rows, lost)
        chosen = spectra if usable.all() else spectra[usable]
        for name in names:
            detector = self._detectors[name]
            found = detector.details(chosen)
            _require_finite(found[name], chosen.rows, name)
            told = {}
            for field, (dtype, shape) in detector.fields.items():
                # What is set aside has no score: NaN, or -1 where numbers are whole.
                empty = np.nan if np.dtype(dtype).kind == "f" else -1
                told[field] = np.full((len(usable), *shape), empty, dtype)
                told[field][usable] = found[field]
            self._layers[name].give_up(shard, lost, why)
            self._layers[name].write(shard, told)
        return shard


class ScoreMoments:
    """Gives mean and spread of a detector's score over a shard."""

    def __init__(self, layer: Layer, name: str) -> None:
        self._layer, self._name = layer, name

    def __call__(self, shard: int) -> Moments:
        values = self._layer.read_shard(shard, self._name)[0][:, None]
        return Moments.of(values, ~np.isnan(values))


def _require_finite(score: np.ndarray, rows: Int64[np.ndarray, "n"], name: str) -> None:
    odd = np.flatnonzero(~np.isfinite(score))
    if odd.size:
        error = ShardError(
            f"row {rows[odd[0]]} (and {odd.size - 1} more of rows {rows[0]}-{rows[-1] + 1}) has no finite score {name} "
            "although it is not set aside; look at its flux, or cut it by the recipe"
        )
        error.rows = (int(rows[0]), int(rows[-1]) + 1)
        raise error
