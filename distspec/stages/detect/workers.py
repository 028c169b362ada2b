"""What workers of `distspec detect` do: fit pieces on the sample, summarize shards for a look, score shards.

None of them knows another: pieces and summaries come together in the driver.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from distspec.config import AnyDetector
from distspec.detectors import Arrays
from distspec.detectors.classical import class_of
from distspec.detectors.classical.saved import load_detector
from distspec.errors import ConfigError, ShardError
from distspec.store import SpectraStore


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


class Summarizer:
    """Summarizes one shard after the other for the detectors that ask for it; lives in a worker."""

    def __init__(self, store: str, folders: dict[str, str]) -> None:
        self._store = SpectraStore.open(store)
        self._detectors = {name: load_detector(folder)[0] for name, folder in folders.items()}

    def __call__(self, item: tuple[int, Bool[np.ndarray, "n"]]) -> tuple[int, dict[str, Any]]:
        shard, training = item
        spectra = self._store.read(shard)[training]
        return shard, {name: detector.look(spectra) for name, detector in self._detectors.items()}


class DetectorScorer:
    """Scores one shard after the other with several detectors; lives in a worker."""

    def __init__(self, store: str, places: dict[str, tuple[str, str]]) -> None:
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


def _require_finite(score: np.ndarray, rows: Int64[np.ndarray, "n"], name: str) -> None:
    odd = np.flatnonzero(~np.isfinite(score))
    if odd.size:
        error = ShardError(
            f"row {rows[odd[0]]} (and {odd.size - 1} more of rows {rows[0]}-{rows[-1] + 1}) has no finite score {name} "
            "although it is not set aside; look at its flux, or cut it by the recipe"
        )
        error.rows = (int(rows[0]), int(rows[-1]) + 1)
        raise error
