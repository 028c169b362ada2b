"""Isolation forest on the ranks of fluxes: few random cuts part an odd spectrum from all others.

On fluxes themselves a cut is drawn between the least and the largest flux, so that extreme emission lines are nearly
all that it finds; ranks are spread evenly.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf (2019), section 2.3; Liu, Ting & Zhou (2008), equations 1 and 2.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Self

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped
from scipy.stats import rankdata
from sklearn.ensemble import IsolationForest

from distspec.config import AnyDetector, Isolation
from distspec.detectors import Arrays, Fields
from distspec.detectors.classical.features import Features, seen
from distspec.detectors.classical.principal_components import take
from distspec.detectors.classical.trees import Trees, float32_below
from distspec.errors import ConfigError, LayoutError
from distspec.spectra import Spectra, WaveGrid

__all__ = ["IsolationDetector", "average_path", "cuts_in_flux", "ranks"]

ROWS: Final = 4096
"""Spectra scored at once."""

COLUMNS: Final = 64
"""Features ranked at once."""


class IsolationDetector:
    """How soon random cuts isolate a spectrum: s = 2^(-E[h] / c(ψ)), in (0, 1].

    h is the number of cuts above a spectrum's leaf, plus c(n) for the n spectra of the sample that share it; c(ψ) is
    the mean over a tree of ψ spectra. A spectrum like all others has s near 0.5, one without a good pixel NaN.

    The trees are grown on the ranks of the sample, between 0 and 1, ties sharing their middle. A cut at a rank between
    those of two neighbouring fluxes of the sample is kept as a cut in flux, in the same proportion between the two.
    So each new spectrum is cut where its interpolated rank would be, without the ranks of all its pixels.

    Arguments:
        settings: of the detector.
        grid: of the spectra.
        features: made of pixels.
        trees: cuts in features; `value` is the length of the path that ends in a leaf.
        subsample: ψ.
    """

    def __init__(self, settings: Isolation, grid: WaveGrid, features: Features, trees: Trees, subsample: int) -> None:
        self.settings: AnyDetector = settings
        self.grid = grid
        self.features = features
        self.trees = trees
        self.subsample = subsample
        self._settings = settings

    def __repr__(self) -> str:
        return f"IsolationDetector({self._settings.name!r}, {self.trees!r})"

    @classmethod
    def parts(cls, settings: Isolation) -> int:
        """Give 1: trees of few spectra are grown in seconds."""
        return 1

    @classmethod
    def grow(cls, settings: Isolation, sample: Spectra, seed: int, part: int) -> Arrays:
        """Grow all trees.

        Raises:
            ConfigError: less than two spectra of the sample have a good pixel, or there are more bins than pixels.
        """
        sample = sample[seen(sample)]
        if len(sample) < 2:
            raise ConfigError(f"{len(sample)} spectra of the sample have a good pixel; isolation needs 2: enlarge it")
        features = Features.of(sample, settings.bins)
        x = features(sample)
        subsample = min(settings.subsample, len(x))
        state = np.random.SeedSequence(seed, spawn_key=(part,)).generate_state(1)
        forest = IsolationForest(n_estimators=settings.trees, max_samples=subsample, random_state=int(state[0]))
        shares = ranks(x) if settings.ranks else x
        trees = Trees.of(forest.fit(shares).estimators_, _paths)
        if settings.ranks:
            trees = cuts_in_flux(trees, x, shares)
        return cls(settings, sample.grid, features, trees, subsample).to_arrays()

    @classmethod
    def assemble(cls, settings: Isolation, grid: WaveGrid, parts: Sequence[Arrays]) -> Self:
        """Take the one part.

        Raises:
            ValueError: there is not one part, or it is not of this grid.
        """
        if len(parts) != 1:
            raise ValueError(f"{len(parts)} parts of an isolation forest; expected 1")
        return cls.from_arrays(settings, grid, parts[0])

    @property
    def looking(self) -> bool:
        """False: the sample is all that it needs."""
        return False

    def look(self, spectra: Spectra) -> Any:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self!r} needs no look; call `score`")

    def summary(self, arrays: Arrays) -> Any:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self!r} needs no look; call `score`")

    def learn(self, summary: Any) -> Self:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self!r} needs no look; call `score`")

    @property
    def fields(self) -> Fields:
        """The score."""
        return {self._settings.name: ("f4", ())}

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers of trees, leaves, features and of the spectra that a tree isolates."""
        return {
            "trees": len(self.trees),
            "leaves": int(self.trees.leaf.sum()),
            "features": len(self.features),
            "subsample": self.subsample,
            "ranks": self._settings.ranks,
        }

    def details(self, spectra: Spectra) -> Arrays:
        """Give the score by the detector's name.

        Raises:
            LayoutError: the spectra are on another grid.
        """
        return {self._settings.name: self.score(spectra)}

    def score(self, spectra: Spectra) -> Float32[np.ndarray, "n"]:
        """Score spectra, the same whatever else is in the batch; NaN without a good pixel.

        Raises:
            LayoutError: the spectra are on another grid.
        """
        if spectra.grid != self.grid:
            raise LayoutError(f"spectra on {spectra.grid}; the detector is for {self.grid}; fit it on these spectra")
        scores = np.full(len(spectra), np.nan, np.float32)
        usual = float(average_path(np.array([self.subsample]))[0])
        for start in range(0, len(spectra), ROWS):
            part = spectra[start : start + ROWS]
            paths = self.trees.value[self.trees.leaves(self.features(part))]
            score = 2.0 ** -(paths.mean(axis=1, dtype=np.float64) / usual)
            scores[start : start + ROWS] = np.where(seen(part), score, np.nan)
        return scores

    def to_arrays(self) -> Arrays:
        """Give the fitted detector as arrays of numbers."""
        subsample = np.array([self.subsample], np.int64)
        return {**self.features.to_arrays(), **self.trees.to_arrays(), "subsample": subsample}

    @classmethod
    def from_arrays(cls, settings: Isolation, grid: WaveGrid, arrays: Arrays) -> Self:
        """Make the detector of `to_arrays` again.

        Raises:
            ValueError: the arrays are not those of an isolation forest on this grid.
        """
        features = Features.from_arrays(arrays)
        if features.edges[-1] != grid.pixels:
            raise ValueError(f"features of {features.edges[-1]} pixels on a grid of {grid.pixels}")
        trees = Trees.from_arrays(arrays, len(features))
        if (trees.value < 0).any():
            raise ValueError("a path of an isolation forest has a negative length")
        subsample = int(take(arrays, "subsample", np.int64, (1,))[0])
        if subsample < 2:
            raise ValueError(f"trees of an isolation forest isolate {subsample} spectra; expected 2 or more")
        found = cls(settings, grid, features, trees, subsample)
        known = found.to_arrays().keys()
        if arrays.keys() != known:
            raise ValueError(f"arrays {sorted(arrays)}; expected {sorted(known)}")
        return found


def average_path(spectra: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Give c(n), the mean number of random cuts above a leaf of a tree that isolates n spectra.

    c(n) = 2 (ln(n - 1) + γ) - 2 (n - 1) / n, with c(2) = 1 and c(0) = c(1) = 0, as in scikit-learn.
    """
    n = np.maximum(spectra, 3).astype(np.float64)
    many = 2.0 * (np.log(n - 1.0) + np.euler_gamma) - 2.0 * (n - 1.0) / n
    return np.asarray(np.where(spectra > 2, many, np.where(spectra == 2, 1.0, 0.0)))


def _paths(estimator: Any) -> Float64[np.ndarray, "nodes"]:
    """Give the length of the path to each node, as if the spectra that share it were isolated too."""
    tree = estimator.tree_
    # scikit-learn counts the root as 1.
    return np.asarray(tree.compute_node_depths() - 1.0 + average_path(tree.n_node_samples))


def ranks(x: Float32[np.ndarray, "n features"]) -> Float32[np.ndarray, "n features"]:
    """Give the share of rows that each value exceeds in its column; values that are equal get the middle of theirs."""
    shares = np.empty(x.shape, np.float32)
    for start in range(0, x.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        shares[:, columns] = (rankdata(x[:, columns], axis=0) - 0.5) / len(x)
    return shares


def cuts_in_flux(
    trees: Trees, x: Float32[np.ndarray, "n features"], shares: Float32[np.ndarray, "n features"]
) -> Trees:
    """Turn cuts in ranks to cuts in flux.

    Arguments:
        trees: grown on `shares`.
        x: fluxes of the sample.
        shares: their ranks.

    Returns:
        Trees that lead each row of x where these lead its ranks. Between two neighbouring fluxes of the sample a cut
        lies in the same proportion as it lay between their ranks.
    """
    threshold = trees.threshold.copy()
    inner = np.flatnonzero(~trees.leaf)
    inner = inner[np.argsort(trees.feature[inner], kind="stable")]
    starts = np.arange(0, x.shape[1], COLUMNS)
    for start, nodes in zip(starts, np.split(inner, np.searchsorted(trees.feature[inner], starts[1:])), strict=True):
        columns = slice(start, start + COLUMNS)
        fluxes, levels = np.sort(x[:, columns], axis=0), np.sort(shares[:, columns], axis=0)
        column, cut = trees.feature[nodes] - start, trees.threshold[nodes]
        above = _first_above(levels, column, cut)
        low, high = fluxes[above - 1, column].astype(np.float64), fluxes[above, column].astype(np.float64)
        below, over = levels[above - 1, column].astype(np.float64), levels[above, column].astype(np.float64)
        # A cut is below the next rank by a float32's rounding at least: float64 keeps it below the next flux.
        threshold[nodes] = float32_below(low + (cut - below) / (over - below) * (high - low))
    return replace(trees, threshold=threshold)


def _first_above(
    levels: Float32[np.ndarray, "n columns"], column: Shaped[np.ndarray, "m"], cut: Float32[np.ndarray, "m"]
) -> Int64[np.ndarray, "m"]:
    """Find for each cut the first row of its sorted column that is above it: one bisection of all cuts together."""
    low, high = np.zeros(len(cut), np.int64), np.full(len(cut), len(levels), np.int64)
    for _ in range(len(levels).bit_length()):
        middle = (low + high) // 2
        right = (low < high) & (levels[np.minimum(middle, len(levels) - 1), column] <= cut)
        low, high = np.where(right, middle + 1, low), np.where(right | (low >= high), high, middle)
    return low
