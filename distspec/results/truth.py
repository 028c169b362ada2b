"""What a simulated survey's truth says about the results: planted spectra found, and windows pointed at.

The truth is two catalogue columns: `anomaly`, the planted kind (empty for an ordinary spectrum), and `anomaly_wave`,
up to four windows [low, high] in vacuum Å at the rest frame of the catalogue's redshift, NaN where unused.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from distspec.errors import LayoutError
from distspec.results.explanations import region_of_pixel
from distspec.results.scores import Fold, Scores, distributions, fold_here, list_length, top_lists
from distspec.spectra.segments import edges_of
from distspec.spectra.segments import fold as fold_segments
from distspec.statistics.summaries import ByName, Histogram
from distspec.store import Layer, SpectraStore

__all__ = ["Pointing", "Recovery", "has_truth", "pointing", "recovery", "truth_windows"]


def has_truth(store: SpectraStore) -> bool:
    """Tell whether the survey says which anomalies were planted in it."""
    return {"anomaly", "anomaly_wave"} <= set(store.column_names)


@dataclass(frozen=True)
class Recovery:
    """How many planted spectra each score's top list holds.

    Arguments:
        fraction: share of the scored spectra in a top list.
        listed: length of a top list.
        planted: kind -> number planted and scored.
        set_aside: kind -> number planted but set aside, which no score can find.
        found: score -> kind -> number in the score's top list.
    """

    fraction: float
    listed: int
    planted: dict[str, int]
    set_aside: dict[str, int]
    found: dict[str, dict[str, int]]

    def counts(self, score: str, kinds: Collection[str] | None = None) -> tuple[int, int]:
        """Give how many of the planted and scored spectra of some kinds (None: all) are found, and how many exist."""
        chosen = [kind for kind in self.planted if kinds is None or kind in kinds]
        return sum(self.found[score][kind] for kind in chosen), sum(self.planted[kind] for kind in chosen)

    def recall(self, score: str, kinds: Collection[str] | None = None) -> float:
        """Give the share found; NaN where nothing of these kinds was scored."""
        found, planted = self.counts(score, kinds)
        return found / planted if planted else float("nan")

    def best(self, kinds: Collection[str]) -> str:
        """Name the score that finds most of `kinds`; of equals the one that finds most of all, then the first."""
        return max(self.found, key=lambda score: (self.counts(score, kinds)[0], self.counts(score)[0]))


def recovery(
    store: SpectraStore,
    scores: Scores,
    fraction: float = 0.02,
    histograms: dict[str, Histogram] | None = None,
    fold: Fold = fold_here,
) -> Recovery:
    """Count the planted spectra in each score's top list.

    Arguments:
        store: a simulated survey.
        scores: its scores, NaN for what is set aside.
        fraction: length of the top lists, as a share of the scored spectra.
        histograms: `distributions` of the scores, if known already.
        fold: adds up over shards.

    Raises:
        LayoutError: the store holds no truth.
    """
    _require_truth(store)
    histograms = distributions(scores, fold) if histograms is None else histograms
    counts = fold(_Planted, (store,), range(store.shards), "planted spectra") or {}
    names = sorted({kind for kind, _ in counts if kind})
    size = list_length(sum(count for (_, usable), count in counts.items() if usable), fraction)
    tops = top_lists(scores, dict.fromkeys(scores.names, size), histograms, fold)
    listed = {score: np.sort(top.rows) for score, top in tops.items()}
    items = [(shard, _between(listed, *store.base.bounds(shard))) for shard in range(store.shards)]
    counted = fold(_Listed, (store,), [item for item in items if item[1]], "planted spectra in lists") or {}
    found = {score: {kind: counted.get((score, kind), 0) for kind in names} for score in tops}
    planted = {kind: counts.get((kind, True), 0) for kind in names}
    set_aside = {kind: counts.get((kind, False), 0) for kind in names}
    return Recovery(fraction, size, planted, set_aside, found)


class _Planted:
    """Counts the spectra of a shard by what was planted in them (empty for nothing) and whether they are usable."""

    def __init__(self, store: SpectraStore) -> None:
        self._store = store

    def __call__(self, shard: int) -> ByName:
        start, stop = self._store.base.bounds(shard)
        kinds, usable = self._store.column("anomaly", np.arange(start, stop)), self._store.status(start, stop) == 0
        return ByName(
            {
                (str(kind), state): int(((kinds == kind) & (usable == state)).sum())
                for kind in np.unique(kinds)
                for state in (True, False)
            }
        )


def _between(rows: dict[str, Int64[np.ndarray, "m"]], start: int, stop: int) -> dict[str, Int64[np.ndarray, "n"]]:
    """Give what of sorted lists lies in a run of rows, but for lists of which nothing does."""
    parts = {name: one[slice(*np.searchsorted(one, (start, stop)))] for name, one in rows.items()}
    return {name: part for name, part in parts.items() if len(part)}


class _Listed:
    """Counts what was planted in the listed spectra of a shard, by score and kind."""

    def __init__(self, store: SpectraStore) -> None:
        self._store = store

    def __call__(self, item: tuple[int, dict[str, Int64[np.ndarray, "n"]]]) -> ByName:
        shard, listed = item
        start, stop = self._store.base.bounds(shard)
        kinds = self._store.column("anomaly", np.arange(start, stop))
        counts = {}
        for score, rows in listed.items():
            for kind, count in zip(*np.unique(kinds[rows - start], return_counts=True), strict=True):
                counts[score, str(kind)] = int(count)
        return ByName(counts)


@dataclass(frozen=True)
class Pointing:
    """How often an explanation's heaviest segment lies in a window that makes the planted spectrum odd.

    Arguments:
        method: that explains.
        score: the score that was explained.
        explained: kind -> planted spectra with an explanation and a window on the grid.
        heaviest: kind -> those whose segment of largest |weight| overlaps a window.
        positive: kind -> those whose segment of largest positive weight does.
        chance: kind -> mean share of segments that overlap a window: what a random segment achieves.
    """

    method: str
    score: str
    explained: dict[str, int]
    heaviest: dict[str, int]
    positive: dict[str, int]
    chance: dict[str, float]

    def total(self) -> tuple[int, int, int, float]:
        """Give explained, heaviest, positive and chance over all kinds."""
        explained = sum(self.explained.values())
        expected = sum(self.chance[kind] * count for kind, count in self.explained.items())
        chance = expected / explained if explained else float("nan")
        return explained, sum(self.heaviest.values()), sum(self.positive.values()), chance


def pointing(store: SpectraStore, explanation: Layer) -> list[Pointing]:
    """Compare explanations with the recorded windows, over the spectra of each score's list that were planted.

    Arguments:
        store: a simulated survey.
        explanation: layer of the explain stage.

    Returns:
        One for each score that is explained.

    Raises:
        LayoutError: the store holds no truth, or the layer explains another grid.
    """
    _require_truth(store)
    names = explanation.attributes["names"]
    segment_of = region_of_pixel(store.grid, explanation)
    kinds, rank = store.column("anomaly", explanation.read("row")), explanation.read("rank")
    planted = np.flatnonzero(kinds != "")
    # In runs, since weights of pixels are many.
    heavy = [_heaviest(explanation, segment_of, planted[start : start + 256]) for start in range(0, len(planted), 256)]
    heaviest, positive = np.concatenate(heavy or [np.zeros((0, 2, len(names)), np.int64)]).transpose(1, 0, 2)
    edges = edges_of(store.grid, fold_segments(np.zeros(int(segment_of[-1]) + 1), segment_of)[1])
    windows = truth_windows(store, explanation.read("row")[planted])
    # NaN compares false, so an unused window overlaps nothing.
    inside = (edges[None, None, :-1] < windows[:, :, 1, None]) & (edges[None, None, 1:] > windows[:, :, 0, None])
    marked: Bool[np.ndarray, "n segments"] = np.asarray(inside.any(axis=1))
    line = np.arange(len(planted))
    found = []
    for place, name in enumerate(names):
        right = marked[line, heaviest[:, place]] & (heaviest[:, place] >= 0)
        raises = marked[line, positive[:, place]] & (positive[:, place] >= 0)
        result = Pointing(str(explanation.attributes["method"]), name, {}, {}, {}, {})
        for kind in np.unique(kinds[planted]):
            chosen = (kinds[planted] == kind) & marked.any(axis=1) & (rank[planted, place] >= 0)
            text = str(kind)
            result.explained[text] = int(chosen.sum())
            result.heaviest[text] = int(right[chosen].sum())
            result.positive[text] = int(raises[chosen].sum())
            result.chance[text] = float(marked[chosen].mean()) if chosen.any() else 0.0
        found.append(result)
    return found


def _heaviest(
    explanation: Layer, segment_of: Int64[np.ndarray, "pixels"], places: Int64[np.ndarray, "n"]
) -> Int64[np.ndarray, "n 2 k"]:
    """Give the segments of largest |weight| and of largest positive weight; -1 where there is none."""
    weights, _ = fold_segments(explanation.take("weights", places), segment_of)
    lost = np.isnan(weights).any(axis=2)
    weights = np.where(np.isnan(weights), 0.0, weights)
    heaviest = np.where(lost, -1, np.abs(weights).argmax(axis=2))
    positive = np.where(lost | (weights.max(axis=2) <= 0), -1, weights.argmax(axis=2))
    return np.stack([heaviest, positive], axis=1)


def truth_windows(store: SpectraStore, rows: Int64[np.ndarray, "m"]) -> Float64[np.ndarray, "m 4 2"]:
    """Give the recorded windows of some rows on the store's own wavelength axis, Å vacuum; NaN where unused."""
    windows = store.column("anomaly_wave", rows).astype(np.float64)
    if store.frame == "observed":
        windows *= (1.0 + store.column("z", rows))[:, None, None]
    return np.asarray(windows)


def _require_truth(store: SpectraStore) -> None:
    if not has_truth(store):
        raise LayoutError(f"{store.path} has no columns anomaly and anomaly_wave; only a simulated survey tells truth")
