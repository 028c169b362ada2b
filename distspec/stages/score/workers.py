"""Work of `distspec score`, in a worker: a shard read, reconstructed once, all its scores and latents written; and the
summary of it, which adds up across shards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from distspec.addresses import Place
from distspec.config import Score
from distspec.detectors.neural.scores import ModelScores
from distspec.errors import ShardError
from distspec.models.checkpoint import Checkpoint
from distspec.spectra import Spectra
from distspec.statistics.summaries import Histogram, TopK
from distspec.store import SpectraStore, read_ahead

__all__ = ["ScoreSummary", "summarize"]


@dataclass(frozen=True)
class ScoreSummary:
    """Counts, distributions and top lists of all scores over some shards; adds up across shards."""

    scored: int
    set_aside: int
    histograms: dict[str, Histogram]
    tops: dict[str, TopK]

    def __add__(self, other: "ScoreSummary") -> "ScoreSummary":
        return ScoreSummary(
            self.scored + other.scored,
            self.set_aside + other.set_aside,
            {name: self.histograms[name] + other.histograms[name] for name in self.histograms},
            {name: self.tops[name] + other.tops[name] for name in self.tops},
        )


def summarize(
    rows: Int64[np.ndarray, "n"],
    scores: Mapping[str, Float32[np.ndarray, "n"]],
    usable: Bool[np.ndarray, "n"],
    top: int,
) -> ScoreSummary:
    """Summarize the scores of some rows."""
    scored = int(usable.sum())
    columns = {name: np.where(usable, values, np.nan) for name, values in scores.items()}
    return ScoreSummary(
        scored,
        len(rows) - scored,
        {name: Histogram.of(column) for name, column in columns.items()},
        {name: TopK.of(top, rows, column) for name, column in columns.items()},
    )


class Scorer:
    """Scores one shard after the other; lives in a worker."""

    def __init__(self, store: str, folder: Place, layer: str, settings: Score, device: str) -> None:
        self._store = SpectraStore.open(store, write=True)
        self._layer = self._store.layer(layer)
        self._scores = ModelScores(Checkpoint.load(folder), settings, device)
        self._top = settings.top

    def __call__(self, shard: int) -> ScoreSummary:
        return self.without(shard, (), "")

    def attempt(self, shard: int, start: int, stop: int) -> None:
        """Score some rows of a shard and keep nothing."""
        first, _ = self._layer.bounds(shard)
        usable = self._store.status(start, stop) == 0
        spectra = self._store.read(shard)[start - first : stop - first]
        if usable.any():
            self._scores(spectra[usable])

    def without(self, shard: int, lost: Sequence[int], why: str) -> ScoreSummary:
        """Score a shard without some rows; these have no scores, and the layer keeps why."""
        start, stop = self._layer.bounds(shard)
        rows = np.arange(start, stop)
        usable = (self._store.status(start, stop) == 0) & ~np.isin(rows, lost)
        names = self._scores.names
        values = np.full((len(rows), len(names)), np.nan, np.float32)
        told = {
            name: np.full((len(rows), *shape), np.nan, np.float32)
            for name, (_, shape) in self._layer.fields.items()
            if name not in names
        }
        for chosen in self._read(rows, usable):
            scored, places = self._scores(chosen), chosen.rows - start
            values[places] = scored.scores
            for name in told:
                told[name][places] = getattr(scored, name)
        odd = usable & ~np.isfinite(values).all(axis=1)
        if odd.any():
            error = ShardError(
                f"row {rows[odd][0]} (and {int(odd.sum()) - 1} more of rows {start}-{stop}) has no finite "
                "score although it is not set aside; look at its flux, or cut it by the recipe"
            )
            error.rows = (start, stop)
            raise error
        columns = {name: np.ascontiguousarray(values[:, index]) for index, name in enumerate(names)}
        self._layer.give_up(shard, lost, why)
        self._layer.write(shard, told | columns)
        return summarize(rows, columns, usable, self._top)

    def _read(self, rows: Int64[np.ndarray, "n"], usable: Bool[np.ndarray, "n"]) -> Iterator[Spectra]:
        """Give the usable spectra of a shard in two parts; the second is read while the first is scored."""
        places = np.flatnonzero(usable)
        # The first is whole batches, so that batches are those of the shard.
        batch = self._scores.settings.batch
        whole = len(places) // batch // 2 * batch
        middle = int(places[whole]) if whole else len(rows)

        def read(part: slice) -> Spectra:
            spectra, good = self._store.between(int(rows[part][0]), int(rows[part][-1]) + 1), usable[part]
            return spectra if good.all() else spectra[good]

        parts = [part for part in (slice(0, middle), slice(middle, len(rows))) if usable[part].any()]
        with closing(read_ahead(read, parts)) as found:
            yield from found
